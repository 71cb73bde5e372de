"""What the objectives of one split are made of: counts and rankings of all points, their values and noise.

Shapes: P points, S evaluation sets, M objectives, L rankings, R draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clippo.errors import ConfigError
from clippo.evaluate.objectives import Goal, Objectives
from clippo.evaluate.rankings import DIGITS, RankingTable, resamples
from clippo.front.uncertainty import (
    CONFIDENCE,
    Array,
    Interval,
    accuracy_at,
    retention_interval,
    wilson_interval,
)

SPREAD_DRAWS, MOST_RESAMPLES = 200, 500  # more draws take them again, with other noise of the counts
MOST_SPREAD = 500  # points whose spread is drawn; that of others lies between those of similar ones


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Rankings of points, several of each; means are over those of a point, NaN where it has none.

    Attributes:
        table: the rankings; pictures of different sets have different numbers.
        point_L: the point of each.
        points: how many there are.
    """

    table: RankingTable
    point_L: NDArray[np.int64]
    points: int

    def __getitem__(self, points: NDArray[Any]) -> Ranked:
        """Only some of the points."""
        chosen, place_P = np.arange(self.points)[points], np.full(self.points, -1)
        place_P[chosen] = np.arange(len(chosen))
        kept = place_P[self.point_L] >= 0
        return Ranked(table=self.table[kept], point_L=place_P[self.point_L[kept]], points=len(chosen))

    def only(self, rankings: NDArray[np.bool_]) -> Ranked:
        """Only some of the rankings, of all points."""
        return replace(self, table=self.table[rankings], point_L=self.point_L[rankings])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rankings of each point, (P,)."""
        return np.bincount(self.point_L, minlength=self.points)

    def mean(self, values: Array) -> Array:
        """The means of values of the rankings (..., L) over each point's own: (..., P)."""
        flat = values.reshape(-1, len(self.point_L))
        sums = [np.bincount(self.point_L, weights=row_L, minlength=self.points) for row_L in flat]
        with np.errstate(invalid="ignore"):
            means: Array = np.array(sums) / np.where(self.sizes, self.sizes, np.nan)
        return means.reshape(*values.shape[:-1], self.points)

    def skews(self) -> Array:
        """The mean MaxSkew of each point, (P,)."""
        return np.round(self.mean(self.table.skews()), DIGITS)

    def noise(self, draws: int, seed: int = 0) -> Array:
        """How far off it may be: resamples of the pictures, the same for all points, (R, P), of mean 0."""
        if not len(self.table):
            return np.zeros((draws, self.points))
        taken = resamples(int(self.table.pictures_LM.max()) + 1, min(draws, MOST_RESAMPLES), seed)
        found = self.mean(self.table.skews(taken))
        return np.resize(found - found.mean(axis=0), (draws, self.points))

    def spread(self) -> Array:
        """The standard deviation of that, (P,)."""
        value_P = self.skews()
        order = np.argsort(value_P)[: int((~np.isnan(value_P)).sum())]
        some = order[np.unique(np.linspace(0, max(len(order) - 1, 0), MOST_SPREAD).astype(int))]
        some = np.sort(some) if len(order) > MOST_SPREAD else np.sort(order)
        sd = self[some].noise(SPREAD_DRAWS).std(axis=0)
        by_value = np.argsort(value_P[some])
        spread: Array = np.interp(value_P, value_P[some][by_value], sd[by_value]) if len(some) else value_P
        spread[some] = sd
        return spread

    def interval(self, value_P: Array, spread_P: Array, confidence: float) -> Interval:
        """``value +- z * spread``; quantiles of draws would lie too high (`bootstrap_interval`)."""
        half = NormalDist().inv_cdf((1 + confidence) / 2) * spread_P
        return value_P - half, value_P + half


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """What the objectives of one split are made of; the first point is untouched.

    Attributes:
        correct_PS, total_PS: counts, means over the seeds of a setting, so not always whole numbers.
        counted: that many of the sets make the goal; the others make retention. 0 where rankings make it.
        ranked: those rankings, of each set; the set with the largest mean is the goal.
    """

    correct_PS: Array
    total_PS: Array
    goal: Goal
    counted: int
    ranked: tuple[Ranked, ...] = ()

    def __getitem__(self, points: NDArray[Any]) -> SplitCounts:
        """Only some of the points, the untouched model always first among them."""
        return replace(
            self,
            correct_PS=self.correct_PS[points],
            total_PS=self.total_PS[points],
            ranked=tuple(r[points] for r in self.ranked),
        )

    def goals(self, deviate: Array | None = None, noise: Array | None = None) -> Array:
        """Values of the goal (..., P), as measured, at deviates (..., P, S), or with noise (..., P, S)."""
        if self.ranked:
            largest: Array = (self._skews() + (0 if noise is None else noise)).max(axis=-1)
            return largest
        weights = self.total_PS[:, : self.counted]
        right = self.correct_PS[:, : self.counted]  # not accuracy * weights, or equal sums would differ
        if deviate is not None:
            right = accuracy_at(right, weights, deviate[..., : self.counted]) * weights
        values: Array = right.sum(axis=-1) / weights.sum(axis=-1)
        return values

    def objectives(self, deviate: Array | None = None, noise: Array | None = None) -> Array:
        """Gain of the goal and retention (..., P, M), as measured or with noise.

        They are those of `clippo.evaluate.objectives`, for all points at once.

        Args:
            deviate: normal deviates of the counts, (..., P, S).
            noise: of a goal that follows from rankings, (..., P, S): `noise`.
        """
        correct, total = self.correct_PS[:, self.counted :], self.total_PS[:, self.counted :]
        if deviate is None:
            kept = correct / total
        else:
            kept = accuracy_at(correct, total, deviate[..., self.counted :])
        retention = np.minimum(kept / kept[..., :1, :], 1).mean(axis=-1)
        retention[..., 0] = 1  # it keeps all that it has, whatever that is
        gain = np.broadcast_to(self.goal.gain(self.goals(deviate, noise)), retention.shape)
        return np.stack((gain, retention), axis=-1)

    def noise(self, draws: int) -> Array | None:
        """Draws (R, P, S) of what rankings may be off; None where counts make the goal."""
        if not self.ranked:
            return None
        return np.stack([r.noise(draws, seed) for seed, r in enumerate(self.ranked)], axis=-1)

    def _skews(self) -> Array:
        """The mean MaxSkew on each ranked set, (P, S)."""
        return np.stack([r.skews() for r in self.ranked], axis=-1)

    def intervals(self, confidence: float = CONFIDENCE) -> tuple[Interval, Interval]:
        """The intervals of the goal's gain and of retention, from counts and rankings."""
        counted, kept = slice(self.counted), slice(self.counted, None)
        low, high = retention_interval(
            self.correct_PS[:, kept], self.total_PS[:, kept],
            self.correct_PS[:1, kept], self.total_PS[:1, kept], confidence,
        )  # fmt: skip
        low[0] = high[0] = 1
        if not self.ranked:
            correct, total = self.correct_PS[:, counted], self.total_PS[:, counted]
            ends = wilson_interval(correct.sum(axis=-1), total.sum(axis=-1), confidence)
        else:
            limits = np.array([r.interval(r.skews(), r.spread(), confidence) for r in self.ranked])
            largest_P = self._skews().argmax(axis=-1)
            ends = limits[largest_P, :, np.arange(len(largest_P))].T
        one, other = (self.goal.gain(end) for end in ends)
        return (np.minimum(one, other), np.maximum(one, other)), (low, high)


def split_of(
    counts: tuple[Array, ...], sets: list[str], name: str, objectives: Objectives, rankings: dict[str, Ranked]
) -> SplitCounts:
    """What the objectives of one split are made of, from correct, total and fooled pictures."""
    correct, total, fooled = counts
    goal = objectives.goal
    kept = [sets.index(f"{name}/{s}") for s in objectives.retention_sets]
    if goal.is_ranked:
        for s in goal.sets:
            if f"{name}/{s}" not in rankings or not rankings[f"{name}/{s}"].sizes[0]:
                raise ConfigError(f"no pictures of {name}/{s} are ranked; leave it out of goal_sets")
        found = tuple(rankings[f"{name}/{s}"] for s in goal.sets)
        return SplitCounts(
            correct_PS=correct[:, kept], total_PS=total[:, kept], goal=goal, counted=0, ranked=found
        )
    own = [sets.index(f"{name}/{s}") for s in goal.sets]
    counted = correct if goal.measure == "right" else fooled
    return SplitCounts(
        correct_PS=np.concatenate([counted[:, own], correct[:, kept]], axis=1),
        total_PS=total[:, [*own, *kept]],
        goal=goal,
        counted=len(own),
    )
