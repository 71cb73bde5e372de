"""A trial through Ray Train: in its own process with 0 workers, as DDP worker processes with more."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.tune
import torch
from ray._private.state import state as ray_state
from ray.exceptions import RayError, RayTaskError
from ray.train._internal.session import get_session
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState

# ``ray.train`` has the same, with the types of their predecessors.
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from clippo.errors import ClippoError, StoreError, TrialError
from clippo.evaluate import Counts
from clippo.model import policy_of
from clippo.train.checkpoint import STATE, Checkpoints
from clippo.train.logs import log_as, logged
from clippo.train.loop import FAILURE, fit
from clippo.train.measure import WorthTesting, all_variants, evaluate_reference
from clippo.train.shared import Shared, device_of, give_back_memory, load_shared
from clippo.train.step import TrialSettings

logger = logging.getLogger(__name__)

LOST = "lost_workers"
"""Key of a report that says how often the workers of a trial were lost and started again."""

POLL_S = "0.25"
"""How often a trial's workers are asked for their report [seconds]. Before it is taken they cannot make
another: Ray's default, 2 s, is longer than a short epoch takes. To ask more often costs them time, too."""

RESIZE_S = 30.0  # how often a trial with a variable number of workers looks whether it may have more
START_S = "20"  # how long so many workers as fit are waited for [seconds]
NOTICE_S = 2.0  # how often Ray is asked whether a machine of the trial is about to go
MAX_LOSSES = 10  # of workers, without a notice of Ray's; with more it is the trial that kills them
READ_S = 0.5  # in which a report that was taken from the workers is on its way to Tune
KEEP_S = 20.0  # how long a trial that gets other workers waits for a checkpoint of those that it has


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker process needs to train one trial; it is sent to it whole.

    Attributes:
        curve_sets: the sets that the trial's curve is measured on.
        reference_counts: of the untouched model, with which the curve starts.
        worth_testing: which variants are measured on test pictures.
        may_stop_after: from this epoch on the trial may be stopped.
    """

    shared: Shared
    settings: TrialSettings
    checkpoints: Checkpoints
    curve_sets: tuple[str, ...]
    reference_counts: tuple[Counts, ...] = ()
    worth_testing: WorthTesting = all_variants
    may_stop_after: int | None = None


def run_trial(
    job: Job, *, name: str, workers: tuple[int, int], gpus_per_worker: float, storage: str,
    worker_timeout: float,
) -> None:  # fmt: skip
    """Runs one trial to its end, reporting to Ray Tune after every epoch.

    Args:
        workers: how many it starts with at the least, and may grow to.
        worker_timeout: after which a worker that does not answer is taken for lost [seconds].
        name: names the Train run, so that a restarted trial continues it; and the lines of its log.
        storage: where Ray Train keeps its own state.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(worker_timeout)
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", str(NOTICE_S))
    fewest, most = workers
    if fewest < most:  # how many fit is counted anew when the count was of a machine that has gone
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = START_S
    per_worker = {"CPU": 1.0} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    watch = _Watch()
    callbacks: list[Any] = [watch, _Reports(watch)] if most else []
    trainer = LeanTrainer(
        _train_worker,
        train_loop_config={"job": job, "local": most == 0, "name": name},
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker=per_worker if most else None,
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=MAX_LOSSES),
            callbacks=callbacks,
        ),
    )
    try:
        trainer.fit()
    finally:
        if most:
            with contextlib.suppress(RayError):  # the queue was on the machine that is lost
                _wait_until_read()


class LeanTrainer(TorchTrainer):
    """A ``TorchTrainer`` without two processes that every run has and no trial needs (Ray 2.60).

    One is for Ray Data. The other frees what is reserved for workers whose controller has died: it asks the
    dashboard once a second, and where there is none, it holds up the end of the run for 12 s.
    ``leftovers_freed`` does the same for all trials at once.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = DatasetsCallback, PlacementGroupCleanerCallback
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unneeded)]


def _wait_until_read() -> None:
    """Returns when Ray Tune has the last report of the workers.

    A trial that ends before that leaves its end in the place for one report that Tune reads from; who brings
    the report of the workers there is also the one who reads, and would wait for ever (Ray 2.60).
    """
    if (session := get_session()) is None:  # Tune has stopped the trial
        return
    reports, end = session._get_or_create_inter_actor_queue(), time.monotonic() + KEEP_S
    while not reports.empty() and time.monotonic() < end:
        time.sleep(READ_S / 10)
    time.sleep(READ_S)  # it was taken out a moment ago


class _Watch(WorkerGroupCallback, ControllerCallback):
    """Counts how often the workers were lost, and has a checkpoint written before there are more of them.

    Ray Train tells its controller's callbacks only, which are not public (Ray 2.60).
    """

    def __init__(self) -> None:
        self.lost = 0
        self._workers: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._workers = worker_group

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, RestartingState):
            for failure in getattr(current_state.training_failed_error, "worker_failures", {}).values():
                if isinstance(failure, StoreError):
                    raise failure  # the worker has waited for the store; new ones would do so again
            # Ray comes by again and again while it waits for machines.
            self.lost += not isinstance(previous_state, RestartingState)
        elif isinstance(current_state, ResizingState):
            try:
                kept = ray.get(self._workers.execute_single_async(0, _keep), timeout=2 * KEEP_S)
            except RayError as error:
                kept, why = False, f": {error}"
            else:
                why = f" within {KEEP_S:g} s"
            if not kept:
                logger.warning("no checkpoint before the number of workers changes%s", why)


class _Reports(TuneReportCallback):
    """Forwards what rank 0 reports to Ray Tune, and how often the workers were lost and started again."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # pyproject excuses ray, but not for super()
        self._watch = watch

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, [metrics[0] | {LOST: self._watch.lost}], checkpoint)


