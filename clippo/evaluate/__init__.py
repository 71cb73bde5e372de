"""What is measured: counts, objectives, ranking bias, how groups are read. ``counts`` counts tensors."""

from clippo.evaluate.groups import bootstrap_interval, lean, majority_counts
from clippo.evaluate.objectives import Counts, Goal, Objectives
from clippo.evaluate.ranking_bias import max_skew, ndkl, top_share

__all__ = [
    "Counts",
    "Goal",
    "Objectives",
    "bootstrap_interval",
    "lean",
    "majority_counts",
    "max_skew",
    "ndkl",
    "top_share",
]
