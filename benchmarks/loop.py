"""What the loop adds to bare steps, and how long it waits for the prepared set.

Bare is forward, loss, backward and optimizer step over the same tensors, which lie in memory. The loop
(``fit``) also fetches its batches from the prepared set, averages the weights, checks the loss and keeps
the time. Averaging is part of the method, and goes over all weights once more in every step; so bare steps
with it are timed, too, and what the loop adds to those is its own. All run two epochs from the start; the
second one is compared. The first one reads the prepared set from the disk (cold), since its files are
dropped from the page cache before each run; the second one does not (warm).
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    BUNDLED,
    RESULTS,
    TINY,
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
    synchronize,
    the_console,
    the_device,
)  # fmt: skip
from clippo.config import TrainConfig
from clippo.model import BetaAverage, Policy, policy_of
from clippo.prepared import open_prepared
from clippo.train import TrialSettings, fit
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.step import (
    Batch,
    _optimizer,
    autocast,
    preference_step,
    resolved_precision,
)  # fmt: skip

OVERHEAD_GOAL, WAITING_GOAL = 1.05, 0.05
VIT = "ViT-B-32"


@dataclass(frozen=True)
class Case:
    """A model, a cut, and how many steps an epoch has."""

    model: str
    trainable: str
    precision: Precision
    batch_size: int
    steps: int

    def __str__(self) -> str:
        return f"{self.model} {self.trainable} {self.precision}, {self.batch_size} pairs"


CASES = (
    Case(BUNDLED, "last:2", "auto", 64, 8),  # the default sweep's
    Case(BUNDLED, "transform", "fp32", 64, 16),
    Case(VIT, "transform", "fp32", 16, 8),
    Case(VIT, "last:4", "bf16", 16, 4),
    Case(VIT, "image", "bf16", 16, 4),
    Case(VIT, "image", "bf16", 64, 2),
)
SMOKE_CASES = (Case(BUNDLED, "last:1", "auto", 8, 2), Case(TINY, "transform", "fp32", 2, 2))


class Both:
    """The loop and the bare steps of one case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._device = the_device()
        self._model = dataclasses.replace(random_model(case.model, folder), trainable=case.trainable)
        self._folder = prepared_folder(data_of(case.batch_size * case.steps), self._model, folder)
        self._config = TrainConfig(batch_size=case.batch_size, precision=case.precision)
        self._settings = TrialSettings(
            loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=2e-5, epochs=2, seed=0,
            orthogonality=0.1 if case.trainable == "transform" else None,
        )  # fmt: skip
        self._clip, _, self._frozen = opened(self._folder, self._model)
        self.waiting: list[list[float]] = []  # shares of each epoch, cold and warm

    def loop(self) -> float:
        """Seconds of the second epoch of ``fit``, evaluation apart."""
        evict(self._folder)
        reports: list[dict[str, Any]] = []
        fit(
            policy_of(self._clip, self._model.trainable), open_prepared(self._folder), self._frozen,
            self._settings, self._config, report=reports.append, checkpoints=NoCheckpoints(),
            device=self._device,
        )  # fmt: skip
        first, second = (r["metrics"]["train_s"] for r in reports)
        cold, warm = (r["metrics"]["data_s"] for r in reports)
        self.waiting.append([cold / first, warm / second])
        return second

    def bare(self, *, averaged: bool = False) -> float:
        """Seconds of the second epoch of bare steps, also averaging the weights after each if asked to."""
        prepared, seed = open_prepared(self._folder), self._settings.seed
        pairs = Pairs.of(prepared, self._frozen)
        epochs = [
            list(epoch_batches(pairs, self._config.batch_size, seed, epoch, 0, 1, self._device))
            for epoch in range(2)
        ]
        text_CD = self._frozen.text_CD[list(pairs.captions)].to(self._device)
        del prepared, pairs  # a mapped file stays in the page cache
        policy = policy_of(self._clip, self._model.trainable).to(self._device).eval()
        return bare_epochs(
            policy, epochs, text_CD, self._frozen.logit_scale, self._settings, self._config, averaged=averaged
        )[1]


def bare_epochs(
    policy: Policy, epochs: list[list[Batch]], text_CD: Tensor, logit_scale: float, settings: TrialSettings,
    config: TrainConfig, *, averaged: bool,
) -> list[float]:  # fmt: skip
    """Seconds of each epoch of forward, loss, backward and optimizer step, and of averaging if asked to."""
    device = the_device()
    cast = autocast(resolved_precision(config.precision, device), device)
    optimizer = _optimizer(policy, settings, config)  # the loop's, or its choice would be measured too
    weights = policy.trainable_weights()
    average = BetaAverage(weights, sum(map(len, epochs)), config.average_beta)
    seconds = []
    for batches in epochs:
        synchronize(device)
        began = time.perf_counter()
        for batch in batches:
            optimizer.zero_grad()
            with cast():
                image_BD, policy_text_CD = policy(batch.inputs, text_CD)
            loss = preference_step(
                image_BD, policy_text_CD, batch, logit_scale,
                loss=settings.loss, beta=settings.beta or 1.0, kl_weight=settings.kl_weight,
            ).total  # fmt: skip
            if settings.orthogonality:
                loss = loss + settings.orthogonality * policy.penalty()
            loss.backward()
            optimizer.step()
            if averaged:
                average.update(weights)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def evict(folder: Path) -> None:
    """Drops the files of a folder from the page cache, where the system can; they must not be mapped."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(*, rounds: int = 5, threads: int = 2, smoke: bool = False, results: Path = RESULTS) -> None:
    """Times the loop beside bare steps.

    Args:
        rounds: times that both are measured, in turn [count].
        threads: threads of torch, the same for both [count].
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    cases, rounds, threads = (SMOKE_CASES, 2, 1) if smoke else (CASES, rounds, threads)
    console, load_before = the_console(), load()
    torch.set_num_threads(threads)
    overheads, waits, seconds = [], [], {}
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as temporary:
        for case in cases:
            console.print(f"{case}", highlight=False)
            both = Both(case, Path(temporary))
            both.bare()  # the first run pays for memory and for kernels that are chosen
            averaged = partial(both.bare, averaged=True)
            times = alternate({"loop": both.loop, "bare": both.bare, "averaged": averaged}, rounds, console)
            seconds[str(case)] = times | {"waiting": [list(w) for w in both.waiting]}
            ratio = Spread.of(ratios(times["loop"], times["bare"]))
            overheads.append(Line(f"loop / bare: {case}", ratio, "x", OVERHEAD_GOAL, at_least=False))
            ratio = Spread.of(ratios(times["loop"], times["averaged"]))
            overheads.append(Line(f"loop / bare with averaging: {case}", ratio, "x"))
            for kind, share in zip(("cold", "warm"), zip(*both.waiting, strict=True), strict=True):
                waits.append(
                    Line(f"waiting, {kind}: {case}", Spread.of(share), "share", WAITING_GOAL, at_least=False)
                )
    finish(
        "loop", overheads + waits, results_folder(results, smoke), console,
        settings={"rounds": rounds, "threads": threads, "cases": [str(c) for c in cases]},
        load_before=load_before, seconds=seconds,
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
