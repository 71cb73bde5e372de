"""The front of a sweep that runs, again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console

from clippo.errors import ConfigError
from clippo.front.counts import REFERENCE
from clippo.front.front import Front
from clippo.front.points import front_of
from clippo.results import RUNNING, ResultStore


def followed(
    store: ResultStore, sweep: str, console: Console, *, every: float, min_retention: float | None = None
) -> Iterator[Front]:
    """Gives the front whenever trials have ended, and ends when the sweep has.

    Between two looks, only the names of objects are read. A driver that was killed leaves its sweep running,
    since the same command goes on with it.

    Args:
        console: where a terminal shows how far the sweep is while nothing is new.
        every: time between two looks [s].

    Raises:
        ConfigError: ``every`` is not above 0.
        StoreError: as of `front_of`.
    """
    if not every > 0:
        raise ConfigError(f"every is {every:g}; it must be above 0 seconds")
    store.known_config(sweep)
    known: dict[str, int] = {}
    shown: Front | None = None
    since = "no trial yet"
    while True:
        # The state first: when it says that the sweep has ended, all of its trials are in the listing.
        state, finished = store.state(sweep), store.finished(sweep)
        if REFERENCE in finished and finished != known:
            front = front_of(store, sweep, min_retention=min_retention)
            known, since = finished, f"nothing new since {time.strftime('%H:%M:%S')}"
            if front != shown:  # trials that ended while it was read are in it already
                yield front
            shown = front
        if state is not None and state["state"] != RUNNING:
            console.print(f"sweep {sweep}: {state['state']} at {state['at'][:16]} UTC", highlight=False)
            return
        planned = f" of {state['trials']}" if state else ""
        with console.status(f"{len(finished.keys() - {REFERENCE})}{planned} trials, {since}; Ctrl-C leaves"):
            time.sleep(every)
