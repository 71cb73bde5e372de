"""The prepared set: everything that is the same in every step of every trial, computed once."""

from clippo.prepared.build import prepare
from clippo.prepared.reader import EvalData, PreparedSet, open_prepared

__all__ = ["EvalData", "PreparedSet", "open_prepared", "prepare"]
