"""The subcommands of ``clippo``: their fields are their flags."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import tyro
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clippo.config import DataConfig, ModelConfig, SweepConfig, absolute, check_seed
from clippo.errors import ConfigError
from clippo.evaluate import Counts
from clippo.evaluate.rankings import RankingTable
from clippo.front import wilson_interval
from clippo.front.follow import followed
from clippo.front.front import Front
from clippo.front.measured import of_rankings
from clippo.front.points import front_of
from clippo.front.split import Ranked
from clippo.front.table import print_front, shown_interval
from clippo.front.uncertainty import CONFIDENCE
from clippo.process import Console, quiet
from clippo.results import ResultStore

PATIENCE = 60.0  # how long a store may be away while it is followed, and when a sweep has ended [s]
PROGRESS_COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
)  # fmt: skip


@dataclass(frozen=True)
class FrontCommand:
    """Print the front of what is in a store and what to choose of it, also while the sweep still runs."""

    store: Annotated[str, tyro.conf.Positional]
    """A folder or s3://bucket/prefix."""
    sweep: str = ""
    """Name of the sweep; needed when the store holds more than one."""
    min_retention: float | None = None
    """What the recommended point must keep of what the untouched model can do; default: the bound of the
    sweep, or 0.98 [share]."""
    all: bool = False
    """Print the whole front and not some well-spread points of it."""
    json: bool = False
    """Print JSON instead of a table."""
    plot: str = ""
    """Also draw the front into this file: .png, .svg or .html."""
    follow: bool = False
    """Show it again whenever trials have ended, until the sweep has, or Ctrl-C (exit status 130)."""
    every: float = 10.0
    """With --follow: time between two looks at the store [s]."""

    def run(self) -> int:
        store = ResultStore(self.store, patience=PATIENCE if self.follow else 0.0)
        sweep, bound = _only_sweep(store, self.sweep), self.min_retention
        if not self.follow:
            gc.disable()  # the process ends soon; to look through all rows for cycles takes a tenth of it
            self._show(front_of(store, sweep, min_retention=bound))
            return 0
        for front in followed(store, sweep, Console(stderr=True), every=self.every, min_retention=bound):
            self._show(front)
        return 0

    def _show(self, front: Front) -> None:
        console = Console()
        if self.json:
            print(json.dumps(front.to_json(), indent=None if self.follow else 1), flush=True)
        else:
            if self.follow and console.is_terminal:
                console.clear()
            print_front(front, console, everything=self.all)
        if self.plot:
            from clippo.front.plot import front_chart, save_chart  # Altair takes a second to import

            save_chart(front_chart(front), self.plot)


@dataclass(frozen=True)
class ReportCommand:
    """Write a sweep as one HTML file that needs no network: for a paper's appendix, or to show."""

    store: Annotated[str, tyro.conf.Positional]
    """A folder or s3://bucket/prefix."""
    out: Path = Path("report.html")
    """The file to write."""
    sweep: str = ""
    """Name of the sweep; needed when the store holds more than one."""
    min_retention: float | None = None
    """What the recommended point must keep of what the untouched model can do; default: the bound of the
    sweep, or 0.98 [share]."""

    def run(self) -> int:
        from clippo.front.report import write_report  # Altair and Optuna take a second to import

        store = ResultStore(self.store)
        sweep = _only_sweep(store, self.sweep)
        write_report(store, sweep, self.out, min_retention=self.min_retention, store_name=self.store)
        print(f"wrote {self.out}")
        return 0


