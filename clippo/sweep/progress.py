"""What a person sees while a sweep runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from clippo.evaluate.objectives import RETENTION, Objectives
from clippo.front import hypervolume
from clippo.front.evidence import HV_REFERENCE_POINT
from clippo.sweep.search import Numbers

RETENTION_LEVELS = (0.95, 0.99)


class ProgressView:
    """A live view on a terminal; one line per finished trial elsewhere.

    Args:
        total: trials of the whole sweep.
        objectives: the task's own.
        reference: numbers of the untouched model, the first point of the front.
    """

    def __init__(self, console: Console, total: int, objectives: Objectives, reference: Numbers) -> None:
        self._console, self._total, self._objectives = console, total, objectives
        self._reached = [reference]
        self._done = self._failed = self._running = 0
        self._new = 0
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._bar.add_task("trials", total=total, left="")
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._view)

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def resumed(self, reached: Sequence[Numbers], failed: int) -> None:
        """Takes in the trials that earlier runs finished."""
        self._reached += reached
        self._done, self._failed = len(reached), failed
        self._bar.update(self._task, completed=self._done + self._failed)

    def started(self) -> None:
        self._running += 1

    def finished(
        self, name: str, settings: str, numbers: Numbers | None, failure: str = "", note: str = ""
    ) -> None:
        """One trial more; ``numbers`` is None when it failed."""
        self._running -= 1
        self._new += 1
        if numbers is None:
            self._failed += 1
        else:
            self._done += 1
            self._reached.append(numbers)
        finished = self._done + self._failed
        self._bar.update(self._task, completed=finished, left=self._time_left(finished))
        line = Text(f"{finished:>4}/{self._total}  {name}  {settings}  ")
        if numbers is None:
            line.append("failed", "red").append(f": {failure}")
        else:
            reached = [f"{n.replace('_', ' ')} {numbers[n]:.3f}" for n in self._objectives.names]
            line.append("  ".join(reached) + (note and f"  {note}"))
        if not self._console.is_terminal:  # a log has no live view
            best = "  ".join(f"best@{level} {self._best(level)}" for level in RETENTION_LEVELS)
            state = f"running {self._running}  {best}  hypervolume {self._hypervolume():.4f}"
            line.append(f"  |  {state}  {self._time_left(finished)}")
        self._console.print(line, soft_wrap=True)

    def _best(self, level: float) -> str:
        """The best value of the goal of a trial that keeps this retention."""
        goal = self._objectives.goal
        reached = [n[goal.name] for n in self._reached if n[RETENTION] >= level]
        return f"{max(reached, key=goal.gain):.3f}" if reached else "none yet"

    def _hypervolume(self) -> float:
        return hypervolume(list(map(self._objectives.place, self._reached)), HV_REFERENCE_POINT)

    def _time_left(self, finished: int) -> str:
        seconds = (time.monotonic() - self._began) / self._new * (self._total - finished)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def _view(self) -> Group:
        best = Table.grid(padding=(0, 2))
        for level in RETENTION_LEVELS:
            goal = self._objectives.goal.name.replace("_", " ")
            best.add_row(f"best {goal} at retention >= {level}", self._best(level))
        best.add_row("hypervolume", f"{self._hypervolume():.4f}")
        state = f"{self._done} done, {self._running} running, {self._failed} failed"
        return Group(self._bar, state, best)
