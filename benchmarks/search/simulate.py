"""A sweep on the table: W workers, a simulated clock of epochs, and what the sweep has found after each.

Shapes: L losses, B, K, R levels of beta, KL weight and learning rate, S seeds, E epochs, 2 objectives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.search.table import TABLE
from clippo.config import DataConfig
from clippo.evaluate.objectives import Counts
from clippo.front import hypervolume, pareto_mask
from clippo.tasks import TypographicTask

Floats = NDArray[np.float64]
WORKERS = 4
LEAST_RETENTION = 0.9
OBJECTIVES = TypographicTask.objectives(DataConfig())


@dataclass(frozen=True)
class Tabular:
    """The table as arrays of robustness and retention.

    Attributes:
        levels: of each loss's beta, of the KL weight and of the learning rate.
        validation: after every epoch (L, B, K, R, S, E, 2); ``test``: after the last (L, B, K, R, S, 2).
        untouched: robustness of the model before any training, on validation and on test pictures.
    """

    losses: tuple[str, ...]
    betas: Mapping[str, Floats]
    kl_weights: Floats
    learning_rates: Floats
    validation: Floats
    test: Floats
    untouched: tuple[float, float]

    @classmethod
    def load(cls, path: Path = TABLE) -> Tabular:
        """Reads the table."""
        rows = pq.read_table(path).to_pylist()
        before = [_counts(r) for r in rows if r["epoch"] == 0]
        rows = [r for r in rows if r["epoch"] > 0]
        counts: dict[tuple[Any, ...], list[Counts]] = {}
        for r in rows:
            key = (r["loss"], r["beta"], r["kl_weight"], r["learning_rate"], r["seed"], r["epoch"])
            counts.setdefault(key, []).append(_counts(r))
        losses = tuple(sorted({r["loss"] for r in rows}))
        betas = {loss: np.unique([r["beta"] for r in rows if r["loss"] == loss]) for loss in losses}
        kls, rates = (np.unique([r[name] for r in rows]) for name in ("kl_weight", "learning_rate"))
        seeds, epochs = (1 + max(r["seed"] for r in rows)), max(r["epoch"] for r in rows)
        shape = (len(losses), len(betas[losses[0]]), len(kls), len(rates), seeds)
        validation, test = np.full((*shape, epochs, 2), np.nan), np.full((*shape, 2), np.nan)

        def reached(found: list[Counts], split: str) -> list[float]:
            return list(OBJECTIVES.values(found, before, split=split).values())

        for (loss, beta, kl, rate, seed, epoch), found in counts.items():
            where = (
                losses.index(loss), *(
                    int(np.searchsorted(axis, value))
                    for axis, value in ((betas[loss], beta), (kls, kl), (rates, rate))
                ), seed,
            )  # fmt: skip
            at_epoch = *where, epoch - 1
            validation[at_epoch] = reached(found, "validation")
            if epoch == epochs:
                test[where] = reached(found, "test")
        assert not np.isnan(validation).any(), "the table lacks runs"
        untouched = reached(before, "validation")[0], reached(before, "test")[0]
        return cls(losses, betas, kls, rates, validation, test, untouched)

    @property
    def seeds(self) -> int:
        return self.validation.shape[-3]

    @property
    def epochs(self) -> int:
        return self.validation.shape[-2]

    def nearest(self, settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
        """The place of the level that is nearest to each setting in log scale."""
        loss = settings["loss"]
        return (
            self.losses.index(loss),
            _nearest(self.betas[loss], settings["beta"]),
            _nearest(self.kl_weights, settings["kl_weight"]),
            _nearest(self.learning_rates, settings["learning_rate"]),
        )

    @cached_property
    def reference_points(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of the hypervolume, on validation and on test pictures: where a sweep starts, and what it may lose.

        Robustness of the untouched model, and a retention of 0.9: who wants a remedy wants neither less
        robustness nor a model that has lost a tenth of what it could do. Above (0, 0), the reference point
        of the project's fronts, one good trial makes 95 % of the volume, and all strategies look alike.
        """
        return (self.untouched[0], LEAST_RETENTION), (self.untouched[1], LEAST_RETENTION)

    @cached_property
    def best(self) -> tuple[float, float]:
        """Hypervolume of the whole table on validation pictures, and on test pictures of that same front."""
        last, test = self.validation[..., -1, :].reshape(-1, 2), self.test.reshape(-1, 2)
        on_validation, on_test = self.reference_points
        return hypervolume(last, on_validation), hypervolume(test[pareto_mask(last)], on_test)