@dataclass(frozen=True)
class PrepareCommand:
    """Build the prepared set of a sweep ahead; the sweep with the same model and data then finds it."""

    results: str = "./results"
    """The --results of the sweep: a folder or s3://bucket/prefix."""
    task: str = "typographic"
    """What is measured and tuned against."""
    workers: int = 2
    """Processes that prepare pictures, of Ray or of the cluster that this is started in [count]."""
    gpus_per_worker: float = 0.0
    """GPUs of each of them."""
    verbose: bool = False
    """Show the logs of Ray."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def run(self) -> int:
        quiet(self.verbose)
        from clippo.prepared import fetch, open_prepared  # Ray and torch take seconds
        from clippo.sweep.checks import check_unused
        from clippo.sweep.preparing import prepared_for

        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; it must be at least 1")
        config = absolute(
            SweepConfig(
                task=self.task, results=self.results, gpus_per_worker=self.gpus_per_worker,
                verbose=self.verbose, model=self.model, data=self.data,
            )
        )  # fmt: skip
        check_unused(config)
        store = ResultStore(self.results)
        store.check()
        shared = prepared_for(config, store, Console(stderr=True), workers=self.workers)
        prepared = open_prepared(fetch(shared.prepared, shared.location))
        print(f"prepared set {shared.prepared} in {shared.location}")
        for data in (*prepared.train.values(), *prepared.evaluation):
            print(f"{len(data.rows):>9} {data.name}")
        for key, reason in prepared.left_out:
            print(f"left out: {key}: {reason}")
        return 0


COLUMNS = {
    "accuracy": "accuracy", "attack_success_rate": "read as the word", "max_skew": "MaxSkew", "ndkl": "NDKL",
    "majority_share": "majority's share",
}  # fmt: skip
"""What a set may have been measured for; those of rankings are means over the queries."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure any open_clip model, with intervals: clean and attacked accuracy and attack success, or, of
    people, how even their rankings are and which concepts and groups are read right.
    """

    model: str = "clippo-demo"
    """open_clip model name."""
    pretrained: str | None = None
    """Pretrained tag or checkpoint file, such as one that clippo export wrote."""
    data: str = "demo"
    """rta-100:PATH, paint:PATH, disentangling:PATH, scam:PATH, or any source: demo, folder:PATH, table:PATH,
    webdataset:PATH, torchvision:NAME:PATH; or people of several groups: people, grouped:FILE, fairface:PATH,
    vl-bias:PATH (docs/GENDER.md)."""
    prompt: str = "a photo of a {}"
    """As model.prompt of a sweep; a torchvision set that has a customary prompt takes that."""
    class_names: str = ""
    """Readable names of a source's classes, as data.class_names of a sweep."""
    pictures: int = 2000
    """Pictures of a source or of people at most; other published sets are taken whole [count]."""
    top_k: int = DataConfig().top_k
    """Of people: the top of a ranking that is looked at [count]."""
    groups: tuple[str, ...] = ()
    """Of people whom nobody has labelled: what to tell apart, such as man woman."""
    font_size: tuple[float, float] = DataConfig().font_size
    """Font size of the words drawn on a source's pictures [share of the picture's shorter side]."""
    seed: int = 0
    """Seed of the words drawn."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        check_seed("seed", self.seed)
        quiet(verbose=False, one_thread=False)
        import torch  # it takes seconds

        from clippo.evaluation import evaluate_model
        from clippo.model import load_clip

        clip = load_clip(self.model, self.pretrained)
        clip.model.to("cuda" if torch.cuda.is_available() else "cpu")
        console = Console(stderr=True)
        with Progress(
            *PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            shown = progress.add_task("measuring", total=None)
            counts, left_out = evaluate_model(
                clip, self.data, prompt=self.prompt, pictures=self.pictures, font_size=self.font_size,
                seed=self.seed, class_names=self.class_names, top_k=self.top_k,
                groups=self.groups,
                on_progress=lambda done, n: progress.update(shown, completed=done, total=n),
            )  # fmt: skip
        if self.json:
            print(json.dumps({"sets": [_measured(c) for c in counts], "left_out": left_out}, indent=1))
            return 0
        title = Text(f"{self.model} on {self.data}")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        rows = [_measured(c) for c in counts]
        columns = {name: title for name, title in COLUMNS.items() if any(name in row for row in rows)}
        for heading in ("set", "pictures", *columns.values()):
            table.add_column(heading, justify="left" if heading == "set" else "right")
        for row in rows:
            numbers = [
                f"{row[name]:.3f} ({shown_interval(row[f'{name}_interval'])})" if name in row else ""
                for name in columns
            ]
            table.add_row(Text(row["set"]), str(row["n_total"]), *numbers)
        Console().print(table)
        resampled = "; of rankings from resampled pictures" if "max_skew" in columns else ""
        print(f"in brackets: 90 % intervals (Wilson) from the counts{resampled}")
        if left_out:
            print(f"{len(left_out)} left out, the first: {left_out[0]}", file=sys.stderr)
        return 0


def _measured(counts: Counts) -> dict[str, Any]:
    """The counts of one set with their shares and 90 % intervals."""
    row: dict[str, Any] = {
        "set": counts.eval_set.removeprefix("test/"),
        "n_correct": counts.n_correct,
        "n_total": counts.n_total,
        "n_fooled": counts.n_fooled,
        "accuracy": counts.accuracy,
        "accuracy_interval": _wilson(counts.n_correct, counts.n_total),
    }
    if "attacked" in counts.eval_set:
        row["attack_success_rate"] = counts.n_fooled / counts.n_total
        row["attack_success_rate_interval"] = _wilson(counts.n_fooled, counts.n_total)
    if counts.rankings:
        table = RankingTable.of(counts.rankings)
        one = Ranked(table=table, point_L=np.zeros(len(table), dtype=np.int64), points=1)
        for name, values in of_rankings(one).items():
            value, low, high = (float(x[0]) for x in values)
            row |= {name: value, f"{name}_interval": (low, high)}
    return row


def _wilson(count: int, total: int) -> tuple[float, float]:
    low, high = wilson_interval(count, total, CONFIDENCE)
    return float(low), float(high)


@dataclass(frozen=True)
class ExportCommand:
    """Write a trial as a checkpoint that open_clip.create_model loads, and a model card."""

    store: Annotated[str, tyro.conf.Positional]
    """A folder or s3://bucket/prefix."""
    trial: str
    """Id of the trial, from the front."""
    out: Path
    """The file to write, ending in .safetensors; the card goes beside it."""
    sweep: str = ""
    """Name of the sweep; needed when the store holds more than one."""
    variant: str = "averaged"
    """averaged or last."""
    alpha: float | None = None
    """A point of the trial's curve: 0 is the untouched model, 1 the trial."""
    t: float | None = None
    """The same for a trained transform: the power of its singular values."""

    def run(self) -> int:
        quiet(verbose=False)
        from clippo.export import export  # torch takes seconds

        store = ResultStore(self.store)
        sweep = _only_sweep(store, self.sweep)
        written = export(
            store, sweep, self.trial, self.out, variant=self.variant, alpha=self.alpha, power=self.t
        )
        print(f"wrote {written.weights} and {written.card}\n\n{written.usage}")
        return 0


