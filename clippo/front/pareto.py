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
    # best first in the first objective, ties by the next: no point dominates one that comes before it
    order = measured[np.lexsort(points_NM[measured].T[::-1])[::-1]]
    sorted_NM = points_NM[order]
    is_new_N = np.ones(len(order), dtype=np.bool_)
    is_new_N[1:] = (sorted_NM[1:] != sorted_NM[:-1]).any(axis=1)
    on_front = _front_of_distinct(sorted_NM[is_new_N])
    mask_N[order] = on_front[np.cumsum(is_new_N) - 1]
    return mask_N


def _front_of_distinct(sorted_NM: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The front of distinct points that are sorted in descending lexicographic order."""
    on_front_N = np.zeros(len(sorted_NM), dtype=np.bool_)
    if sorted_NM.shape[1] == 2:
        on_front_N[:1] = True
        second_N = sorted_NM[:, 1]
        on_front_N[1:] = second_N[1:] > np.maximum.accumulate(second_N)[:-1]
        return on_front_N
    rest = np.arange(len(sorted_NM))
    while len(rest):
        on_front_N[rest[0]] = True
        rest = rest[(sorted_NM[rest] > sorted_NM[rest[0]]).any(axis=1)]
    return on_front_N
