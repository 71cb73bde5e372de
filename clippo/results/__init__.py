"""Result rows of sweeps: their schemas and where they are kept."""

from clippo.results.schema import SCHEMA_VERSION, STATUSES, TABLES
from clippo.results.store import ResultStore

__all__ = ["SCHEMA_VERSION", "STATUSES", "TABLES", "ResultStore"]
