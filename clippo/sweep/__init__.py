"""The sweep: what is searched, how, and where the results go."""

from clippo.sweep.tuner import named, run_sweep

__all__ = ["named", "run_sweep"]
