"""Result rows of sweeps: their schemas and where they are kept."""

from clippo.results.schema import SCHEMA_VERSION, STATUSES, TABLES, View
from clippo.results.spooled import SpooledStore
from clippo.results.store import ResultStore

__all__ = ["SCHEMA_VERSION", "STATUSES", "TABLES", "ResultStore", "SpooledStore", "View"]
