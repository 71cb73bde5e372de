"""The command line: one line for what the user can mend (exit 2), and the front as a table or JSON."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from clippo.config import SweepConfig
from clippo.errors import ClippoError, ConfigError, StoreError
from clippo.front.points import REFERENCE, Front, Point, describe, front_of
from clippo.results import ResultStore

Parsed = TypeVar("Parsed")


def sweep_main(default: SweepConfig, description: str | None) -> None:
    """Runs a sweep from its flags and ends the process: 0, 1 (failed), 2 (to mend) or 130 (interrupted)."""

    def run() -> int:
        config = _parsed(lambda: tyro.cli(SweepConfig, default=default, description=description))
        _quiet(config.verbose)
        from clippo.sweep import named, run_sweep  # Ray and torch take seconds to import; --help goes without

        config, console = named(config), Console()
        try:
            front = run_sweep(config, console)
        except KeyboardInterrupt:
            with contextlib.suppress(StoreError):  # nothing measured yet
                print_front(front_of(ResultStore(config.results), config.name), console)
            print(f"interrupted; the same command with --name {config.name} goes on", file=sys.stderr)
            return 130
        print_front(front, console)
        where = f"clippo front {config.results} --sweep {front.sweep}"
        console.print(
            f"results: {config.results}   this table again: {where}", soft_wrap=True, highlight=False
        )
        if front.completed == 0:
            console.print("[red]no trial of the sweep was completed[/]")
            return 1
        return 0

    sys.exit(_guarded(run))


@dataclass(frozen=True)
class FrontCommand:
    """Print the front of what is in a store, also while the sweep still runs."""

    store: Annotated[str, tyro.conf.Positional]
    """A folder or s3://bucket/prefix."""
    sweep: str = ""
    """Name of the sweep; needed when the store holds more than one."""
    json: bool = False
    """Print JSON instead of a table."""
    plot: str = ""
    """Also draw the front into this file: .png, .svg or .html."""

    def run(self) -> int:
        store = ResultStore(self.store)
        names = store.sweeps()
        if not self.sweep and len(names) != 1:
            raise ConfigError(
                f"{self.store} holds {len(names)} sweeps; name one with --sweep: {', '.join(names)}"
                if names
                else f"{self.store} holds no sweep; give the --results of one"
            )
        front = front_of(store, self.sweep or names[0])
        if self.json:
            print(json.dumps(front.to_json(), indent=1))
        else:
            print_front(front, Console())
        if self.plot:
            from clippo.front.plot import front_chart, save_chart  # Altair takes a second to import

            save_chart(front_chart(front), self.plot)
        return 0


def main() -> None:
    """The ``clippo`` program."""
    commands: dict[str, Callable[..., FrontCommand]] = {"front": FrontCommand}
    sys.exit(_guarded(lambda: _parsed(lambda: tyro.extras.subcommand_cli_from_dict(commands)).run()))


def print_front(front: Front, console: Console) -> None:
    """The front as a table: validation numbers over their 90 % intervals, test numbers beside them."""
    table = Table(
        title=f"Pareto front of {front.sweep}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    for name in ("trial\nweights", "setting"):
        table.add_column(name, no_wrap=True)
    for name in ("robust-\nness", "reten-\ntion", "p", "test\nrob.", "test\nret.", "fooled", "read-\ning"):
        table.add_column(name, justify="right")
    # The untouched model is shown even where a tuned one keeps everything and is more robust.
    for point in front.points:
        if point.on_front or point.trial_id == REFERENCE:
            table.add_row(*_cells(point))
    console.print(table)
    console.print(
        f"{len(front.front)} of {len(front.points)} points are on the front; "
        f"{front.completed} trials completed, {front.failed} failed. "
        f"Hypervolume {front.hypervolume:.3f} as measured, "
        f"{_interval(front.hypervolume_interval)} without the luck of the best.\n"
        "robustness and retention: validation pictures, which steered the search, with 90 % intervals from "
        "the counts; p: probability of being on the front.\n"
        "test: pictures, lettering and drawings that neither tuning nor the search saw; fooled: read as the "
        "written word; reading: accuracy of reading a lone word.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _cells(point: Point) -> list[str]:
    untouched = point.trial_id == REFERENCE
    names = ("robustness", "retention", "attack_success_rate", "reading_accuracy")
    return [
        "untouched" if untouched else f"{point.trial_id}\n{point.variant}",
        "" if untouched else describe(point.settings).replace(" kl", "\nkl"),
        f"{point.robustness:.3f}\n{_interval(point.robustness_interval)}",
        f"{point.retention:.3f}\n{_interval(point.retention_interval)}",
        _brief(point.probability),
        *(f"{point.test[n]:.3f}" if n in point.test else "" for n in names),
    ]


def _interval(interval: tuple[float, float]) -> str:
    return "-".join(_brief(bound) for bound in interval)


def _brief(share: float) -> str:
    """``.93`` or ``1``: there is little room in 80 columns."""
    return f"{share:.2f}".replace("1.00", "1").removeprefix("0")


def _parsed(parse: Callable[[], Parsed]) -> Parsed:
    """What the flags say; a flag that tyro refuses becomes one line instead of its box."""
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return parse()
    except SystemExit as error:
        if error.code != 2:
            raise
        words = re.sub(r"[─-╿]", " ", re.sub(r"\x1b\[[0-9;]*m", "", refusal.getvalue())).split()
        raise ConfigError(
            " ".join(words).removeprefix("Parsing error ").removeprefix("Unrecognized options ")
        ) from None


def _guarded(run: Callable[[], int]) -> int:
    """Runs a command; an error that the user can mend becomes one line and status 2."""
    try:
        return run()
    except ClippoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _quiet(verbose: bool) -> None:
    """One thread per process, and without ``--verbose`` no logs of the libraries."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not verbose:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # or Tune prints its own tables
        os.environ.setdefault("GLOG_minloglevel", "3")
    # Tune would swallow the first Ctrl-C and end as if the sweep were done; ``ray job stop`` sends SIGTERM.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