def _only_sweep(store: ResultStore, name: str) -> str:
    """The named sweep, or the one that there is."""
    names = store.sweeps()
    if name and name not in names:
        store.known_config(name)  # which says what there is
    if not name and len(names) != 1:
        raise ConfigError(
            f"{store.uri} holds {len(names)} sweeps; name one with --sweep: {', '.join(names)}"
            if names
            else f"{store.uri} holds no sweep; give the --results of one"
        )
    return name or names[0]


@dataclass(frozen=True)
class CompactCommand:
    """Seal the rows of a sweep into few files and a manifest; also while it runs, and again later."""

    store: Annotated[str, tyro.conf.Positional]
    """A folder or s3://bucket/prefix."""
    sweep: str = ""
    """Name of the sweep; needed when the store holds more than one."""

    def run(self) -> int:
        store = ResultStore(self.store)
        sweep = _only_sweep(store, self.sweep)
        print(f"{store.compact(sweep)} trials of {sweep} are sealed")
        return 0


@dataclass(frozen=True, kw_only=True)
class DoctorCommand(SweepConfig):
    """Look for what would stop a sweep with these flags, before machines are paid for (exit status 2)."""

    probe_trial: bool = True
    """Run a short real trial, of a minute at most, and say what the sweep would take."""
    worker_wait: float = 600.0
    """How long to wait for a worker with --autoscaling, when none is up to be checked [seconds]."""
    price_per_device_hour: float | None = None
    """Price of a GPU, or of a CPU where workers have no GPU, for an hour, in any currency, where
    the file of --prices does not say it."""
    prices: str = ""
    """A CSV file of lines such as 'A100,3.67': what a device calls itself, or words of that, or 'CPU'; and
    its price for an hour, in any currency. What it lacks has its list price of AWS on demand, where known."""

    def run(self) -> int:
        quiet(self.verbose)
        # Ray and torch take seconds
        from clippo.doctor import examine, print_findings
        from clippo.sweep.cost import read_prices

        prices = read_prices(self.prices) if self.prices else {}
        if (price := self.price_per_device_hour) is not None:
            if not 0 <= price < math.inf:
                raise ConfigError(f"--price-per-device-hour is {price:g}; give 0 or more")
            prices[""] = price  # of a device without a name, which every device is
        if not 0 <= self.worker_wait < math.inf:
            raise ConfigError(f"--worker-wait is {self.worker_wait:g}; give 0 or more seconds")
        config = SweepConfig(**{f.name: getattr(self, f.name) for f in fields(SweepConfig)})
        findings = examine(config, probe_trial=self.probe_trial, prices=prices, worker_wait=self.worker_wait)
        return 2 if print_findings(findings, Console()) else 0


class Command(Protocol):
    """A subcommand: its fields are its flags."""

    def run(self) -> int:
        """Does it; the exit status."""
        ...


COMMANDS: dict[str, Callable[..., Command]] = {
    "front": FrontCommand,
    "report": ReportCommand,
    "prepare": PrepareCommand,
    "export": ExportCommand,
    "compact": CompactCommand,
    "evaluate": EvaluateCommand,
    "doctor": DoctorCommand,
}
