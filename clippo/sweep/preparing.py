"""The prepared set of a sweep: where it is kept, and building it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clippo.config import SweepConfig
from clippo.prepared import Location, prepare
from clippo.results import ResultStore
from clippo.results.spooled import WORKER_PATIENCE
from clippo.train.shared import Shared


def prepared_for(config: SweepConfig, store: ResultStore, console: Console, *, workers: int) -> Shared:
    """Builds the prepared set of a sweep unless it is there, with live progress.

    Args:
        workers: processes that build it, on ``config.gpus_per_worker`` GPUs each.

    Raises:
        DataError: pictures that cannot be used.
        StoreError: a place that cannot be used.
        ResourceError: as `prepare`.
    """
    columns = (TextColumn("preparing pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    location = location_of(store)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task("prepare", total=None)
        name = prepare(
            config.task, config.data, config.model, location, workers=workers, gpus=config.gpus_per_worker,
            verbose=config.verbose,
            on_progress=lambda done, total: progress.update(shown, completed=done, total=total),
        )  # fmt: skip
    return Shared(
        model=config.model, train=config.train, prepared=name, location=location,
        on_gpu=config.gpus_per_worker > 0,
    )  # fmt: skip


def location_of(store: ResultStore) -> Location:
    """Where prepared sets are kept: in a local store, else in the store and, mapped, in each node's cache."""
    if "://" not in store.uri:
        return Location(Path(store.uri) / "prepared")
    return Location(None, f"{store.uri}/prepared", patience=WORKER_PATIENCE)
