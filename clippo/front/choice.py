"""Which points are worth a look: the recommended one, the knee, and groups that cannot be told apart.

P points, M the two objectives, goal and retention; the untouched model is the first point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clippo.front.evidence import Evidence, Mask
from clippo.front.front import CHANCE
from clippo.front.uncertainty import Array


def best_of(measured_PM: Array, candidates: Mask, chance: Array) -> int:
    """The best candidate that keeps enough with enough certainty; the untouched model always does."""
    sure = candidates & (chance >= CHANCE)
    sure[0] = True
    found = np.flatnonzero(sure)
    return int(found[np.lexsort((measured_PM[found, 1], measured_PM[found, 0]))[-1]])


def knee_of(measured_PM: Array, on_front: Mask) -> int | None:
    """The point farthest above the line between the ends of the front (Das, Struct. Optim. 1999)."""
    front = np.flatnonzero(on_front)
    ends = measured_PM[front].min(axis=0), measured_PM[front].max(axis=0)
    if len(np.unique(measured_PM[front], axis=0)) < 3:
        return None
    above = ((measured_PM[front] - ends[0]) / (ends[1] - ends[0])).sum(axis=1)
    return int(front[above.argmax()])


def groups_of(evidence: Evidence, on_front: Mask) -> NDArray[np.int64]:
    """Numbers the points on the front, by retention: a group ends where one can be told from its first."""
    group = np.zeros(len(on_front), dtype=np.int64)
    front = np.flatnonzero(on_front)
    front = front[np.lexsort((front, -evidence.measured_PM[front, 1]))]
    like_first, number = np.zeros_like(on_front), 0
    for point in front:
        if not like_first[point]:
            like_first[:] = False
            like_first[evidence.alike(int(point), np.sort(front))] = True
            number += 1
        group[point] = number
    return group
