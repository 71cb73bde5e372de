"""The sweep: what is searched, how, and where the results go."""

from clippo.sweep.tuner import run_sweep

__all__ = ["run_sweep"]
