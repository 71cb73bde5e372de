"""Ranking bias from what is stored of a ranking: who came in which place, as far down as resamples reach.

Shapes: R draws, N pictures of a set, L rankings, M places of each, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clippo.evaluate.ranking_bias import checked_scores

DEPTH = 4
"""Places that are stored, as a multiple of k: resamples fill their top k from them."""

CHUNK = 1_000_000  # places that are resampled at once

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The first places of one query's ranking.

    Attributes:
        query: the caption that was asked for.
        k: the top that is looked at.
        pictures: indices in the set, best first, M of them.
        groups: their groups, indices of ``group_names``, M of them.
        pool: pictures of each group that were ranked, G of them.
        majority: the group whose share is shown; None where none is.
    """

    query: str
    k: int
    pictures: tuple[int, ...]
    groups: tuple[int, ...]
    group_names: tuple[str, ...]
    pool: tuple[int, ...]
    majority: int | None = None


def ranked(
    scores: ArrayLike, groups: ArrayLike, k: int, *, query: str, group_names: Sequence[str],
    majority: int | None = None,
) -> Ranking:  # fmt: skip
    """What is kept of a query's scores (N,) and the pictures' groups (N,), integers from 0.

    Args:
        majority: None or -1 where none is.

    Raises:
        ConfigError: for scores that are NaN or do not fit, or k out of 1..N.
    """
    groups_N = np.asarray(groups)
    scores_N = checked_scores(scores, groups_N, k)
    first = np.argsort(-scores_N, kind="stable")[: DEPTH * k]
    return Ranking(
        query=query,
        k=k,
        pictures=tuple(first.tolist()),
        groups=tuple(groups_N[first].tolist()),
        group_names=tuple(group_names),
        pool=tuple(np.bincount(groups_N, minlength=len(group_names)).tolist()),
        majority=None if majority == -1 else majority,
    )


