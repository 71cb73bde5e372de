"""The sweep: what is searched, how, and where the results go."""

from clippo.sweep.plan import print_plan
from clippo.sweep.tuner import named, run_sweep

__all__ = ["named", "print_plan", "run_sweep"]
