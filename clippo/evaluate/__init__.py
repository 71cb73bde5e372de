"""What is measured: counts, objectives, and the ranking-bias measures. Counting tensors is in ``counts``."""

from clippo.evaluate.objectives import Counts, objectives
from clippo.evaluate.ranking_bias import max_skew, ndkl

__all__ = ["Counts", "max_skew", "ndkl", "objectives"]
