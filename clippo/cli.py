"""The command line: one line for what the user can mend (exit 2), and the front as a table or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from clippo.config import SweepConfig
from clippo.errors import ClippoError, ConfigError
from clippo.front.points import REFERENCE, Front, Point, front_of
from clippo.results import ResultStore


def sweep_main(default: SweepConfig, description: str | None) -> None:
    """Runs a sweep from its flags and ends the process: 0, 1 failed, 2 for the user to mend, 130 interrupted."""

    def run() -> int:
        config = tyro.cli(SweepConfig, default=default, description=description)
        _quiet(config.verbose)
        from clippo.sweep import run_sweep  # Ray and torch take seconds to import; --help does not need them

        console = Console()
        front = run_sweep(config, console)
        print_front(front, console)
        where = f"clippo front {config.results} --sweep {front.sweep}"
        console.print(f"results: {config.results}   this table again: {where}", soft_wrap=True)
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

    def run(self) -> int:
        store = ResultStore(self.store)
        names = store.sweeps()
        if not self.sweep and len(names) != 1:
            raise ConfigError(f"{self.store} holds {len(names)} sweeps; name one with --sweep: {', '.join(names) or 'none'}")
        front = front_of(store, self.sweep or names[0])
        if self.json:
            print(json.dumps(front.to_json(), indent=1))
        else:
            print_front(front, Console())
        return 0


def main() -> None:
    """The ``clippo`` program."""
    sys.exit(_guarded(lambda: tyro.extras.subcommand_cli_from_dict({"front": FrontCommand}).run()))


def print_front(front: Front, console: Console) -> None:
    """The front as a table: validation numbers with 90 % intervals, test numbers beside them."""
    table = Table(title=f"Pareto front of {front.sweep}", title_justify="left", caption_justify="left")
    table.caption = (
        f"{len(front.front)} of {len(front.points)} points from {front.completed} completed trials "
        f"({front.failed} failed). hypervolume {front.hypervolume:.4f} {_interval(front.hypervolume_interval)}.\n"
        "validation: steered the search; test: other pictures, lettering and drawings. [..] 90 % interval from "
        "the counts.\np: probability of being on the front. fooled: read as the written word."
    )
    for name in ("trial", "weights", "setting"):
        table.add_column(name, overflow="fold")
    for name in ("robustness", "retention", "p", "test robustness", "test retention", "fooled", "clean", "reading"):
        table.add_column(name, justify="right")
    for point in front.front:
        table.add_row(*_cells(point))
    console.print(table)


def _cells(point: Point) -> list[str]:
    settings = {k: v for k, v in point.settings.items() if k != "seed"}
    setting = "untouched model" if point.trial_id == REFERENCE else " ".join(_short(k, v) for k, v in settings.items())
    test = [f"{point.test[n]:.3f}" if n in point.test else "" for n in (
        "robustness", "retention", "attack_success_rate", "clean_accuracy", "reading_accuracy",
    )]  # fmt: skip
    return [
        "" if point.trial_id == REFERENCE else point.trial_id,
        point.variant,
        setting,
        f"{point.robustness:.3f} {_interval(point.robustness_interval)}",
        f"{point.retention:.3f} {_interval(point.retention_interval)}",
        f"{point.probability:.2f}",
        *test,
    ]


def _short(name: str, value: Any) -> str:
    labels = {"loss": "", "kl_weight": "kl ", "learning_rate": "lr ", "beta": "beta "}
    return f"{labels.get(name, name + ' ')}{value:.2g}" if isinstance(value, float) else f"{labels.get(name, name + ' ')}{value}"


def _interval(interval: tuple[float, float]) -> str:
    # The opening bracket is escaped, or rich would take the interval for markup.
    return f"\\[{interval[0]:.3f}, {interval[1]:.3f}]"


def _guarded(run: Callable[[], int]) -> int:
    """Runs a command; an error that the user can mend becomes one line and status 2."""
    try:
        return run()
    except ClippoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with the same --name resumes", file=sys.stderr)
        return 130


def _quiet(verbose: bool) -> None:
    """One thread per process, and without ``--verbose`` no logs of the libraries."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not verbose:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("GLOG_minloglevel", "3")
