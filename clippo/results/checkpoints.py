"""Checkpoints of trials in the result store, where every node finds them."""

from __future__ import annotations

from dataclasses import dataclass

from clippo.results.schema import View
from clippo.results.store import ResultStore


@dataclass(frozen=True)
class StoreCheckpoints:
    """The objects of one trial; what ``clippo.train.Checkpoints`` asks for.

    Attributes:
        folder: relative to the store.
    """

    store: ResultStore
    folder: str

    def write(self, name: str, data: bytes) -> None:
        self.store.write_bytes(f"{self.folder}/{name}", data)

    def read(self, name: str) -> bytes | None:
        relative = f"{self.folder}/{name}"
        return self.store.read_bytes(relative) if self.store.exists(relative) else None


def weights_name(store: ResultStore, sweep: str, trial_id: str) -> str | None:
    """The object among a trial's checkpoints that has the weights of its rows; None: it left none."""
    rows = store.trials(sweep, View(columns=["checkpoint_uri"], where={"trial_id": [trial_id]}))
    uri: str | None = rows["checkpoint_uri"][0].as_py() if len(rows) else None
    return uri and uri.rpartition("/")[2]


def checkpoint_folder(sweep: str, trial_id: str) -> str:
    """Where a trial's checkpoints are, relative to the store."""
    return f"checkpoints/sweep={sweep}/{trial_id}"
