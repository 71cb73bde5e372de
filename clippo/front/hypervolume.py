"""The hypervolume: how much of the objective space a front dominates.

Shapes: N points, M objectives.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clippo.errors import ConfigError


def hypervolume(points: ArrayLike, reference_point: ArrayLike) -> float:
    """The area or volume between ``reference_point`` and the points, all objectives maximised.

    Exact; N log N for two objectives, at most N times that for three. A point that is not above the
    reference point in every objective, or that has a NaN, adds nothing. A point at infinity that is above
    it makes the hypervolume infinite.

    Takes ``points`` (N, M), dominated ones and duplicates allowed; ``reference_point`` (M,), finite; M is 2
    or 3.

    Raises:
        ConfigError: for another M or a reference point that does not fit.

    >>> hypervolume([[1, 2], [2, 1], [1, 1]], [0, 0])
    3.0
    """
    reference_M = np.asarray(reference_point, dtype=np.float64)
    points_NM = np.asarray(points, dtype=np.float64)
    if reference_M.shape not in {(2,), (3,)} or not np.isfinite(reference_M).all():
        raise ConfigError(f"reference point is {reference_M.tolist()}; expected two or three finite numbers")
    if points_NM.size == 0:
        return 0.0
    if points_NM.ndim != 2 or points_NM.shape[1] != len(reference_M):
        raise ConfigError(
            f"points have shape {points_NM.shape}; expected (points, {len(reference_M)}), "
            "one column for each entry of the reference point"
        )
    above_NM = points_NM[(points_NM > reference_M).all(axis=1)] - reference_M
    return _area(above_NM) if len(reference_M) == 2 else _volume(above_NM)


def _area(above_NM: NDArray[np.float64]) -> float:
    """The area that positive points dominate above the origin."""
    # Best first in the first axis. What counts is where the second is better than for all levels before;
    # distinct levels only, so that no strip is infinite and empty at once, which would be NaN.
    first_N, second_N = above_NM[np.argsort(-above_NM[:, 0])].T
    ends = first_N != np.append(first_N[1:], 0.0)
    first, best = first_N[ends], np.maximum.accumulate(second_N)[ends]
    rises = best != np.append(0.0, best[:-1])
    return float(np.sum(np.diff(first[rises][::-1], prepend=0.0) * best[rises][::-1]))


def _volume(above_NM: NDArray[np.float64]) -> float:
    """The volume that positive points dominate above the origin: a slab for each level of the third axis."""
    third_N = above_NM[:, 2]
    levels = np.unique(third_N)
    slabs = zip(np.diff(levels, prepend=0.0), levels, strict=True)
    return float(sum(height * _area(above_NM[third_N >= level, :2]) for height, level in slabs))
