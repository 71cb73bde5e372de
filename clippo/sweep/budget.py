"""When a search has had enough: device time, wall time, or no progress."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime, timedelta

from clippo.config import SearchConfig
from clippo.evaluate.objectives import Objectives
from clippo.front import hypervolume
from clippo.front.evidence import HV_REFERENCE_POINT
from clippo.sweep.search import Numbers

PAUSE = timedelta(minutes=2)
"""A sweep of which no trial ran for longer had been ended, and was resumed."""


class Budget:
    """What the trials of a search have taken and brought so far; those of earlier runs are told again.

    Args:
        untouched: numbers of the untouched model, the first point.
        ran: for how long the sweep had run before.
    """

    def __init__(
        self, search: SearchConfig, objectives: Objectives, untouched: Numbers, ran: timedelta = timedelta()
    ) -> None:  # fmt: skip
        self._search, self._place = search, objectives.place
        self._began = time.monotonic() - ran.total_seconds()
        self._device_s, self._since_growth = 0.0, 0
        self._points = [self._place(untouched)]
        self._volume = hypervolume(self._points, HV_REFERENCE_POINT)

    def spend(self, device_s: float, numbers: Numbers | None, *, searched: bool = True) -> None:
        """Takes in a trial that has ended.

        Args:
            numbers: what it reached; None: it failed.
            searched: whether the sampler proposed it. One that is only compared with costs, and says nothing
                of how the search gets on.
        """
        self._device_s += device_s
        if not searched:
            return
        self._since_growth += 1
        if numbers is not None:
            self._points.append(self._place(numbers))
            volume = hypervolume(self._points, HV_REFERENCE_POINT)
            if volume > self._volume:
                self._volume, self._since_growth = volume, 0

    def exhausted(self) -> str | None:
        """Why no more trials are to be started; None while they are."""
        search, hours = self._search, (time.monotonic() - self._began) / 3600
        if search.device_hours and self._device_s >= 3600 * search.device_hours:
            return f"{self._device_s / 3600:.3g} of {search.device_hours:g} device-hours are spent"
        if search.wall_hours and hours >= search.wall_hours:
            return f"{search.wall_hours:g} hours are over"
        if search.patience and self._since_growth >= search.patience:
            return f"the hypervolume has not grown for {self._since_growth} trials"
        return None


def ran_for(trials: Iterable[tuple[datetime, datetime]]) -> timedelta:
    """How long a sweep ran, from the beginnings and ends of its trials; pauses between its runs left out.

    >>> day = datetime(2026, 1, 1)
    >>> str(ran_for([(day, day + timedelta(hours=1)), (day + timedelta(hours=9), day + timedelta(hours=10))]))
    '2:00:00'
    """
    total, until = timedelta(), None
    for began, ended in sorted(trials):
        if until is None or began > until + PAUSE:
            until = began
        total += max(ended - until, timedelta())
        until = max(until, ended)
    return total
