"""What the driver and the store make of many trials, on a cluster of processes.

Everything of a sweep is real but the training: Ray's nodes, Ray Tune, Optuna, the rows of a trial with their
true size, and an S3 server (SeaweedFS) that they are written to. The trials sleep. The first trials are left
out, as processes start with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.tune.execution.tune_controller import TuneController
from rich.console import Console

from benchmarks.common import RESULTS, Line, Spread, finish, load, program, results_folder, the_console
from benchmarks.store import METRICS, SETS, VALIDATION, VARIANTS
from clippo.config import SearchConfig, SweepConfig
from clippo.evaluate import Counts, Objectives
from clippo.prepared import PreparedSet
from clippo.results import SpooledStore
from clippo.sweep.callback import SweepCallback
from clippo.sweep.progress import ProgressView
from clippo.sweep.rows import Scorer, TrialRows
from clippo.sweep.search import Score, Search
from clippo.tasks import resolved

PICTURES = 384
WINDOW = 200  # trials that a number at the beginning or the end is the mean of


@dataclasses.dataclass(frozen=True)
class Digests:
    """What the rows say of a prepared set that there is none of."""

    model_digest: str = "0" * 16
    data_digest: str = "1" * 16
    digest: str = "2" * 16


def sleeping(config: dict[str, Any], seconds: float) -> None:
    """A trial of two epochs that reports what a real one does."""
    rng = np.random.default_rng(int(config["trial_id"]))
    strength = np.clip(np.log10(config["settings"]["learning_rate"] / 3e-5), 0, 1)

    def counted(eval_set: str, variant: str) -> dict[str, Any]:
        share = 0.4 + 0.5 * strength if "attacked" in eval_set else 0.97 - 0.1 * strength**3
        correct = int(rng.binomial(PICTURES, share))
        fooled = PICTURES - correct if "attacked" in eval_set else 0
        return {
            "eval_set": eval_set, "variant": variant, "n_correct": correct, "n_total": PICTURES,
            "n_fooled": fooled,
        }  # fmt: skip

    for epoch in (1, 2):
        time.sleep(seconds / 2)
        last = [(s, v) for s in SETS for v in VARIANTS if v != "reference"]
        evals = [counted(*what) for what in (last if epoch == 2 else [(s, "averaged") for s in VALIDATION])]
        metrics = {name: float(rng.random()) for name in METRICS}
        tune.report(
            {
                "epoch": epoch, "step": 16 * epoch, "metrics": metrics, "busy_s": seconds * epoch / 2,
                "precision": "bf16", "evals": evals,
            }
        )  # fmt: skip


class TimedStore(SpooledStore):
    """Notes how long each PUT took [s]."""

    def __init__(self, uri: str, report: Callable[[str], object]) -> None:
        super().__init__(uri, report=report)
        self.seconds: list[float] = []

    def _now_or_later(self, key: str, data: bytes, now: Callable[[], bool | None]) -> bool | None:
        began = time.perf_counter()
        taken = super()._now_or_later(key, data, now)
        self.seconds.append(time.perf_counter() - began)
        return taken


class TimedSearch(Search):
    """Notes how long each proposal took [s], without the note in the store that it has begun."""

    def __init__(
        self, search: SearchConfig, score: Score, objectives: Objectives, on_start: Callable[..., None]
    ) -> None:
        super().__init__(search, score, objectives, on_start=self._noting)
        self._note, self._noted, self.seconds = on_start, 0.0, list[float]()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # or FINISHED
        began, self._noted = time.perf_counter(), 0.0
        proposed = super().suggest(trial_id)
        self.seconds.append(time.perf_counter() - began - self._noted)
        return proposed

    def _noting(self, trial_id: str, attempt: int, settings: dict[str, Any]) -> None:
        began = time.perf_counter()
        self._note(trial_id, attempt, settings)
        self._noted = time.perf_counter() - began


@dataclasses.dataclass
class Measured:
    """What a sweep took.

    Attributes:
        ended: wall and processor time of the driver at the beginning and at the end of each trial [s].
        proposals: each [s].
        puts: each [s].
        snapshots: of Ray's own state, each [s].
        snapshot_bytes: of the largest of them.
    """

    ended: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    proposals: list[float] = dataclasses.field(default_factory=list)
    puts: list[float] = dataclasses.field(default_factory=list)
    snapshots: list[float] = dataclasses.field(default_factory=list)
    snapshot_bytes: int = 0

    def note_end(self) -> None:
        self.ended.append((time.perf_counter(), time.process_time()))

    @contextlib.contextmanager
    def watching(self, folder: str) -> Iterator[None]:
        """Notes what Ray does for its own state, which it keeps below the folder."""
        controller_class: Any = TuneController  # it has no types
        original = controller_class.save_to_dir

        def timed(controller: Any) -> None:
            began = time.perf_counter()
            original(controller)
            self.snapshots.append(time.perf_counter() - began)
            sizes = [f.stat().st_size for f in Path(folder).glob("*/experiment_state*")]
            self.snapshot_bytes = max([self.snapshot_bytes, *sizes])

        controller_class.save_to_dir = timed
        try:
            yield
        finally:
            controller_class.save_to_dir = original

    def rate(self, trials: slice, kind: int) -> float:
        """Seconds of each trial of a stretch: 0 of wall time, 1 of the driver's processor time."""
        stretch = self.ended[trials]
        return (stretch[-1][kind] - stretch[0][kind]) / (len(stretch) - 1)


