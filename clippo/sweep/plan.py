"""What a sweep would do, without doing it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clippo.config import SweepConfig
from clippo.data.prompts import templates_of
from clippo.errors import ClippoError
from clippo.model.towers import check_name
from clippo.results import ResultStore
from clippo.sweep.checks import check_unused
from clippo.sweep.cost import estimate, remembered, trials_of, work_of
from clippo.sweep.mirror import check_mirror
from clippo.sweep.scheduler import rule_of
from clippo.sweep.space import distributions
from clippo.sweep.tracking import check_tracking
from clippo.tasks import resolved, task_named


def print_plan(config: SweepConfig, console: Console) -> None:
    """The whole configuration, the search space, the resources, an estimate, and what is there of its needs.

    Raises:
        ConfigError: what is not even printed, since it has a secret in it; an unknown task, or a setting that
            means nothing to it.
    """
    check_mirror(config.search.mirror)
    check_unused(config)
    config = resolved(config)
    for title, rows in (
        ("configuration", _settings(config)),
        ("search space", _space(config)),
        ("resources", _resources(config)),
        ("estimate", _estimate(config)),
    ):
        table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # a path may look like markup
        console.print(table, highlight=False)
        console.print()
    console.print("[italic]what must be there[/]")
    for what, missing in needs(config):
        console.print(Text(f"{'missing' if missing else 'there':<8} {what}"), soft_wrap=True)
        if missing:
            console.print(Text(f"{'':<9}{missing}"), soft_wrap=True)


def _settings(config: SweepConfig) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                yield f"{field.name}.{inner.name}", _shown(getattr(value, inner.name))
        else:
            yield field.name, _shown(value)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _space(config: SweepConfig) -> Iterator[tuple[str, str]]:
    space: dict[str, BaseDistribution] = {}
    for loss in config.search.losses:
        space |= distributions(config.search, loss, config.model.trainable)
    for name, values in space.items():
        if isinstance(values, CategoricalDistribution):
            yield name, " | ".join(map(str, values.choices))
        elif isinstance(values, (FloatDistribution, IntDistribution)):
            scale = "log" if values.log else "linear"
            yield name, f"{values.low:g} to {values.high:g}, {scale}"


def _resources(config: SweepConfig) -> Iterator[tuple[str, str]]:
    search, at_once = config.search, config.search.concurrency
    fewest, most = max(1, config.min_workers), max(1, config.max_workers)
    others = f"{len(search.baselines)} to compare with, {search.confirm} to confirm"
    settings = -(-search.trials // search.replicates)
    yield "trials", f"{search.trials} of {settings} settings, and {others}; {at_once} at once"
    more = f", up to {at_once} x {most} = {at_once * most}" if config.is_elastic else ""
    yield "processes", f"{at_once} x {fewest} = {at_once * fewest} of 1 CPU each{more}"
    if config.gpus_per_worker:
        gpus = at_once * fewest * config.gpus_per_worker
        more = f", up to {at_once * most * config.gpus_per_worker:g}" if config.is_elastic else ""
        yield "GPUs", f"{at_once} x {fewest} x {config.gpus_per_worker:g} = {gpus:g}{more}"
    with contextlib.suppress(ClippoError):  # no pictures: what is missing is said below
        pairs = task_named(config.task)(config.data).n_pairs
        steps = -(-pairs // config.train.batch_size)
        folds = f", and {config.data.folds} times with a fold less" if config.data.folds else ""
        yield "a trial", f"at most {search.epochs[1]} epochs of {steps} steps over {pairs} pairs{folds}"
    if (rule := rule_of(search)) is not None:
        yield "stopped early", str(rule)
    bounds = {"device_hours": "device-hours", "wall_hours": "hours", "patience": "trials without growth"}
    ends = [f"{getattr(search, n):g} {what}" for n, what in bounds.items() if getattr(search, n)]
    if ends:
        yield "at the latest", "after " + ", or ".join(ends)


def _estimate(config: SweepConfig) -> Iterator[tuple[str, str]]:
    """What the sweep takes, and from what that is known; nothing is run for it."""
    try:
        work = work_of(config)
    except ClippoError:
        yield "work", "cannot be counted before the pictures are there (below)"
        return
    yield (
        "work",
        f"{trials_of(config)} trials, each {work.pairs:g} pairs and at most {work.measured:g} measured "
        f"pictures on average; {work.prepared} pictures to prepare; counted from the configuration",
    )
    speed = remembered(config)
    if speed is None:
        yield "time, cost", "not measured here yet; clippo doctor with these flags does it in a minute"
        return
    yield from estimate(config, work, speed)
    yield "measured", f"by clippo doctor on {speed.device} at {speed.at}"


def needs(config: SweepConfig) -> Iterator[tuple[str, str]]:
    """Each thing, and what is wrong with it if anything is."""
    checks: list[tuple[str, Callable[[], object]]] = [
        (_model(config), lambda: check_name(config.model.name, config.model.pretrained)),
        (f"prompt {config.model.prompt}", lambda: templates_of(config.model.prompt)),
        *task_named(config.task).needs(config.data),
        (f"results {config.results}", lambda: ResultStore(config.results).check()),
        *(
            (f"tracker {name}", partial(check_tracking, replace(config, track=(name,))))
            for name in config.track
        ),
    ]
    for what, check in checks:
        try:
            check()
        except ClippoError as error:
            yield what, str(error)
        else:
            yield what, ""


def _model(config: SweepConfig) -> str:
    name, pretrained = config.model.name, config.model.pretrained
    if name.startswith("hf-hub:") or (pretrained and not Path(pretrained).exists()):
        return f"model {name}, known; its weights are downloaded when they are first used"
    return f"model {name}"