# Between the loop of a worker and the controller, which calls `_keep` in another thread of that worker.
_wanted = threading.Event()  # a checkpoint
_kept = threading.Event()  # no step was made since the last one


def _keep() -> bool:
    """Has the loop write a checkpoint, and returns when it has, or cannot, as in an evaluation."""
    _wanted.set()
    return _kept.wait(KEEP_S)


def _report(row: Mapping[str, Any]) -> None:
    ray.train.report(dict(row))


@dataclass(frozen=True)
class _Noted:
    """Checkpoints of which `_keep` hears."""

    inner: Checkpoints

    def read(self, name: str) -> bytes | None:
        return self.inner.read(name)

    def write(self, name: str, data: bytes) -> None:
        self.inner.write(name, data)
        if name == STATE:
            _wanted.clear()
            _kept.set()


class _Leaving:
    """Whether a checkpoint is wanted: Ray has said that a machine of this trial will go, or `_keep` has."""

    def __init__(self, *, local: bool) -> None:
        self._local, self._known, self._asked = local, frozenset[tuple[str, int]](), 0.0

    def __call__(self) -> bool:
        _kept.clear()
        before, self._known = self._known, self._notices()
        return _wanted.is_set() or bool(self._known - before)

    def _notices(self) -> frozenset[tuple[str, int]]:
        """The nodes of this trial that are about to go, with the deadline [ms of UNIX time, 0: none].

        A machine may be told twice, first that it is at risk and then when it goes.
        """
        if not self._local:
            # What ray.train.get_preemption_info tells, without its barrier of all ranks at every step.
            info = get_train_context().preemption_context.preemption_info
            return (
                frozenset((n, info.deadline_ms or 0) for n in info.preempted_node_ids)
                if info
                else frozenset()
            )
        if time.monotonic() < self._asked + NOTICE_S:
            return self._known
        self._asked = time.monotonic()
        here, draining = ray.get_runtime_context().get_node_id(), ray_state.get_draining_nodes()
        return frozenset({(here, draining[here])} if here in draining else ())


def _train_worker(config: dict[str, Any]) -> None:
    give_back_memory()
    job: Job = config["job"]
    log_as(config["name"])
    torch.set_num_threads(1)
    clip, prepared, frozen = load_shared(job.shared)
    local: bool = config["local"]
    device = device_of(job.shared) if local else ray.train.torch.get_device()
    report = ray.tune.report if local else _report
    if local or ray.train.get_context().get_world_rank() == 0:
        report = logged(report)
    try:
        fit(
            policy_of(clip, job.shared.model.trainable), prepared, frozen, job.settings, job.shared.train,
            report=report, checkpoints=_Noted(job.checkpoints), curve_sets=job.curve_sets,
            reference_counts=job.reference_counts, worth_testing=job.worth_testing,
            may_stop_after=job.may_stop_after, device=device, is_leaving=_Leaving(local=local),
        )  # fmt: skip
    except TrialError as error:  # would come again on every retry; all ranks are here
        report({FAILURE: str(error)})


def measure_reference(shared: Shared, *, gpus: float) -> list[Counts]:
    """Counts of the untouched model, on the kind of device that trials use: here, or where GPUs are."""
    if not gpus:
        return _measure_reference(shared)
    measured = ray.remote(num_cpus=1, num_gpus=gpus)(_measure_reference).remote(shared)
    try:
        counts: list[Counts] = ray.get(measured)
    except RayTaskError as error:  # says with a stack trace what its cause says in a line
        if isinstance(error.cause, ClippoError):
            raise error.cause from None
        raise
    return counts


def _measure_reference(shared: Shared) -> list[Counts]:
    torch.set_num_threads(1)
    clip, prepared, frozen = load_shared(shared)
    policy = policy_of(clip, shared.model.trainable)
    return evaluate_reference(policy, prepared, frozen, shared.train, device_of(shared))