def _counts(row: Mapping[str, Any]) -> Counts:
    names = ("eval_set", "n_correct", "n_total", "n_fooled")
    return Counts(variant="averaged", **{name: row[name] for name in names})


def _nearest(levels: Floats, value: float) -> int:
    return int(np.abs(np.log(levels) - np.log(value)).argmin())


class Strategy(Protocol):
    """What proposes settings and may stop trials; trials are numbered in the order of their start."""

    def suggest(self, number: int) -> Mapping[str, Any]:
        """``loss``, ``beta``, ``kl_weight`` and ``learning_rate`` of a new trial."""
        ...

    def report(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        """Takes the objectives after an epoch; whether the trial is to be stopped."""
        ...

    def end(self, number: int, epoch: int, values: Sequence[float], stopped: bool) -> None:
        """Takes the last objectives of a trial."""
        ...


@dataclass
class Sweep:
    """What a sweep has found, trial by trial in the order in which they ended.

    Attributes:
        spent: epochs that all trials together had taken by then.
        epochs: epochs of the trial itself; fewer than the table's if it was stopped.
        validation, test: its objectives at its end; those on test pictures only if it was not stopped.
    """

    spent: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    validation: list[Floats] = field(default_factory=list)
    test: list[Floats] = field(default_factory=list)

    def curve(self, table: Tabular, budget: int, *, split: str) -> Floats:
        """Share of the table's best hypervolume after 0, 1, ... ``budget`` epochs: (budget + 1,).

        ``test`` is that of the points which validation pictures put on the front, without trials that were
        stopped.
        """
        at = ("validation", "test").index(split)
        reference, best = table.reference_points[at], table.best[at]
        curve = np.zeros(budget + 1)
        known: list[int] = []
        for i, spent in enumerate(self.spent):
            if split == "test" and self.epochs[i] < table.epochs:
                continue
            known.append(i)
            points = np.array([self.validation[k] for k in known])
            front = [k for k, on in zip(known, pareto_mask(points), strict=True) if on]
            known = front
            values = self.validation if split == "validation" else self.test
            curve[spent:] = hypervolume([values[k] for k in front], reference) / best
        return curve


@dataclass
class _Running:
    number: int
    curve: Floats
    test: Floats
    epoch: int = 0


def simulate(
    table: Tabular, strategy: Strategy, budget: int, seed: int, workers: int = WORKERS
) -> Sweep:  # fmt: skip
    """Runs a sweep until its trials have taken ``budget`` epochs; what runs then is not counted.

    Settings that are proposed again come with the table's other seed, and after that with the same ones.
    Which comes first is drawn from ``seed``.
    """
    rng, proposed = np.random.default_rng(seed), Counter[tuple[int, ...]]()
    first = rng.integers(table.seeds, size=table.validation.shape[:4])
    sweep, spent, started = Sweep(), 0, 0

    def start() -> _Running:
        nonlocal started
        where = table.nearest(strategy.suggest(started))
        which = (first[where] + proposed[where]) % table.seeds
        proposed[where] += 1
        started += 1
        run = *where, which
        return _Running(started - 1, table.validation[run], table.test[run])

    running = [start() for _ in range(workers)]
    while True:
        for w, trial in enumerate(running):
            if spent == budget:
                return sweep
            spent += 1
            values = trial.curve[trial.epoch]
            trial.epoch += 1
            whole = trial.epoch == table.epochs
            stop = strategy.report(trial.number, trial.epoch, values.tolist()) and not whole
            if not stop and not whole:
                continue
            strategy.end(trial.number, trial.epoch, values.tolist(), stop)
            sweep.spent.append(spent)
            sweep.epochs.append(trial.epoch)
            sweep.validation.append(values)
            sweep.test.append(trial.test)
            running[w] = start()
