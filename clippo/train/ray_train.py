"""A trial through Ray Train: in its own process with 0 workers, as DDP worker processes with more."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.tune
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from clippo.config import ModelConfig, TrainConfig
from clippo.errors import TrialError
from clippo.evaluate import Counts
from clippo.model import ClipModel, load_clip, policy_of
from clippo.prepared import Location, PreparedSet, fetch, open_prepared, text_features
from clippo.train.checkpoint import Checkpoints
from clippo.train.logs import log_as, logged
from clippo.train.loop import FAILURE, fit
from clippo.train.measure import WorthTesting, all_variants, evaluate_reference
from clippo.train.step import Frozen, TrialSettings

LOST = "lost_workers"
"""Key of a report that says how often the workers of a trial were lost and started again."""

POLL_S = "0.25"
"""How often a trial's workers are asked for their report [seconds]; they wait until they were. Ray's default,
2 s, is longer than a short epoch takes."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all trials of a sweep share; each process loads it once.

    Attributes:
        prepared: name of the prepared set.
        location: where it is kept, and where this node maps it from.
        on_gpu: whether trials run on GPUs; Ray shows them to processes that have not asked for one, too.
    """

    model: ModelConfig
    train: TrainConfig
    prepared: str
    location: Location
    on_gpu: bool = False


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
    job: Job, *, name: str, workers: int, gpus_per_worker: float, storage: str, max_failures: int = 3
) -> None:
    """Runs one trial to its end, reporting to Ray Tune after every epoch.

    Args:
        name: names the Train run, so that a restarted trial continues it; and the lines of its log.
        storage: where Ray Train keeps its own state.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    per_worker = {"CPU": 1.0} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    callbacks: list[Any] = [_Reports()] if workers else []
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "local": workers == 0, "name": name},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker=per_worker if workers else None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=callbacks,
        ),
    )
    trainer.fit()


class _Reports(TuneReportCallback):
    """Forwards what rank 0 reports to Ray Tune, and how often the workers were lost and started again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # pyproject excuses ray, but not for super()
        self._lost = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._lost += 1

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, [metrics[0] | {LOST: self._lost}], checkpoint)


def _train_worker(config: dict[str, Any]) -> None:
    job: Job = config["job"]
    log_as(config["name"])
    torch.set_num_threads(1)
    clip, prepared, frozen = load_shared(job.shared)
    local: bool = config["local"]
    device = _device(job.shared) if local else ray.train.torch.get_device()
    report = ray.tune.report if local else ray.train.report
    if local or ray.train.get_context().get_world_rank() == 0:
        report = logged(report)
    try:
        fit(
            policy_of(clip, job.shared.model.trainable), prepared, frozen, job.settings, job.shared.train,
            report=report, checkpoints=job.checkpoints, curve_sets=job.curve_sets,
            reference_counts=job.reference_counts, worth_testing=job.worth_testing,
            may_stop_after=job.may_stop_after, device=device,
        )  # fmt: skip
    except TrialError as error:  # would come again on every retry; all ranks are here
        report({FAILURE: str(error)})


def measure_reference(shared: Shared, *, gpus: float) -> list[Counts]:
    """Counts of the untouched model, on the kind of device that trials use: here, or where GPUs are."""
    if not gpus:
        return _measure_reference(shared)
    counts: list[Counts] = ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(_measure_reference).remote(shared))
    return counts


def _measure_reference(shared: Shared) -> list[Counts]:
    torch.set_num_threads(1)
    clip, prepared, frozen = load_shared(shared)
    policy = policy_of(clip, shared.model.trainable)
    return evaluate_reference(policy, prepared, frozen, shared.train, _device(shared))


def _device(shared: Shared) -> torch.device:
    return torch.device("cuda" if shared.on_gpu and torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)
def load_shared(shared: Shared) -> tuple[ClipModel, PreparedSet, Frozen]:
    """The model, the prepared set and the text features; a process that runs many trials loads them once."""
    clip = load_clip(shared.model.name, shared.model.pretrained)
    prepared = open_prepared(fetch(shared.prepared, shared.location))
    templates = prepared.templates_per_class(shared.model.prompt)
    text_CD = text_features(clip, prepared.classes, templates, shared.location)
    return clip, prepared, Frozen(text_CD, clip.logit_scale)
