"""The Pareto front of a sweep: which points are on it, how much they dominate, and how sure that is."""

from clippo.front.hypervolume import hypervolume
from clippo.front.pareto import pareto_mask
from clippo.front.uncertainty import front_probability, retention_interval, wilson_interval

__all__ = ["front_probability", "hypervolume", "pareto_mask", "retention_interval", "wilson_interval"]