def run(config: SweepConfig, store: TimedStore, seconds: float, console: Console) -> Measured:
    """Runs a sweep of sleeping trials."""
    config, measured = resolved(config), Measured()
    total: dict[str, Any] = {"n_correct": int(0.9 * PICTURES), "n_total": PICTURES, "n_fooled": 0}
    reference = [Counts(eval_set=name, variant="reference", **total) for name in SETS]
    scorer = Scorer(config)

    def score(report: Mapping[str, Any]) -> Mapping[str, float] | None:
        return scorer.of_report(report, reference)

    def on_end(*trial: Any) -> None:
        measured.note_end()
        if (done := len(measured.ended) - 1) % WINDOW == 0:
            wall, work = (measured.rate(slice(-WINDOW - 1, None), kind) for kind in (0, 1))
            told = f"{done} trials; each of the last {WINDOW} took {wall:.3f} s, of the driver's processor "
            console.print(f"{told}{work:.3f} s", highlight=False)

    own, untouched = scorer.objectives, scorer.numbers(reference, reference)
    search = TimedSearch(config.search, score, own, lambda *trial: store.write_started(config.name, *trial))
    with tempfile.TemporaryDirectory(prefix="scale-") as folder, open(os.devnull, "w") as nowhere:
        callback = SweepCallback(
            TrialRows(config, store, cast(PreparedSet, Digests())), score,
            ProgressView(Console(file=nowhere), config.search.trials, own, untouched), on_end,
        )  # fmt: skip
        measured.note_end()
        with measured.watching(folder):
            tune.Tuner(
                tune.with_resources(tune.with_parameters(sleeping, seconds=seconds), {"cpu": 1.0}),
                tune_config=tune.TuneConfig(
                    search_alg=search, num_samples=-1, max_concurrent_trials=config.search.concurrency,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=config.name, storage_path=folder, verbose=0, callbacks=[callback],
                    failure_config=tune.FailureConfig(max_failures=3),
                ),
            ).fit()  # fmt: skip
    measured.proposals, measured.puts = search.seconds, store.seconds
    return measured


@contextlib.contextmanager
def cluster(nodes: int, slots: int) -> Iterator[float]:
    """A Ray of so many nodes with so many logical CPUs each; gives the seconds until all had joined."""
    # Apart from other Rays on this machine, or they would take this one for theirs.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="scale-", dir="/tmp")  # sockets want a short path
    began = time.perf_counter()
    machines = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100_000_000},
    )
    try:
        for _ in range(nodes):
            machines.add_node(num_cpus=slots, object_store_memory=80_000_000)
        ray.init(machines.address, log_to_driver=False, logging_level=logging.ERROR)
        machines.wait_for_nodes(timeout=300)
        yield time.perf_counter() - began
    finally:
        ray.shutdown()
        machines.shutdown()
        shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[str]:
    """An S3 server on loopback, by the variables of the environment."""
    from tests.results.server import OwnS3Server  # it needs what only developers install

    server = OwnS3Server(folder)
    server.start()
    try:
        server.wait()
        os.environ.update(server.environment())
        yield f"s3://{server.bucket}/scale"
    finally:
        server.kill()


