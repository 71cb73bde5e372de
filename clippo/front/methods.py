"""Which method made a point, and what each method offers.

Shapes: P points, the first of them the untouched model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clippo.front.evidence import Mask
from clippo.front.front import METHODS, PAINT, PREFERENCE, TUNING, UNTOUCHED

TUNING_LOSS = "cross_entropy"


def methods_of(tuned_P: Mask, curve_P: Mask) -> NDArray[np.int64]:
    """The index in `METHODS` of what made each point.

    Takes which points are of plain tuning, and which lie between it and the untouched model.
    """
    preference, tuning, paint = (METHODS.index(name) for name in (PREFERENCE, TUNING, PAINT))
    found = np.where(tuned_P, np.where(curve_P, paint, tuning), preference)
    found[0] = METHODS.index(UNTOUCHED)
    return found


def families_of(method_P: NDArray[np.int64], averaged_P: Mask) -> dict[str, Mask]:
    """The points that each method offers; all have the untouched model."""
    untouched = method_P == METHODS.index(UNTOUCHED)
    families = {name: untouched | (method_P == i) for i, name in enumerate(METHODS)}
    # The curve of interpolated weights ends at the averaged ones.
    families[PAINT] |= families[TUNING] & averaged_P
    return families
