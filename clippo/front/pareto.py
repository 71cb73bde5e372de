"""The non-dominated points of a sweep.

Shapes: N points, M objectives.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clippo.errors import ConfigError


def pareto_mask(points: ArrayLike, maximize: bool | Sequence[bool] = True) -> NDArray[np.bool_]:
    """Which points are on the front, as an (N,) mask.

    A point is off the front when another is at least as good in all objectives and better in one. So equal
    points are on it together. A point with a NaN was not measured: it is never on the front and dominates
    nothing. Infinities are ordinary values, the best or the worst there are.

    N log N for two objectives; N times the length of the front for more.

    Takes ``points`` (N, M); ``maximize``, for all objectives or for each.

    Raises:
        ConfigError: if ``points`` is not two-dimensional or ``maximize`` does not fit it.

    >>> pareto_mask([[1, 4], [3, 3], [2, 3], [3, 3], [4, float("nan")]])
    array([ True,  True, False,  True, False])
    >>> pareto_mask([[1, 4], [3, 3], [2, 5]], maximize=[True, False])
    array([False,  True, False])
    """
    points_NM = np.asarray(points, dtype=np.float64)
    if points_NM.size == 0:
        return np.zeros(len(points_NM), dtype=np.bool_)
    if points_NM.ndim != 2:
        raise ConfigError(f"points have shape {points_NM.shape}; expected (points, objectives)")
    if not isinstance(maximize, bool) and len(maximize) != points_NM.shape[1]:
        raise ConfigError(f"maximize has {len(maximize)} entries for {points_NM.shape[1]} objectives")
    points_NM = np.where(maximize, points_NM, -points_NM)

    mask_N = np.zeros(len(points_NM), dtype=np.bool_)
    measured = np.flatnonzero(~np.isnan(points_NM).any(axis=1))
    front_of = _front_of_two if points_NM.shape[1] == 2 else _front_of_many
    mask_N[measured] = front_of(points_NM[measured])
    return mask_N


def best_of(front_NM: NDArray[np.float64], first: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best second objective among those points of a front that are at least as good in the first one.

    Takes a front of two objectives, maximised, (N, 2), and values of the first, of any shape. NaN where no
    point is as good.
    """
    front_NM = front_NM[np.argsort(front_NM[:, 0])]
    place = np.searchsorted(front_NM[:, 0], first)
    best: NDArray[np.float64] = np.append(front_NM[:, 1], np.nan)[place]
    return best


def _front_of_two(points_NM: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The front of two objectives: in each group that is equal in the first one, the best in the second,
    if that is better than in all groups before.
    """
    if len(points_NM) == 0:
        return np.zeros(0, dtype=np.bool_)
    one_N, other_N = points_NM.T
    with np.errstate(invalid="ignore"):  # of opposite infinities
        top = (one_N + other_N).argmax()
    # What one good point beats in both needs no sorting, and that is most.
    order = np.flatnonzero((one_N >= one_N[top]) | (other_N >= other_N[top]))
    order = order[np.argsort(-one_N[order])]
    first_N, second_N = one_N[order], other_N[order]
    ends = np.flatnonzero(np.append(first_N[1:] != first_N[:-1], True))
    best_G = np.maximum.accumulate(second_N)[ends]
    better_G = np.ones(len(ends), dtype=np.bool_)
    better_G[1:] = best_G[1:] > best_G[:-1]
    sizes = np.diff(ends, prepend=-1)
    mask_N = np.zeros(len(points_NM), dtype=np.bool_)
    mask_N[order] = np.repeat(better_G, sizes) & (second_N == np.repeat(best_G, sizes))
    return mask_N


def _front_of_many(points_NM: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The front of any number of objectives."""
    # best first in the first objective, ties by the next: no point dominates one that comes before it
    order = np.lexsort(points_NM.T[::-1])[::-1]
    sorted_NM = points_NM[order]
    is_new_N = np.ones(len(order), dtype=np.bool_)
    is_new_N[1:] = (sorted_NM[1:] != sorted_NM[:-1]).any(axis=1)
    distinct_NM = sorted_NM[is_new_N]
    on_front_N, rest = np.zeros(len(distinct_NM), dtype=np.bool_), np.arange(len(distinct_NM))
    while len(rest):
        on_front_N[rest[0]] = True
        rest = rest[(distinct_NM[rest] > distinct_NM[rest[0]]).any(axis=1)]
    mask_N = np.empty(len(order), dtype=np.bool_)
    mask_N[order] = on_front_N[np.cumsum(is_new_N) - 1]
    return mask_N
