"""The prepared set: everything that is the same in every step of every trial, computed once."""

from clippo.prepared.build import prepare
from clippo.prepared.location import Location, fetch
from clippo.prepared.reader import EvalData, Inputs, PreparedSet, Rows, open_prepared
from clippo.prepared.text import text_features
from clippo.tasks.base import Queries

__all__ = [
    "EvalData", "Inputs", "Location", "PreparedSet", "Queries", "Rows", "fetch", "open_prepared", "prepare",
    "text_features",
]  # fmt: skip
