"""Ray Train beside plain torch.distributed: the same loop in as many processes.

Compared is an epoch after launch, from one report to the next on rank 0: training, evaluation and the report.
What launching costs is measured apart: from the call to the first line of rank 0's loop, from there to its
first report (which holds the first epoch), and from the last report to the return of the call.

Ray is imported where it is used: the processes that torch starts must not pay for it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import tempfile
import time
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.common import (
    BUNDLED,
    RESULTS,
    Line,
    NoCheckpoints,
    Precision,
    Spread,
    alternate,
    data_of,
    finish,
    load,
    opened,
    prepared_folder,
    program,
    random_model,
    ratios,
    results_folder,
    the_console,
)  # fmt: skip
from clippo.config import ModelConfig, SweepConfig, TrainConfig
from clippo.model import policy_of
from clippo.train import TrialSettings, fit

GOAL = 1.05
PLAIN, RAY = "torch.distributed", "Ray Train"


@dataclasses.dataclass(frozen=True)
class Run:
    """What both sides do.

    Attributes:
        prepared: folder of the prepared set.
        began: when it was called [seconds since the epoch, as all times here].
        stamps: a file for the times at which rank 0 entered its loop and reported.
    """

    model: ModelConfig
    prepared: Path
    train: TrainConfig
    epochs: int
    workers: int
    gpus_per_worker: float
    began: float
    stamps: Path

    @property
    def settings(self) -> TrialSettings:
        return TrialSettings(
            loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=1e-4, epochs=self.epochs, seed=0
        )


def train(run: Run, device: torch.device, report: Any) -> None:
    """What every worker does: opens the prepared set and fits."""
    entered, reported = time.time(), []
    torch.set_num_threads(1)

    def stamped(values: dict[str, Any]) -> None:
        reported.append(time.time())
        report(values)

    clip, prepared, frozen = opened(run.prepared, run.model)
    gc.collect()
    gc.freeze()  # as a trial does
    fit(
        policy_of(clip, run.model.trainable), prepared, frozen, run.settings, run.train,
        report=stamped, checkpoints=NoCheckpoints(), device=device,
    )  # fmt: skip
    if dist.get_rank() == 0:
        run.stamps.write_text(json.dumps({"entered": entered, "reported": reported}))


def with_ray(run: Run) -> None:
    """The loop as workers of the ``TorchTrainer`` of a sweep, asked for reports as often."""
    from ray.train.v2.api.config import RunConfig, ScalingConfig

    from clippo.train.ray_train import LeanTrainer

    with tempfile.TemporaryDirectory(prefix="clippo-train-") as storage:
        LeanTrainer(
            _ray_worker,
            train_loop_config={"run": run},
            scaling_config=ScalingConfig(
                num_workers=run.workers,
                use_gpu=run.gpus_per_worker > 0,
                resources_per_worker={"CPU": 1.0}
                | ({"GPU": run.gpus_per_worker} if run.gpus_per_worker else {}),
            ),
            run_config=RunConfig(name=uuid.uuid4().hex, storage_path=storage),
        ).fit()


def _ray_worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    train(config["run"], ray.train.torch.get_device(), ray.train.report)


def with_torch(run: Run) -> None:
    """The loop as processes that torch starts."""
    with tempfile.TemporaryDirectory(prefix="clippo-rendezvous-") as folder:
        spawn(_torch_worker, (run, f"file://{folder}/store"), nprocs=run.workers)


def _torch_worker(rank: int, run: Run, address: str) -> None:
    on_gpu = run.gpus_per_worker > 0
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=run.workers)
    train(run, device, lambda values: None)
    dist.destroy_process_group()


@dataclasses.dataclass
class Launches:
    """All launches of one side."""

    start: Any
    run: Run
    epochs: list[list[float]] = dataclasses.field(default_factory=list)
    to_loop: list[float] = dataclasses.field(default_factory=list)
    to_report: list[float] = dataclasses.field(default_factory=list)
    to_return: list[float] = dataclasses.field(default_factory=list)

    def __call__(self) -> float:
        """One launch; returns the median of its epochs after the first."""
        self.run.stamps.unlink(missing_ok=True)
        self.run = dataclasses.replace(self.run, began=time.time())
        self.start(self.run)
        ended, stamps = time.time(), json.loads(self.run.stamps.read_text())
        entered, reported = stamps["entered"], stamps["reported"]
        self.to_loop.append(entered - self.run.began)
        self.to_report.append(reported[0] - entered)
        self.to_return.append(ended - reported[-1])
        self.epochs.append([b - a for a, b in pairwise(reported)])
        return Spread.of(self.epochs[-1]).median


def main(
    *, workers: int = 2, gpus_per_worker: float = 0.0, precision: Precision = "auto", rounds: int = 15,
    epochs: int = 5, pictures: int = 2048, batch_size: int = 64, model: str = BUNDLED,
    trainable: str = "last:2", smoke: bool = False, results: Path = RESULTS,
) -> None:  # fmt: skip
    """Times the loop in worker processes of Ray Train and of torch.

    Args:
        workers: worker processes, one thread each [count].
        gpus_per_worker: GPUs of each; 0 is the CPU.
        precision: auto is bf16 where the device computes it natively.
        rounds: launches of each side, in turn [count].
        epochs: epochs of each launch, the first of which is not compared [count].
        pictures: pairs of an epoch [count].
        batch_size: pairs of a step, over all workers [count].
        model: an open_clip model; the bundled one, or any with random weights.
        trainable: image, last:K or transform.
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    from clippo.sweep.cluster import joined_ray
    from clippo.train.ray_train import POLL_S

    if smoke:
        rounds, epochs, pictures, batch_size, trainable = 1, 2, 16, 8, "last:1"
    console, load_before = the_console(), load()
    torch.set_num_threads(1)  # as every worker does; the JSON says so
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as temporary:
        folder = Path(temporary)
        config = dataclasses.replace(random_model(model, folder), trainable=trainable)
        prepared = prepared_folder(data_of(pictures, eval_pictures=32), config, folder)
        run = Run(
            model=config, prepared=prepared, train=TrainConfig(batch_size=batch_size, precision=precision),
            epochs=epochs, workers=workers, gpus_per_worker=gpus_per_worker, began=0.0,
            stamps=folder / "stamps.json",
        )  # fmt: skip
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_S
        sides = {PLAIN: Launches(with_torch, run), RAY: Launches(with_ray, run)}
        began = time.perf_counter()
        with joined_ray(SweepConfig(workers=workers)):  # as a sweep starts it
            started = time.perf_counter() - began
            medians = alternate(sides, rounds, console)
    ratio = Spread.of(ratios(medians[RAY], medians[PLAIN]))
    lines = [Line(f"{RAY} / {PLAIN}: an epoch after launch", ratio, "x", GOAL, at_least=False)]
    for name, side in sides.items():
        lines += [
            Line(f"{name}: an epoch after launch", Spread.of(medians[name]), "s"),
            Line(f"{name}: launch, from the call to the loop", Spread.of(side.to_loop), "s"),
            Line(f"{name}: model, data and first epoch", Spread.of(side.to_report), "s"),
            Line(f"{name}: from the last report to the return", Spread.of(side.to_return), "s"),
        ]
    lines.append(Line("starting Ray, once", Spread.of([started]), "s"))
    settings = {
        "workers": workers, "gpus_per_worker": gpus_per_worker, "precision": precision, "rounds": rounds,
        "epochs": epochs, "pairs": pictures, "batch_size": batch_size, "model": model, "trainable": trainable,
    }  # fmt: skip
    finish(
        "workers", lines, results_folder(results, smoke), console, settings=settings,
        load_before=load_before, epochs={name: side.epochs for name, side in sides.items()},
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