@dataclass(frozen=True)
class RankingTable:
    """Rankings as arrays, padded to equal length; where one has ended the group is -1.

    Attributes:
        k_L: the top of each.
        groups_L: how many groups each has.
        majority_L: the group whose share is shown; -1 where none is.
    """

    pictures_LM: NDArray[np.int32]
    groups_LM: NDArray[np.int8]
    k_L: NDArray[np.int64]
    groups_L: NDArray[np.int64]
    majority_L: NDArray[np.int64]

    @classmethod
    def of(cls, rankings: Sequence[Ranking]) -> RankingTable:
        """The same rankings as a table."""
        places = max((len(r.pictures) for r in rankings), default=0)
        pictures = np.zeros((len(rankings), places), dtype=np.int32)
        groups = np.full((len(rankings), places), -1, dtype=np.int8)
        for i, ranking in enumerate(rankings):
            pictures[i, : len(ranking.pictures)], groups[i, : len(ranking.groups)] = (
                ranking.pictures, ranking.groups,
            )  # fmt: skip
        k, sizes = [r.k for r in rankings], [len(r.group_names) for r in rankings]
        majority = [-1 if r.majority is None else r.majority for r in rankings]
        return cls(pictures, groups, np.array(k), np.array(sizes), np.array(majority))

    def __len__(self) -> int:
        return len(self.k_L)

    def __getitem__(self, rankings: NDArray[np.generic]) -> RankingTable:
        """Only some of them."""
        return RankingTable(*(values[rankings] for values in vars(self).values()))

    def in_top(self, taken_RN: NDArray[np.integer] | None = None) -> NDArray[np.int64]:
        """Pictures of each group in the top k, (L, G), or in that of each resample, (R, L, G)."""
        groups = int(self.groups_L.max(initial=1))
        one_hot_LMG = self.groups_LM[..., None] == np.arange(groups, dtype=np.int8)
        if taken_RN is None:
            place_M = np.arange(self.groups_LM.shape[1])
            counted_LG: NDArray[np.int64] = (one_hot_LMG & (place_M < self.k_L[:, None])[..., None]).sum(1)
            return counted_LG
        counted_RLG = np.empty((len(taken_RN), len(self), groups), dtype=np.int64)
        for some, in_top_LMR in self._places(taken_RN):
            one_hot_LGM = one_hot_LMG[some].transpose(0, 2, 1).astype(np.float32)
            counted_RLG[:, some] = (one_hot_LGM @ in_top_LMR.astype(np.float32)).transpose(2, 0, 1)
        return counted_RLG

    def _places(self, taken_RN: NDArray[np.integer]) -> Iterator[tuple[slice, NDArray[np.int16]]]:
        """How often each place is in the top k of each resample, (L, M, R), for some rankings at a time."""
        # Draws last, so that all that follows runs along contiguous numbers.
        taken_NR = np.ascontiguousarray(taken_RN.T)
        step = max(1, CHUNK // max(1, len(taken_RN) * self.groups_LM.shape[1]))
        for start in range(0, len(self), step):
            some = slice(start, start + step)
            taken_LMR = taken_NR[self.pictures_LM[some]]
            left_LMR = np.cumsum(taken_LMR, axis=1, dtype=np.int16)
            np.subtract(self.k_L[some, None, None].astype(np.int16), left_LMR, out=left_LMR)
            left_LMR += taken_LMR
            yield some, np.clip(left_LMR, 0, taken_LMR, out=left_LMR)

    def skews(self, taken_RN: NDArray[np.integer] | None = None) -> Floats:
        """MaxSkew@k with equal targets, (L,), or that of each resample, (R, L)."""
        counted = self.in_top(taken_RN)
        # k, but where a resample of a small pool has fewer
        filled = np.maximum(counted.sum(axis=-1, keepdims=True), 1)
        share = np.maximum(counted, 1) / filled
        absent = np.arange(counted.shape[-1]) >= self.groups_L[:, None]
        share = np.where(absent, 0.0, share)
        skews: Floats = np.log(share.max(axis=-1) * self.groups_L)
        return skews

    def ndkls(self, taken_RN: NDArray[np.integer] | None = None) -> Floats:
        """NDKL of the top k with equal targets, (L,), or that of each resample, (R, L)."""
        if taken_RN is None:
            every = np.ones((1, int(self.pictures_LM.max(initial=0)) + 1), dtype=np.uint8)
            whole: Floats = self.ndkls(every)[0]
            return whole
        found_RL = np.empty((len(taken_RN), len(self)))
        for some, in_top_LMR in self._places(taken_RN):
            groups_LRM, times_LRM = np.broadcast_arrays(
                self.groups_LM[some, None], in_top_LMR.transpose(0, 2, 1)
            )
            times_LRM = np.where(groups_LRM >= 0, times_LRM, 0)
            # The groups in every top k, best first, one top (T) after the other.
            group = np.repeat(groups_LRM.ravel(), times_LRM.ravel())
            length_T = times_LRM.sum(axis=-1).ravel()
            top, first_T = np.repeat(np.arange(len(length_T)), length_T), np.cumsum(length_T) - length_T
            rank = np.arange(len(group)) - first_T[top] + 1
            sizes = np.repeat(self.groups_L[some], len(taken_RN))[top]
            kl = np.zeros(len(group))
            for g in range(int(self.groups_L.max(initial=1))):
                above = np.concatenate([[0], np.cumsum(group == g)])
                share = (above[1:] - above[first_T[top]]) / rank
                kl += share * np.log(np.where(share > 0, share * sizes, 1))
            weight = 1 / np.log2(rank + 1)  # 1 at the first rank
            sums = [np.bincount(top, w, minlength=len(length_T)) for w in (weight * kl, weight)]
            found_RL[:, some] = (sums[0] / np.maximum(sums[1], 1)).reshape(-1, len(taken_RN)).T
        return found_RL

    def majority_shares(self, taken_RN: NDArray[np.integer] | None = None) -> Floats:
        """The majority group's share of the top k, (L,) or (R, L); NaN where none is named."""
        counted = self.in_top(taken_RN)
        column_L = np.maximum(self.majority_L, 0)
        own = np.take_along_axis(counted, np.broadcast_to(column_L[:, None], (*counted.shape[:-1], 1)), -1)
        shares = own[..., 0] / np.maximum(counted.sum(axis=-1), 1)
        found: Floats = np.where(self.majority_L >= 0, shares, np.nan)
        return found


def mean_skew(rankings: Sequence[Ranking]) -> float:
    """The mean MaxSkew@k of some rankings, rounded, so that equal ones are equal however they are summed."""
    return round(float(RankingTable.of(rankings).skews().mean()), DIGITS)


DIGITS = 12


def resamples(n_pictures: int, draws: int, seed: int = 0) -> NDArray[np.uint8]:
    """How often each picture is in each resample of the pool, (R, N).

    Points that use the same resamples share their noise, as they share their pictures.
    """
    return np.random.default_rng(seed).poisson(1.0, (draws, n_pictures)).astype(np.uint8)
