"""What the loop adds to bare steps, and how long it waits for the prepared set.

Bare is forward, loss, backward and optimizer step over the same tensors, which lie in memory. The loop
(``fit``) also fetches its batches from the prepared set, averages the weights, checks the loss and keeps
the time. Averaging is part of the method, and goes over all weights once more in every step; so bare steps
with it are timed, too, and what the loop adds to those is its own. After each epoch of the loop come one of
bare steps and one of them with averaging, in the same process, so that a machine that becomes slower does so
for all; the first epochs are not compared. Waiting is measured in these epochs (warm), and in first epochs
that read the prepared set from the disk (cold), since its files are dropped from the page cache before.
Embeddings, which a trained transform takes, are in memory before the first step, and are never cold.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import (
    BUNDLED,
    RESULTS,
    TINY,
    Line,
    NoCheckpoints,
    Precision,
    Spread,
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
from clippo.model import BetaAverage, policy_of
from clippo.prepared import open_prepared
from clippo.train import TrialSettings, fit
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.step import _optimizer, autocast, preference_step, resolved_precision

OVERHEAD_GOAL, WAITING_GOAL = 1.05, 0.05
VIT = "ViT-B-32"


@dataclass(frozen=True)
class Case:
    """A model, a cut, how many steps an epoch has; ``times`` as many of its epochs are compared."""

    model: str
    trainable: str
    precision: Precision
    batch_size: int
    steps: int
    times: int = 1

    def __str__(self) -> str:
        return f"{self.model} {self.trainable} {self.precision}, {self.batch_size} pairs, {self.steps} steps"


CASES = (
    Case(BUNDLED, "last:2", "auto", 64, 8, times=5),  # the default sweep's
    Case(BUNDLED, "transform", "fp32", 64, 64, times=5),
    Case(VIT, "transform", "fp32", 16, 64, times=5),
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
        self._clip, _, self._frozen = opened(self._folder, self._model)

    def seconds(self, rounds: int, console: Console) -> tuple[dict[str, list[float]], list[float]]:
        """Seconds of an epoch of each, and the share of the loop's that it waited, round by round."""
        bare, averaged = self._bare(rounds + 1), self._bare(rounds + 1, averaged=True)
        seconds: dict[str, list[float]] = {"loop": [], "bare": [], "averaged": []}
        waiting = []

        def compare(report: dict[str, Any]) -> None:
            epoch_s = report["metrics"]["train_s"]
            for name, measured in zip(seconds, (epoch_s, next(bare), next(averaged)), strict=True):
                seconds[name].append(measured)
            waiting.append(report["metrics"]["data_s"] / epoch_s)
            latest = ", ".join(f"{name} {measured[-1]:.4g} s" for name, measured in seconds.items())
            console.print(f"round {len(waiting) - 1}/{rounds}  {latest}", highlight=False)

        self._fit(rounds + 1, compare)
        return {name: measured[1:] for name, measured in seconds.items()}, waiting[1:]

    def cold_waiting(self, rounds: int) -> list[float]:
        """The share of a first epoch that the loop waited for what it reads from the disk, if it does."""
        if open_prepared(self._folder).train_inputs.in_memory:
            return []
        shares: list[float] = []
        for _ in range(rounds):
            evict(self._folder)
            self._fit(1, lambda r: shares.append(r["metrics"]["data_s"] / r["metrics"]["train_s"]))
        return shares

    def _fit(self, epochs: int, report: Callable[[dict[str, Any]], None]) -> None:
        fit(
            policy_of(self._clip, self._model.trainable), open_prepared(self._folder), self._frozen,
            self._settings(epochs), self._config, report=report, checkpoints=NoCheckpoints(),
            device=self._device,
        )  # fmt: skip

    def _settings(self, epochs: int) -> TrialSettings:
        return TrialSettings(
            loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=2e-5, epochs=epochs, seed=0,
            orthogonality=0.1 if self._model.trainable == "transform" else None,
        )  # fmt: skip

    def _bare(self, epochs: int, *, averaged: bool = False) -> Iterator[float]:
        """Seconds of each epoch of bare steps, when asked for."""
        settings = self._settings(epochs)
        pairs = Pairs.of(open_prepared(self._folder), self._frozen)
        text_CD = self._frozen.text_CD[list(pairs.captions)].to(self._device)
        policy = policy_of(self._clip, self._model.trainable).to(self._device).eval()
        cast = autocast(resolved_precision(self._config.precision, self._device), self._device)
        optimizer = _optimizer(policy, settings, self._config)  # the loop's, or its choice would be measured
        weights = policy.trainable_weights()
        steps = math.ceil(len(pairs) / self._config.batch_size)
        average = BetaAverage(weights, epochs * steps, self._config.average_beta)
        for epoch in range(epochs):
            batches = list(
                epoch_batches(pairs, self._config.batch_size, settings.seed, epoch, 0, 1, self._device)
            )
            synchronize(self._device)
            began = time.perf_counter()
            for batch in batches:
                optimizer.zero_grad()
                with cast():
                    image_BD, policy_text_CD = policy(batch.inputs, text_CD)
                loss = preference_step(
                    image_BD, policy_text_CD, batch, self._frozen.logit_scale,
                    loss=settings.loss, beta=settings.beta or 1.0, kl_weight=settings.kl_weight,
                ).total  # fmt: skip
                if settings.orthogonality:
                    loss = loss + settings.orthogonality * policy.penalty()
                loss.backward()
                optimizer.step()
                if averaged:
                    average.update(weights)
            synchronize(self._device)
            yield time.perf_counter() - began


def evict(folder: Path) -> None:
    """Drops the files of a folder from the page cache, where the system can; they must not be mapped."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(*, rounds: int = 9, threads: int = 2, smoke: bool = False, results: Path = RESULTS) -> None:
    """Times the loop beside bare steps.

    Args:
        rounds: epochs of each that are compared, five times as many of short ones [count].
        threads: threads of torch, the same for both [count].
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    cases, rounds, threads = (SMOKE_CASES, 2, 1) if smoke else (CASES, rounds, threads)
    console, load_before = the_console(), load()
    torch.set_num_threads(threads)
    overheads, waits, measured = [], [], {}
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as temporary:
        for case in cases:
            console.print(f"{case}", highlight=False)
            both = Both(case, Path(temporary))
            times, warm = both.seconds(rounds * case.times, console)
            cold = both.cold_waiting(rounds)
            measured[str(case)] = times | {"warm": warm, "cold": cold}
            ratio = Spread.of(ratios(times["loop"], times["bare"]))
            overheads.append(Line(f"loop / bare: {case}", ratio, "x", OVERHEAD_GOAL, at_least=False))
            ratio = Spread.of(ratios(times["loop"], times["averaged"]))
            overheads.append(Line(f"loop / bare with averaging: {case}", ratio, "x"))
            waits += [
                Line(f"waiting, {kind}: {case}", Spread.of(share), "share", WAITING_GOAL, at_least=False)
                for kind, share in (("cold", cold), ("warm", warm)) if share
            ]  # fmt: skip
    finish(
        "loop", overheads + waits, results_folder(results, smoke), console,
        settings={"rounds": rounds, "threads": threads, "cases": [str(c) for c in cases]},
        load_before=load_before, measured=measured,
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
