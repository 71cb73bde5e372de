"""Confirmation: settings of the front, trained once more with a seed that the search did not use.

The best of many noisy numbers are too good. What a setting reaches with a fresh seed, on test pictures, which
chose nothing, is not.
"""

from __future__ import annotations

import dataclasses
from itertools import chain

from clippo.config import SweepConfig
from clippo.errors import ResourceError
from clippo.front.counts import CONFIRM, REFERENCE
from clippo.front.front import Front, Point, well_spread
from clippo.sweep.cluster import check_resources
from clippo.sweep.search import Proposal


def to_confirm(front: Front, count: int) -> list[Point]:
    """The points that matter most, of different settings: recommended, knee, then the farthest apart."""
    wanted: dict[str, Point] = {}
    spread = (p for rows in range(1, len(front.front) + 2) for p in well_spread(front, rows))
    for point in chain((front.recommended, front.knee), spread):
        if len(wanted) == count:
            break
        if point is not None and point.trial_id != REFERENCE:
            wanted.setdefault(point.trial_id, point)
    return list(wanted.values())


def proposals(config: SweepConfig, front: Front) -> list[Proposal]:
    """The trials that confirm a front; where one was stopped after an epoch, its confirmation ends there."""
    fresh = config.search.seed + config.search.replicates
    return [
        Proposal(f"{CONFIRM}{p.trial_id}", 0, {"beta": None} | p.settings | {"seed": fresh})
        for p in to_confirm(front, config.search.confirm)
    ]


def with_workers(config: SweepConfig) -> SweepConfig:
    """The configuration of the confirming trials: two workers where the cluster has room for them."""
    if config.max_workers or config.autoscaling:  # what such a cluster may grow to is not always known
        return config
    if config.train.batch_size < 4:  # an odd number of pairs could leave a worker without one
        return config
    two = dataclasses.replace(config, workers=2, search=dataclasses.replace(config.search, concurrency=1))
    try:
        check_resources(two)
    except ResourceError:
        return config
    return two
