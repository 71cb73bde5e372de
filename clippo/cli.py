"""The programs: ``clippo`` with its subcommands, and a sweep from its flags."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TypeVar

import tyro
from rich.text import Text

from clippo.commands import COMMANDS, PATIENCE
from clippo.config import SweepConfig, absolute
from clippo.errors import ConfigError, StoreError
from clippo.front.points import front_of
from clippo.front.table import print_front
from clippo.process import Console, guarded, quiet
from clippo.results import ResultStore

Parsed = TypeVar("Parsed")

Presets = Mapping[str, Callable[[], SweepConfig]]


def sweep_main(presets: Presets, description: str | None) -> None:
    """Runs a sweep from its flags and ends the process: 0, 1 (failed), 2 (to mend) or 130 (interrupted).

    Args:
        presets: configurations that ``--preset NAME`` starts from; without it the first.
    """

    def run() -> int:
        config = _sweep_config(presets, description)
        quiet(config.verbose)
        from clippo.sweep.plan import print_plan  # these take seconds to import; --help needs none
        from clippo.sweep.tuner import named, run_sweep

        config, console = named(config), Console()
        if config.dry_run:
            print_plan(absolute(config), console)
            return 0
        try:
            front = run_sweep(config, console)
        except KeyboardInterrupt:
            with contextlib.suppress(StoreError):  # nothing measured yet
                print_front(front_of(ResultStore(config.results), config.name), console)
            print(f"interrupted; the same command with --name {config.name} goes on", file=sys.stderr)
            return 130
        print_front(front, console)
        where = f"clippo front {shlex.quote(config.results)} --sweep {front.sweep}"
        console.print(Text(f"results: {config.results}   this table again: {where}"), soft_wrap=True)
        console.print(Text(f"report: {_kept_report(config.results, front.sweep)}"), soft_wrap=True)
        if front.completed + front.stopped == 0:
            console.print("[red]no trial of the sweep was completed[/]")
            return 1
        return 0

    sys.exit(guarded(run))


def _kept_report(results: str, sweep: str) -> str:
    """Keeps the report beside the rows, for whoever has the store's address alone; says where it is."""
    from clippo.front.report import report_of  # Altair and Optuna take a second to import

    store, name = ResultStore(results, patience=PATIENCE), f"reports/{sweep}.html"
    store.write_bytes(name, report_of(store, sweep, store_name=results).encode())
    return f"{results.rstrip('/')}/{name}"


def _sweep_config(presets: Presets, description: str | None) -> SweepConfig:
    """What the flags say, on top of a preset."""
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    chosen.add_argument("--preset", default=next(iter(presets)))
    try:
        flags, others = chosen.parse_known_args()
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}: {', '.join(presets)}") from None
    if flags.preset not in presets:
        raise ConfigError(f"--preset is {flags.preset!r}; it must be one of: {', '.join(presets)}")
    default = presets[flags.preset]()
    arguments = [_full_flag(argument, _short_flags(default)) for argument in others]
    return _parsed(lambda: tyro.cli(SweepConfig, default=default, description=description, args=arguments))


def _short_flags(config: SweepConfig) -> dict[str, str]:
    """``precision`` for ``train.precision``: nested fields whose own name is enough."""
    groups = {f.name: getattr(config, f.name) for f in fields(config)}
    nested = [(group, f.name) for group, c in groups.items() if is_dataclass(c) for f in fields(c)]
    names = Counter(name for _, name in nested)
    return {
        prefix + name.replace("_", "-"): f"{group}.{prefix}{name.replace('_', '-')}"
        for group, name in nested
        if names[name] == 1 and name not in groups
        for prefix in ("", "no-")
    }


def _full_flag(argument: str, short: Mapping[str, str]) -> str:
    name, equals, value = argument.removeprefix("--").partition("=")
    full = short.get(name.replace("_", "-")) if argument.startswith("--") else None
    return f"--{full}{equals}{value}" if full else argument


def main() -> None:
    """The ``clippo`` program."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["prepare"], ["doctor"]):  # their flags are those of a sweep
        short = _short_flags(SweepConfig())
        arguments = [_full_flag(argument, short) for argument in arguments]
    parse = partial(tyro.extras.subcommand_cli_from_dict, COMMANDS, args=arguments)
    sys.exit(guarded(lambda: _parsed(parse).run()))


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
