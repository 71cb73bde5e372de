"""One trial as Ray Tune runs it: settings in, reports out, a failure as a report of its own."""

from __future__ import annotations

import logging
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.tune

from clippo.config import SweepConfig
from clippo.errors import ClippoError, StoreError
from clippo.results import ResultStore
from clippo.results.checkpoints import StoreCheckpoints, checkpoint_folder
from clippo.sweep.contenders import Contenders
from clippo.train import TrialSettings
from clippo.train.logs import log_as
from clippo.train.loop import FAILURE, UNFINISHED
from clippo.train.ray_train import Job, run_trial
from clippo.train.shared import Shared

logger = logging.getLogger(__name__)


def tune_trial(
    config: dict[str, Any], *, sweep: SweepConfig, store: ResultStore, shared: Shared, contenders: Contenders
) -> None:
    """What Ray Tune calls. It never raises: a trial that fails reports why, and the sweep goes on.

    That the result store was away for too long says nothing of the settings, and is reported apart.
    """
    trial_id: str = config["trial_id"]
    name = f"{sweep.name}-{trial_id}-{config['attempt']}"
    log_as(name)
    job = Job(
        shared=shared,
        settings=TrialSettings(**config["settings"]),
        checkpoints=StoreCheckpoints(store, checkpoint_folder(sweep.name, trial_id)),
        curve_sets=contenders.objectives.curve_sets,
        reference_counts=contenders.reference,
        may_stop_after=sweep.search.may_stop_after if trial_id.isdigit() else None,
        worth_testing=replace(contenders, rivals=config.get("rivals")),
    )
    try:
        run_trial(
            job,
            name=name,
            workers=(sweep.min_workers, sweep.max_workers),
            gpus_per_worker=sweep.gpus_per_worker,
            worker_timeout=sweep.worker_timeout,
            storage=str(Path(tempfile.gettempdir()) / "clippo-train"),
        )
    except Exception as error:
        logger.exception("trial %s failed", trial_id)
        ray.tune.report(ending(error, sweep))


def ending(error: BaseException, sweep: SweepConfig) -> dict[str, str]:
    """The last report of a trial that did not come to its end: one line, with a remedy where there is one.

    It is of FAILURE, or of UNFINISHED where nothing but a place to read or keep something was wrong.
    """
    chain = [error, *_causes(error)]  # Ray wraps what a worker raised
    for cause in chain:
        said = str(cause).lower()
        # The last is what torch says of the machine's own memory.
        if isinstance(cause, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
            return {
                FAILURE: f"out of memory with train.batch_size={sweep.train.batch_size}; "
                "set train.micro_batch, or use more workers"
            }
        if type(cause).__name__ == "WorkerHealthCheckTimeoutError":  # of Ray Train, not public
            return {
                FAILURE: f"a worker process gave no sign for {sweep.worker_timeout:g} s, again and again; "
                "look at its machine, or raise worker_timeout"
            }
        if isinstance(cause, ClippoError) and not isinstance(cause, StoreError):
            return {FAILURE: str(cause)}
    for cause in reversed(chain):
        if isinstance(cause, StoreError):
            where = f"the trial ran on {socket.gethostname()}"
            return {UNFINISHED: str(cause) if sweep.max_workers else f"{cause} ({where})"}
    lines = str(chain[-1]).strip().splitlines() or [""]
    return {FAILURE: f"{type(chain[-1]).__name__}: {lines[-1]}"[:500]}


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    workers = getattr(error, "worker_failures", None)  # of one, the others may know no more than that it left
    of_controller = getattr(error, "controller_failure", None)  # on its way here an error loses its cause
    for following in reversed(workers.values()) if workers else (of_controller or error.__cause__,):
        if following is not None and following is not error:
            found += [following, *_causes(following)]
    return found
