"""What was looked at and what was found, and the table that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clippo.errors import ClippoError


@dataclass(frozen=True)
class Finding:
    """One line of what was looked at."""

    check: str
    detail: str
    problem: bool = False
    waits: bool = False  # nothing is found yet: it says for what, and how long


def print_findings(findings: Iterable[Finding], console: Console) -> int:
    """Shows findings as a table that grows as they come; returns how many of them are problems."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("check", overflow="fold", max_width=36)
    table.add_column("")
    table.add_column("detail", overflow="fold")
    problems = 0
    with Live(table, console=console, vertical_overflow="visible"):
        for found in findings:
            if found.waits:  # at once, also where the table is shown at its end
                console.print(Text(f"{found.check}: {found.detail}"))
                continue
            mark = "[red]problem[/]" if found.problem else "[green]ok[/]"
            table.add_row(Text(found.check), mark, Text(found.detail))
            problems += found.problem
    return problems


def tried(check: str, look: Callable[[], str]) -> Finding:
    """What a look says, or what it raises."""
    try:
        return Finding(check, look())
    except ClippoError as error:
        return Finding(check, str(error), problem=True)


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
