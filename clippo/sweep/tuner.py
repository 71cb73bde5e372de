"""Runs a sweep: prepare, search, keep the rows, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console

from clippo.config import SweepConfig, absolute, digest
from clippo.errors import ConfigError, ResourceError
from clippo.evaluate import Counts
from clippo.front.points import REFERENCE, Front, describe, front_of
from clippo.losses import resolve_loss
from clippo.prepared import fetch, open_prepared
from clippo.results import ResultStore, SpooledStore
from clippo.sweep.examples import write_examples
from clippo.sweep.preparing import prepared_for
from clippo.sweep.progress import ProgressView
from clippo.sweep.rows import SELECTED, FinishedTrial, TrialRows, finished_trials
from clippo.sweep.search import Score, Search
from clippo.sweep.space import baseline
from clippo.sweep.trial import tune_trial
from clippo.tasks import TASKS
from clippo.train.loop import FAILURE
from clippo.train.ray_train import measure_reference

logger = logging.getLogger(__name__)

MAX_PREPARING = 4  # processes that prepare pictures; each holds a model
DRIVER_CPU = 0.01
FREE_FIELDS = {
    "name",
    "results",
    "verbose",
    "dry_run",
    "workers",
    "gpus_per_worker",
    "search.trials",
    "search.concurrency",
}
"""What a resumed sweep may change: where and how long it runs, not what it measures."""


def run_sweep(config: SweepConfig, console: Console) -> Front:
    """Runs or resumes a sweep and returns its front. A finished sweep is only read.

    Raises:
        ConfigError: a setting that cannot be used, or a name that belongs to another configuration.
        StoreError: the result store cannot be used.
        ResourceError: more asked for than the cluster has.
    """
    config = named(absolute(config))
    check_settings(config)
    # What the store does not take while it is away waits on local disk.
    with SpooledStore(config.results, report=partial(_say, console, markup=False)) as store:
        store.check()
        resumed = _is_resumed(store, config)
        finished = finished_trials(store, config.name) if resumed else {}
        _say(
            console,
            f"sweep [bold]{config.name}[/] {'resumed' if resumed else 'started'}, results in {store.uri}",
        )
        numbered = sum(i.isdigit() for i in finished)
        if numbered < config.search.trials or not {REFERENCE, *config.search.baselines} <= finished.keys():
            with joined_ray(config):
                check_resources(config)
                _run(config, store, console, finished, resumed)
        return front_of(store, config.name)


def check_settings(config: SweepConfig) -> None:
    """Refuses names that nothing has; what a single field may be, the configuration itself checks.

    Raises:
        ConfigError: an unknown task, loss or baseline.
    """
    if config.task not in TASKS:
        raise ConfigError(f"task is {config.task!r}; it must be one of: {', '.join(TASKS)}")
    for loss in config.search.losses:
        resolve_loss(loss)
    for name in config.search.baselines:
        baseline(name, config.search, config.model.trainable)


def _say(console: Console, line: str, *, markup: bool = True) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=markup)


def named(config: SweepConfig) -> SweepConfig:
    """The configuration with a name; a new one is made of date and digest."""
    if config.name:
        return config
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return dataclasses.replace(config, name=f"{config.task}-{stamp}-{digest(config)[:6]}")


def _run(
    config: SweepConfig,
    store: ResultStore,
    console: Console,
    finished: dict[str, FinishedTrial],
    resumed: bool,
) -> None:
    shared = prepared_for(config, store, console, workers=_preparing_workers(config))
    prepared = open_prepared(fetch(shared.prepared, shared.location))
    rows = TrialRows(config, store, prepared)
    began = time.time()
    measured = finished.pop(REFERENCE, None)
    if measured is not None:
        if measured.prepared_digest != prepared.digest:
            raise ConfigError(
                f"the pictures or the weights of sweep {config.name!r} are not those that it began with; "
                "bring them back or choose another --name"
            )
        reference = measured.counts
    else:
        reference = measure_reference(shared, gpus=config.gpus_per_worker)
    untouched = rows.score(reference, reference)
    # The name is taken when nothing can be wrong with the configuration any more.
    if not resumed:
        store.write_config(config.name, json.loads(json.dumps(dataclasses.asdict(config))))
    if measured is None:
        report = {
            "epoch": 0, "step": 0, "metrics": {}, "precision": config.train.precision,
            "evals": [dataclasses.asdict(c) for c in reference],
        }  # fmt: skip
        rows.write(REFERENCE, 0, {}, [report], began=began)

    def score(report: Mapping[str, Any]) -> list[float] | None:
        """Robustness and retention of the selected variant, on validation pictures."""
        if "evals" not in report:
            return None
        return rows.score([Counts(**e) for e in report["evals"] if e["variant"] == SELECTED], reference)

    scored = {i: rows.score(t.counts, reference) if t.counts else None for i, t in finished.items()}
    started = {s["trial_id"]: s for s in store.started(config.name)}
    search = Search(
        config.search,
        score,
        trainable=config.model.trainable,
        finished=[{"settings": t.settings, "values": scored[i]} for i, t in finished.items() if i.isdigit()],
        unfinished=[s for i, s in started.items() if i not in finished],
        baselines=[name for name in config.search.baselines if name not in started],
        next_number=max((int(i) for i in started if i.isdigit()), default=-1) + 1,
        on_start=partial(store.write_started, config.name),
    )
    view = ProgressView(console, config.search.trials + len(config.search.baselines), untouched)
    view.resumed([v for v in scored.values() if v], failed=sum(v is None for v in scored.values()))
    with tempfile.TemporaryDirectory(prefix="clippo-tune-") as tune_state, view:
        trainable = tune.with_parameters(tune_trial, sweep=config, store=store, shared=shared)
        tuner = tune.Tuner(
            tune.with_resources(trainable, _trial_resources(config)),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=-1,  # until the searcher says that it has finished
                max_concurrent_trials=config.search.concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=config.name,
                storage_path=tune_state,
                verbose=1 if config.verbose else 0,
                failure_config=tune.FailureConfig(max_failures=3),
                callbacks=[SweepCallback(rows, score, view)],
            ),
        )
        tuner.fit()
    write_examples(config, store, shared)


def _trial_resources(config: SweepConfig) -> dict[str, float]:
    """What the trial itself reserves; worker processes reserve their own."""
    if config.workers == 0:
        return {"cpu": 1.0} | ({"gpu": config.gpus_per_worker} if config.gpus_per_worker else {})
    # A driver that reserved a CPU could starve its own workers, silently.
    return {"trial_driver": 1.0} if "trial_driver" in ray.cluster_resources() else {"cpu": DRIVER_CPU}


def resources_of_a_trial(config: SweepConfig) -> dict[str, float]:
    """What a trial and its workers need of the cluster that this process has joined."""
    processes = max(1, config.workers)
    wanted = {"CPU": float(processes), "GPU": processes * config.gpus_per_worker}
    if config.workers:
        own = _trial_resources(config)
        wanted["CPU"] += own.get("cpu", 0.0)
        wanted["trial_driver"] = own.get("trial_driver", 0.0)
    return wanted


def check_resources(config: SweepConfig) -> None:
    """Refuses more trials at once than the cluster can run.

    Raises:
        ResourceError: with the arithmetic.
    """
    have, at_once = ray.cluster_resources(), config.search.concurrency
    for kind, each in resources_of_a_trial(config).items():
        if at_once * each > have.get(kind, 0.0) + 1e-9:
            raise ResourceError(
                f"{at_once} trials at once x {each:g} {kind} are {at_once * each:g} {kind}, the cluster has "
                f"{have.get(kind, 0.0):g}; lower search.concurrency or workers, or add nodes"
            )


class SweepCallback(tune.Callback):
    """Keeps the rows of every trial that ends, and feeds the progress view."""

    def __init__(self, rows: TrialRows, score: Score, view: ProgressView) -> None:
        self._rows, self._score, self._view = rows, score, view
        self._reports: dict[str, dict[int, dict[str, Any]]] = {}
        self._began: dict[str, float] = {}
        self._restarts: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore them; a sweep is resumed from its tables instead

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.trial_id in self._began:
            self._restarts[trial.trial_id] += 1
            return
        self._began[trial.trial_id] = time.time()
        self._reports[trial.trial_id], self._restarts[trial.trial_id] = {}, 0
        self._view.started()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "evals" in result:  # a restarted trial reports again what it had reported
            kept = {k: result[k] for k in ("epoch", "step", "metrics", "precision", "evals")}
            self._reports[trial.trial_id][result["epoch"]] = kept

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        values = self._score(result)
        failure = None if values is not None else str(result.get(FAILURE, "it ended without a report"))
        self._finish(trial, failure, values)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._finish(trial, "its process died again and again; see the logs of Ray", None)

    def _finish(self, trial: Trial, failure: str | None, values: list[float] | None) -> None:
        config, key = trial.config, trial.trial_id
        reports = [r for _, r in sorted(self._reports[key].items())]
        self._rows.write(
            config["trial_id"], config["attempt"], config["settings"], reports,
            began=self._began[key], failure=failure, preemptions=config["attempt"] + self._restarts[key],
        )  # fmt: skip
        self._view.finished(config["trial_id"], describe(config["settings"]), values, failure or "")


def _is_resumed(store: ResultStore, config: SweepConfig) -> bool:
    """Whether the store has this sweep already.

    Raises:
        ConfigError: the name belongs to a sweep of another configuration.
    """
    theirs = store.config(config.name)
    if theirs is None:
        return False
    mine = _flat(json.loads(json.dumps(dataclasses.asdict(config))))
    differ = sorted(k for k, v in mine.items() if k not in FREE_FIELDS and _flat(theirs).get(k) != v)
    if differ:
        raise ConfigError(
            f"sweep {config.name!r} exists in {store.uri} with another {', '.join(differ)}; "
            "resume it with its own settings or choose another --name"
        )
    return True


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _preparing_workers(config: SweepConfig) -> int:
    """As many processes as trials will use; each holds a model."""
    if config.gpus_per_worker:
        return config.search.concurrency * max(1, config.workers)
    return max(1, min(MAX_PREPARING, int(ray.cluster_resources().get("CPU", 1))))


@contextlib.contextmanager
def joined_ray(config: SweepConfig) -> Iterator[None]:
    """Joins the cluster that this process belongs to, or starts Ray on this machine for the time."""
    if ray.is_initialized():
        yield
        return
    level = logging.INFO if config.verbose else logging.ERROR
    # Drivers of trials with workers reserve this instead of a CPU, which they would take from their workers.
    address = os.environ.get("RAY_ADDRESS", "local")
    drivers = {"trial_driver": float(config.search.concurrency)} if address == "local" else None
    ray.init(
        address, resources=drivers, include_dashboard=False, log_to_driver=config.verbose, logging_level=level
    )
    try:
        yield
    finally:
        ray.shutdown()