def memory_mb() -> float:
    """What this process holds besides files [MB]."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main(
    *, trials: int = 2000, nodes: int = 2, slots: int = 4, seconds: float = 0.2, sampler: str = "tpe",
    loggers: bool = False, suffix: str = "", smoke: bool = False, results: Path = RESULTS,
) -> None:  # fmt: skip
    """Measures what a trial costs that costs nothing.

    Args:
        trials: of the sweep [count].
        nodes: of the cluster, besides the head [count].
        slots: trials at once on each node, logical CPUs [count].
        seconds: that a trial sleeps [s].
        sampler: of the search.
        loggers: also let Ray write its own files of each trial.
        suffix: of the name of the JSON, for another case.
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    if smoke:
        trials, nodes, slots, seconds = 12, 1, 2, 0.1
    console, load_before, window = the_console(), load(), min(WINDOW, trials // 3)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "0" if loggers else "1"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = SearchConfig(
        trials=trials, concurrency=nodes * slots, baselines=(), confirm=0, sampler=cast(Any, sampler)
    )
    with tempfile.TemporaryDirectory(prefix="scale-s3-") as folder, s3(Path(folder)) as uri:
        config = SweepConfig(name="scale", results=uri, search=search)
        store = TimedStore(uri, report=console.print)
        with store, cluster(nodes, slots) as joined:
            console.print(f"{nodes} nodes have joined after {joined:.0f} s", highlight=False)
            memory_before = memory_mb()
            found = run(config, store, seconds, console)
            memory = memory_mb() - memory_before
        written = len(store.finished("scale"))
    assert written == trials, f"{written} of {trials} trials have rows"
    early, late, whole = slice(window, 2 * window + 1), slice(-window - 1, None), slice(window, None)
    wall = found.ended[-1][0] - found.ended[0][0]

    def one(what: str, value: float, unit: str) -> Line:
        return Line(what, Spread.of([value]), unit)

    lines = [
        one("driver, processor time of a trial", found.rate(whole, 1), "s"),
        one(f"driver, processor time of a trial, {window} early ones", found.rate(early, 1), "s"),
        one(f"driver, processor time of a trial, the last {window}", found.rate(late, 1), "s"),
        one("trials that ended in an hour", 3600 / found.rate(whole, 0), "trials"),
        Line("proposing settings", Spread.of(found.proposals), "s"),
        Line(f"proposing settings, the last {window}", Spread.of(found.proposals[-window:]), "s"),
        Line("one PUT", Spread.of(found.puts), "s"),
        one("PUTs of a trial", len(found.puts) / trials, ""),
        one("PUTs in a second", len(found.puts) / wall, "1/s"),
        one("PUTs in a second that the driver writes", len(found.puts) / sum(found.puts), "1/s"),
        one("snapshots of Ray's state", len(found.snapshots), ""),
        one("seconds of all snapshots", sum(found.snapshots), "s"),
        one("size of the largest", found.snapshot_bytes / 1e6, "MB"),
        one("memory that the driver has gained", memory, "MB"),
        one(f"until {nodes} nodes had joined", joined, "s"),
    ]
    finish(
        f"scale{suffix and '-'}{suffix}", lines, results_folder(results, smoke), console,
        settings={
            "trials": trials, "nodes": nodes, "slots": slots, "seconds": seconds, "sampler": sampler,
            "loggers": loggers,
        },
        load_before=load_before,
        ended=[[round(now - began, 2) for now, began in zip(e, found.ended[0], strict=True)]
               for e in found.ended[::50]],
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
