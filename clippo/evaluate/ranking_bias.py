"""How far the groups in the top of a ranking are from the shares they should have (arXiv 1905.01989).

Shapes: N ranked pictures, K top of the ranking, G groups.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clippo.errors import ConfigError


def max_skew(scores: ArrayLike, groups: ArrayLike, k: int, target: str = "equal") -> float:
    """MaxSkew@k (Geyik et al., arXiv 1905.01989): how over-represented one group is at most.

    ``max_g ln(share of g in the top k / target share of g)``. A group that is absent from the top k counts
    as 1/k, one picture, so that its logarithm exists. 0 if the top k has the target shares.

    Takes ``scores`` (N,), higher is ranked first, ties in the order given; ``groups`` (N,), labels of any
    kind; ``k`` in 1..N; ``target``: "equal" shares for all groups of the pool, or "proportional" to it.

    Raises:
        ConfigError: for a ``k`` or ``target`` out of its bounds, or scores that are NaN or do not fit.

    >>> round(max_skew([0.9, 0.8, 0.7, 0.1], ["f", "f", "m", "m"], k=2), 4)
    0.6931
    """
    counts_KG, target_G = _top_counts(scores, groups, k, target)
    share_G = np.maximum(counts_KG[-1], 1) / k
    return float(np.log(share_G / target_G).max())


def ndkl(scores: ArrayLike, groups: ArrayLike, k: int, target: str = "equal") -> float:
    """NDKL of the top k (Geyik et al., arXiv 1905.01989): normalised discounted KL divergence.

    ``1/Z sum_{i=1..k} KL(shares in the top i || target) / log2(i + 1)``, where ``Z`` is the sum of the
    weights ``1 / log2(i + 1)``; the KL is in nats, and a group absent from the top i adds 0 to it. With
    two groups or more it is never 0, since the top 1 holds one group alone.

    Takes and raises what `max_skew` does.

    >>> round(ndkl([0.9, 0.8, 0.7, 0.1], ["f", "m", "f", "m"], k=2), 4)
    0.425
    """
    counts_KG, target_G = _top_counts(scores, groups, k, target)
    rank_K = np.arange(1, k + 1)
    share_KG = counts_KG / rank_K[:, None]
    kl_K = np.sum(share_KG * np.log(np.where(share_KG > 0, share_KG, target_G) / target_G), axis=1)
    return float(np.average(kl_K, weights=1 / np.log2(rank_K + 1)))


def top_share(scores: ArrayLike, groups: ArrayLike, k: int, group: object) -> float:
    """The share of the top k that one group has.

    Takes ``scores``, ``groups`` and ``k`` as `max_skew` does, and ``group``, a label of the pool.

    Raises:
        ConfigError: as `max_skew`, or no picture of the pool has that group.

    >>> top_share([0.9, 0.8, 0.7, 0.1], ["f", "f", "m", "m"], k=3, group="m")
    0.3333333333333333
    """
    names = np.unique(np.asarray(groups))
    column = np.flatnonzero(names == group)
    if not len(column):
        raise ConfigError(f"no picture has group {group!r}; the groups are: {', '.join(map(str, names))}")
    counts_KG, _ = _top_counts(scores, groups, k, "equal")
    return float(counts_KG[-1, column[0]] / k)


def checked_scores(scores: ArrayLike, groups_N: NDArray[np.generic], k: int) -> NDArray[np.float64]:
    """The scores of a query, (N,).

    Raises:
        ConfigError: for scores that are NaN or do not fit the groups, or k out of 1..N.
    """
    scores_N = np.asarray(scores, dtype=np.float64)
    if scores_N.ndim != 1 or scores_N.shape != groups_N.shape:
        raise ConfigError(
            f"scores of shape {scores_N.shape} for groups of shape {groups_N.shape}; expected one each"
        )
    if np.isnan(scores_N).any():
        raise ConfigError("scores contain NaN, which has no rank; leave those pictures out")
    if not 1 <= k <= len(scores_N):
        raise ConfigError(f"k is {k}, but must be between 1 and the number of pictures, {len(scores_N)}")
    return scores_N


def _top_counts(
    scores: ArrayLike, groups: ArrayLike, k: int, target: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pictures of each group in the top 1..k, (K, G), and the target shares, (G,)."""
    names_G, group_N = np.unique(np.asarray(groups), return_inverse=True)
    scores_N = checked_scores(scores, group_N, k)
    one_hot_NG = np.eye(len(names_G), dtype=np.int64)[group_N]
    targets = {"equal": np.full(len(names_G), 1 / len(names_G)), "proportional": one_hot_NG.mean(axis=0)}
    if target not in targets:
        raise ConfigError(f"unknown target {target!r}; choose one of: {', '.join(targets)}")
    top_K = np.argsort(-scores_N, kind="stable")[:k]
    return np.cumsum(one_hot_NG[top_K], axis=0), targets[target]
