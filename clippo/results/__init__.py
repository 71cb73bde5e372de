"""Result rows of sweeps: their schemas and where they are kept."""

from clippo.results.schema import SCHEMA_VERSION, STATUSES, TABLES, View
from clippo.results.spooled import SpooledStore
from clippo.results.store import ENDED, INTERRUPTED, RUNNING, ResultStore

__all__ = [
    "ENDED",
    "INTERRUPTED",
    "RUNNING",
    "SCHEMA_VERSION",
    "STATUSES",
    "TABLES",
    "ResultStore",
    "SpooledStore",
    "View",
]
