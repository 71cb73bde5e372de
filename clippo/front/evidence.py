"""What counts and rankings say about the objectives of all points: intervals, draws, hypervolumes.

All is in gains, the scale on which more is better in both objectives (`Goal.gain`). Only points that may be
on some front are drawn; all others are dominated beyond doubt.

Shapes: P points, C of them near a front, S evaluation sets, M objectives, R draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clippo.front.hypervolume import hypervolume
from clippo.front.pareto import best_of, pareto_mask
from clippo.front.split import SplitCounts
from clippo.front.uncertainty import (
    CONFIDENCE,
    Array,
    cross_hypervolumes,
    deviate,
    front_probability,
    hypervolume_interval,
    widened,
)

HV_REFERENCE_POINT = (0.0, 0.0)
DEVIATE = deviate(CONFIDENCE)
BEYOND_DOUBT = 6.0  # standard deviations off the front at which a point counts as dominated undrawn
MOST_DRAWN = 1000  # points of one front; of a large sweep only the closest, to stay quick
DRAWS, HV_DRAWS = 1000, 200
CHUNK = 250_000  # numbers drawn at once

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How the numbers of points may be off, and which of them are off together.

    Attributes:
        curve_P: points of one curve have the same number; their counts share noise.
        correlation: how much of it they share.
        sd_PM: standard deviation of the objectives between seeds, divided by the root of the seeds measured;
            all points of one training run (``owner_P``) share it.
        dof: degrees of freedom of that; 0: no setting was repeated.
    """

    curve_P: NDArray[np.int64]
    correlation: float
    owner_P: NDArray[np.int64]
    sd_PM: Array
    dof: int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Objectives of all points as measured, and draws of those that may matter.

    Attributes:
        near_C: their indices; the first is the untouched model.
        draws_RCM: draws from the noise as it is modelled: shared along a curve, otherwise independent.
        together_RCM: draws in which all points err alike, since they were measured on the same pictures.
        halves: two independent measurements of half the information each, and the second once more
            (`cross_hypervolumes`).
    """

    measured_PM: Array
    low_PM: Array
    high_PM: Array
    near_C: NDArray[np.int64]
    draws_RCM: Array
    together_RCM: Array
    halves: tuple[Array, Array, Array]

    @staticmethod
    def of(split: SplitCounts, noise: Noise, families: Sequence[Mask]) -> Evidence:
        """Evidence from the counts of one split.

        Args:
            families: masks (P,) of points whose own fronts are of interest; each gets its points drawn.
        """
        measured = split.objectives()
        low, high = interval_of(split, noise)
        sd = np.maximum((high - low) / (2 * DEVIATE), 1e-9)
        near = np.zeros(len(measured), dtype=np.bool_)
        for family in families:
            members = np.flatnonzero(family)
            off_M = distances(measured[members]) / sd[members]
            off, other = off_M.min(axis=1), off_M.max(axis=1)
            closest = np.lexsort((other, off))[:MOST_DRAWN]
            near[members[closest[off[closest] < BEYOND_DOUBT]]] = True
            near[members[pareto_mask(measured[members])]] = True  # of equal points more than MOST_DRAWN
        near[0] = True
        near_C = np.flatnonzero(near)

        rng = np.random.default_rng(0)
        few = split[near_C]
        ranked = few.noise(DRAWS)
        drawn = [
            np.clip(few.objectives(z, _some(ranked, rows)) + seed, 0, 1)
            for z, seed, rows in _deviates(noise, near_C, few.correct_PS.shape[1], DRAWS, rng)
        ]
        together = rng.normal(size=(HV_DRAWS, 1, split.correct_PS.shape[1]))
        return Evidence(
            measured_PM=measured,
            low_PM=low,
            high_PM=high,
            near_C=near_C,
            draws_RCM=np.concatenate(drawn),
            together_RCM=np.concatenate(
                [few.objectives(z[None], _some(ranked, slice(i, i + 1))) for i, z in enumerate(together)]
            ),
            halves=_halves(few, ranked, noise, near_C, HV_DRAWS // 2, rng),
        )

    def probability(self) -> Array:
        """Each point's probability of being on the front: (P,)."""
        found = np.zeros(len(self.measured_PM))
        found[self.near_C] = front_probability(self.draws_RCM)
        return found

    def chance(self, min_retention: float) -> Array:
        """The chance that a point retains that much: (P,), NaN for points that were not drawn.

        It is that of each point by itself. Who picks one because of it must expect less, since the best of
        many are partly lucky.
        """
        found = np.full(len(self.measured_PM), np.nan)
        found[self.near_C] = (self.draws_RCM[..., 1] >= min_retention).mean(axis=0)
        return found

    def alike(self, point: int, among: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Those of ``among`` (default: all drawn) that cannot be told from ``point``.

        Neither objective differs with 95 % certainty.
        """
        among = self.near_C if among is None else among
        own, others = np.searchsorted(self.near_C, point), np.searchsorted(self.near_C, among)
        mine, theirs = self.draws_RCM[:, own, None], self.draws_RCM[:, others]
        certainty = np.maximum((theirs > mine).mean(axis=0), (theirs < mine).mean(axis=0)).max(axis=1)
        return among[(certainty < 0.95) & (among != point)]

    def volumes(self, family: Mask) -> Volumes:
        """The hypervolume of some points, as measured and in draws."""
        members = family[self.near_C]
        separate, together = (
            np.array([hypervolume(points_CM, HV_REFERENCE_POINT) for points_CM in draws[:, members]])
            for draws in (self.draws_RCM[: len(self.together_RCM)], self.together_RCM)
        )
        choose, measure, again = (half[:, members] for half in self.halves)
        return Volumes(
            measured=hypervolume(self.measured_PM[family], HV_REFERENCE_POINT),
            crossed=float(cross_hypervolumes(choose, measure, again, HV_REFERENCE_POINT).mean()),
            separate_R=separate,
            together_R=together,
        )


@dataclass(frozen=True, kw_only=True)
class Volumes:
    """The hypervolume of some points.

    Attributes:
        measured: too large if anything, since a front picks the best of noisy points.
        crossed: too small if anything, `cross_hypervolumes`.
        separate_R, together_R: in draws in which points err on their own, and all alike.
    """

    measured: float
    crossed: float
    separate_R: Array
    together_R: Array

    @property
    def interval(self) -> tuple[float, float]:
        """Of what endless pictures would give."""
        lowest = min(self.measured, self.crossed)
        return hypervolume_interval(lowest, self.measured, (self.separate_R, self.together_R))

    def above(self, part: Volumes) -> tuple[float, tuple[float, float]]:
        """How much larger it is than that of a part of its points, and the interval of that."""
        value = self.measured - part.measured
        draws = self.separate_R - part.separate_R, self.together_R - part.together_R
        lowest, highest = self.crossed - part.measured, self.measured - part.crossed
        return value, hypervolume_interval(min(value, lowest), max(value, highest), draws)


def interval_of(split: SplitCounts, noise: Noise, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """The limits of the gains, (P, M) each, from counts, rankings and the spread of the seeds."""
    limits = [
        widened(value_P, interval, sd_P, noise.dof, confidence)
        for value_P, interval, sd_P in zip(
            split.objectives().T, split.intervals(confidence), noise.sd_PM.T, strict=True
        )
    ]
    return np.stack([low for low, _ in limits], axis=1), np.stack([high for _, high in limits], axis=1)


def distances(measured_PM: Array) -> Array:
    """How far each point is off the front, in either objective: (P, M)."""
    front_PM, off = measured_PM[pareto_mask(measured_PM)], np.empty_like(measured_PM)
    for m in (0, 1):
        other = 1 - m
        off[:, m] = best_of(front_PM[:, [other, m]], measured_PM[:, other]) - measured_PM[:, m]
    return off


def _deviates(
    noise: Noise, near_C: NDArray[np.int64], sets: int, draws: int, rng: np.random.Generator
) -> Iterator[tuple[Array, Array, slice]]:
    """Normal deviates of the counts (R, C, S), what seeds add to the objectives (R, C, M), and which draws
    these are, in portions.
    """
    start = 0
    _, curve_C = np.unique(noise.curve_P[near_C], return_inverse=True)
    _, run_C = np.unique(noise.owner_P[near_C], return_inverse=True)
    for size in _chunks(draws, len(near_C) * sets):
        shared = rng.standard_normal((size, curve_C.max() + 1, sets))
        z = rng.standard_normal((size, len(near_C), sets))
        z *= np.sqrt(1 - noise.correlation)
        shared *= np.sqrt(noise.correlation)
        z += shared[:, curve_C]
        seed = np.zeros((1, 1, 1))
        if noise.dof:
            # With few degrees of freedom the spread itself is not known well: Student's t.
            scale = np.sqrt(noise.dof / rng.chisquare(noise.dof, size=(size, 1, 1)))
            seed = scale * noise.sd_PM[near_C] * rng.normal(size=(size, run_C.max() + 1, 2))[:, run_C]
        yield z, seed, slice(start, start + size)
        start += size


def _halves(
    split: SplitCounts, ranked: Array | None, noise: Noise, near_C: NDArray[np.int64], draws: int,
    rng: np.random.Generator,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """What `cross_hypervolumes` takes: a measurement to choose on, one to measure on, and that once more."""
    portions = []
    for (z, seed, rows), (more, more_seed, _) in zip(
        _deviates(noise, near_C, split.correct_PS.shape[1], draws, rng),
        _deviates(noise, near_C, split.correct_PS.shape[1], draws, rng),
        strict=True,
    ):
        off = again = minus = None
        if ranked is not None:
            off = ranked[rows]
            minus, again = -off, -off + np.sqrt(2) * ranked[rows.start + draws : rows.stop + draws]
        portions.append(
            (
                np.clip(split.objectives(z, off) + seed, 0, 1),
                np.clip(split.objectives(-z, minus) - seed, 0, 1),
                np.clip(
                    split.objectives(-z + np.sqrt(2) * more, again) - seed + np.sqrt(2) * more_seed, 0, 1
                ),
            )
        )
    choose, measure, again = (np.concatenate(parts) for parts in zip(*portions, strict=True))
    return choose, measure, again


def _some(ranked: Array | None, rows: slice) -> Array | None:
    """Some draws of what rankings are off."""
    return None if ranked is None else ranked[rows]


def _chunks(draws: int, numbers: int) -> list[int]:
    """Draws in portions, each of bounded memory."""
    size = max(1, CHUNK // numbers)
    return [size] * (draws // size) + ([draws % size] if draws % size else [])
