"""Operating points: what each trial offers, from the rows of a sweep.

A trial offers one point for each variant of its weights; the untouched model is a point of its own. Points
are compared on validation pictures, which the search saw; the test numbers beside them are for the report.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clippo.errors import StoreError
from clippo.evaluate import Counts, objectives
from clippo.front.hypervolume import hypervolume
from clippo.front.pareto import pareto_mask
from clippo.front.uncertainty import accuracy_draws, draws_interval, front_probability, retention_draws
from clippo.results import ResultStore

REFERENCE = "reference"
HV_REFERENCE_POINT = (0.0, 0.0)
DRAWS, CONFIDENCE = 1000, 0.9


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model that could be shipped.

    Attributes:
        robustness, retention: on validation pictures; ``*_interval`` is the 90 % interval from the counts.
        probability: that the point is on the front, given the noise of the counts.
        test: the same on test pictures, with the attack success rate and the accuracy of each kind of set.
    """

    trial_id: str
    variant: str
    settings: dict[str, Any]
    robustness: float
    robustness_interval: tuple[float, float]
    retention: float
    retention_interval: tuple[float, float]
    on_front: bool
    probability: float
    test: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Front:
    """The points of a sweep, the untouched model first, then by retention.

    Attributes:
        hypervolume: as measured, above (0, 0); optimistic, since a front picks the best of noisy points.
        hypervolume_interval: of what endless pictures would give; it may lie below the measured value.
    """

    sweep: str
    points: list[Point]
    hypervolume: float
    hypervolume_interval: tuple[float, float]
    completed: int
    failed: int

    @property
    def front(self) -> list[Point]:
        return [p for p in self.points if p.on_front]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the untouched model as ``reference``, and the points on the front."""
        reference = next(p for p in self.points if p.trial_id == REFERENCE)
        return {**vars(self), "reference": vars(reference), "points": [vars(p) for p in self.front]}


def front_of(store: ResultStore, sweep: str) -> Front:
    """The front of what is in the store, also while the sweep still runs.

    Raises:
        StoreError: no such sweep, or nothing measured yet.
    """
    config = store.config(sweep)
    if config is None:
        known = ", ".join(store.sweeps()) or "none"
        raise StoreError(f"{store.uri} has no sweep {sweep!r}; its sweeps are: {known}")
    return read_front(
        sweep, store.trials(sweep), store.evals(sweep),
        robustness_sets=config["robustness_sets"], retention_sets=config["retention_sets"],
    )  # fmt: skip


def read_front(
    sweep: str,
    trials: pa.Table,
    evals: pa.Table,
    *,
    robustness_sets: Sequence[str],
    retention_sets: Sequence[str],
) -> Front:
    """The front of one sweep, from its rows; also while the sweep still runs.

    Raises:
        StoreError: the untouched model has not been measured yet.
    """
    rows = {r["trial_id"]: r for r in trials.to_pylist()}
    counts: dict[tuple[str, str], list[Counts]] = defaultdict(list)
    last_epoch: dict[str, int] = {}
    # A trial may have ended since the trials were read.
    evaluations = [e for e in evals.to_pylist() if rows.get(e["trial_id"], {}).get("attempt") == e["attempt"]]
    for row in evaluations:
        last_epoch[row["trial_id"]] = max(row["epoch"], last_epoch.get(row["trial_id"], 0))
    for row in evaluations:
        complete = rows[row["trial_id"]]["status"] == "completed"
        if complete and row["epoch"] == last_epoch[row["trial_id"]]:
            fields = {f: row[f] for f in ("eval_set", "variant", "n_correct", "n_total", "n_fooled")}
            counts[row["trial_id"], row["variant"]].append(Counts(**fields))
    if (REFERENCE, REFERENCE) not in counts:
        raise StoreError(
            f"sweep {sweep!r} has no measurement of the untouched model yet; wait for it or rerun it"
        )
    reference = counts[REFERENCE, REFERENCE]

    def measured(variant: list[Counts], split: str) -> dict[str, float]:
        return objectives(
            variant, reference, split=split, robustness_sets=robustness_sets, retention_sets=retention_sets
        )

    keys = list(counts)
    values = np.array(
        [[measured(counts[k], "validation")[o] for o in ("robustness", "retention")] for k in keys]
    )
    mask = pareto_mask(values)
    draws = _draws([counts[k] for k in keys], reference, robustness_sets, retention_sets)
    draws[:, keys.index((REFERENCE, REFERENCE)), 1] = 1  # it keeps all that it has, whatever that is
    probability = front_probability(draws)
    low, high = draws_interval(draws, CONFIDENCE)
    points = [
        Point(
            trial_id=trial_id,
            variant=variant,
            settings=_settings(rows[trial_id]),
            robustness=float(values[i, 0]),
            robustness_interval=(float(low[i, 0]), float(high[i, 0])),
            retention=float(values[i, 1]),
            retention_interval=(float(low[i, 1]), float(high[i, 1])),
            on_front=bool(mask[i]),
            probability=float(probability[i]),
            test=_test_numbers(counts[trial_id, variant]) | measured(counts[trial_id, variant], "test"),
        )
        for i, (trial_id, variant) in enumerate(keys)
    ]
    points.sort(key=lambda p: (p.trial_id != REFERENCE, -p.retention, -p.robustness))
    measured_hv = hypervolume(values, HV_REFERENCE_POINT)
    drawn = [hypervolume(d, HV_REFERENCE_POINT) for d in draws[:: DRAWS // 200]]
    # The best of noisy points is too good, in the data as in every draw from it; the pivotal interval
    # (Davison and Hinkley, Bootstrap Methods, 1997, section 5.2) takes that off again.
    drawn_low, drawn_high = draws_interval(drawn, CONFIDENCE)
    hv_low, hv_high = 2 * measured_hv - drawn_high, 2 * measured_hv - drawn_low
    return Front(
        sweep=sweep,
        points=points,
        hypervolume=measured_hv,
        hypervolume_interval=(float(hv_low), float(hv_high)),
        completed=sum(r["status"] == "completed" and r["trial_id"] != REFERENCE for r in rows.values()),
        failed=sum(r["status"] == "failed" for r in rows.values()),
    )


def describe(settings: Mapping[str, Any]) -> str:
    """Settings in a few words.

    >>> describe({"loss": "dpo", "beta": 0.5, "kl_weight": 1.0, "learning_rate": 2e-4, "epochs": 2})
    'dpo beta 0.5 x2 kl 1 lr 2e-4'
    """
    beta = "" if settings.get("beta") is None else f" beta {settings['beta']:.2g}"
    exponent = math.floor(math.log10(settings["learning_rate"]))
    rate = f"{settings['learning_rate'] / 10**exponent:.2g}e{exponent}"
    return f"{settings['loss']}{beta} x{settings['epochs']} kl {settings['kl_weight']:.2g} lr {rate}"


def _draws(
    variants: list[list[Counts]],
    reference: list[Counts],
    robustness_sets: Sequence[str],
    retention_sets: Sequence[str],
) -> np.ndarray:
    """Draws of (robustness, retention) of every point: (R, P, 2)."""
    rng = np.random.default_rng(0)

    def table(counts: list[Counts], sets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        by_name = {c.eval_set: c for c in counts}
        chosen = [by_name[f"validation/{s}"] for s in sets]
        return np.array([c.n_correct for c in chosen]), np.array([c.n_total for c in chosen])

    attacked = [table(v, robustness_sets) for v in variants]
    kept = [table(v, retention_sets) for v in variants]
    robustness = accuracy_draws(
        [c.sum() for c, _ in attacked], [n.sum() for _, n in attacked], draws=DRAWS, rng=rng
    )
    retention = retention_draws(
        np.stack([c for c, _ in kept]), np.stack([n for _, n in kept]), *table(reference, retention_sets),
        draws=DRAWS, rng=rng,
    )  # fmt: skip
    return np.stack([robustness, retention], axis=-1)


def _test_numbers(counts: list[Counts]) -> dict[str, float]:
    """Accuracy of each kind of test set, seen and held-out together, and the attack success rate."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for c in counts:
        split, kind, *_ = c.eval_set.split("/")
        if split == "test":
            sums[kind] = [
                a + b for a, b in zip(sums[kind], (c.n_correct, c.n_total, c.n_fooled), strict=True)
            ]
    numbers = {f"{kind}_accuracy": correct / total for kind, (correct, total, _) in sums.items()}
    if "attacked" in sums:
        numbers["attack_success_rate"] = sums["attacked"][2] / sums["attacked"][1]
    return numbers


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    names = ("loss", "beta", "kl_weight", "learning_rate", "epochs", "seed")
    return {n: row[n] for n in names if row[n] is not None} | json.loads(row["params_json"] or "{}")
