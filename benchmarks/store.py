"""What it costs to keep results and to read them, from 1,000 to 100,000 trials on local disk.

A trial of this benchmark is one of the largest sweep that is planned: 14 evaluation sets by 12 variants after
its last epoch, and one validation after each epoch before; two epochs, ten metrics. Up to 1,000 trials are
written one by one, read, and sealed; larger sweeps are made sealed, with settings that trade retention for
robustness more or less well. A reader is a process of its own that reads what the front needs: all trials,
and the counts of the validation sets; another one is the whole of `clippo front`, whose start is what it
takes for a sweep of 20 trials. The files are dropped from the page cache before. Seconds are those after the
start of Python, imports included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.common import (
    RESULTS,
    Line,
    Spread,
    finish,
    load,
    program,
    results_folder,
    the_console,
)  # fmt: skip
from clippo.results import TABLES, ResultStore
from clippo.results.objects import Objects
from clippo.results.sealing import MANIFEST, PART_ROWS, Piece, encode_part, gathered, manifest_of

SECONDS_GOAL, MEMORY_GOAL = 2.0, 1024.0
FEW = 20  # trials of which a front is hardly more than the start of its process
SWEEP = "benchmark"
KINDS = ("attacked", "clean", "reading")
SETS = [f"{s}/{k}/{c}" for s in ("test", "validation") for k in KINDS for c in ("held_out", "seen")]
SETS += ["test/nonsense/held_out", "test/nonsense/seen"]
VALIDATION = [name for name in SETS if name.startswith("validation/")]
VARIANTS = ["averaged", "last", *(f"alpha={alpha / 10:g}" for alpha in range(10))]
ROBUSTNESS_SETS = ["attacked/seen", "attacked/held_out"]
RETENTION_SETS = ["clean/seen", "clean/held_out", "reading/seen", "reading/held_out"]
CONFIG = {
    "task": "typographic",
    "robustness_sets": ROBUSTNESS_SETS,
    "retention_sets": RETENTION_SETS,
    "model": {"name": "ViT-B-32"},
}
UNTOUCHED = range(-1, 0)
"""The number of the untouched model among the trials."""
METRICS = ("loss", "preference_loss", "kl", "train_s", "eval_s")
SETTINGS = {"loss": "ipo", "beta": 0.17, "kl_weight": 9.1, "learning_rate": 1e-4, "epochs": 2, "seed": 0}
TRIAL = {
    **SETTINGS,
    "status": "completed",
    "started_at": datetime(2026, 1, 1, tzinfo=timezone.utc),
    "finished_at": datetime(2026, 1, 1, 1, tzinfo=timezone.utc),
    "batch_size": 512,
    "workers": 2,
    "trainable": "last:2",
    "optimizer": "adamax",
    "precision": "bf16",
    "params_json": "{}",
    "wall_s": 15.3,
    "device_s": 14.4,
    "device_type": "gpu",
    "preemptions": 0,
    "code_version": "0.1.0",
    "git_commit": "0" * 40,
    "packages_json": json.dumps(
        {"ray": "2.60.0", "torch": "2.14.1", "open_clip_torch": "3.3.0", "optuna": "5.0.0", "numpy": "2.4.6"}
    ),
    "model_digest": "0" * 16,
    "data_digest": "0" * 16,
    "prepared_digest": "0" * 16,
}

MEASURE = """
import contextlib, io, json, pathlib, re, sys, time
began = time.perf_counter()

def spent():
    status = pathlib.Path("/proc/self/status").read_text()
    return {
        "seconds": time.perf_counter() - began, "processor": time.process_time(),
        # Not ru_maxrss, which begins with what the parent had.
        "memory": int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024,
    }
"""
READER = (
    MEASURE
    + """
from clippo.results import ResultStore, View
store, sets, sweep = ResultStore(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
ready = time.perf_counter()
trials = store.trials(sweep)
between = time.perf_counter()
columns = ["trial_id", "variant", "eval_set", "epoch", "n_correct", "n_total"]
evals = store.evals(sweep, View(columns=columns, where={"eval_set": sets}, dictionary=True))
print(json.dumps({
    **spent(), "trial_rows": len(trials), "eval_rows": len(evals),
    "imports": ready - began, "trials": between - ready, "evals": time.perf_counter() - between,
}))
"""
)
COMMAND = (
    MEASURE
    + """
from clippo.cli import main
sys.argv, said = ["clippo", "front", sys.argv[1], "--sweep", sys.argv[3]], io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    main()
assert "Recommended" in said.getvalue(), said.getvalue()
print(json.dumps(spent()))
"""
)


def eval_rows(numbers: range, rng: np.random.Generator) -> pa.Table:
    """The evaluations of some trials, as the loop reports them."""
    final = [(2, s, v) for s in SETS for v in VARIANTS]
    each = [(1, s, "averaged") for s in VALIDATION] + final
    epochs, sets, variants = (list(column) for column in zip(*each, strict=True))
    T, R = len(numbers), len(each)
    columns = {
        "sweep": pa.repeat(SWEEP, T * R),
        "trial_id": pa.array(np.repeat([trial_id(n) for n in numbers], R)),
        "attempt": np.zeros(T * R, np.int64),
        "epoch": np.tile(np.array(epochs), T),
        "eval_set": pa.array(np.tile(np.array(sets), T)),
        "variant": pa.array(np.tile(np.array(variants), T)),
        "seed": np.zeros(T * R, np.int64),
        "n_correct": rng.binomial(1280, accuracy(numbers, sets, variants, rng).ravel()),
        "n_total": np.full(T * R, 1280),
        "n_fooled": rng.binomial(1280, 0.2, T * R),
    }
    table = pa.table(columns).cast(TABLES["evals"])
    if numbers == UNTOUCHED:
        variant = table.column_names.index("variant")
        table = table.filter(pc.and_(pc.equal(table["variant"], "alpha=0"), pc.equal(table["epoch"], 2)))
        table = table.set_column(variant, "variant", pa.array(["reference"] * len(table)))
    return table


def accuracy(
    numbers: range, sets: list[str], variants: list[str], rng: np.random.Generator
) -> NDArray[np.float64]:
    """What each trial reaches on each set with each variant of its weights: (T, R).

    It is robust by a stronger tuning, for which it pays elsewhere: some settings less than others.
    """
    along = {"averaged": 1.0, "last": 1.1, "reference": 0.0}
    along_R = np.array([along[v] if v in along else float(v.removeprefix("alpha=")) for v in variants])
    kinds = np.array([name.split("/")[1] for name in sets])
    strength_T1, skill_T1 = rng.random((len(numbers), 1)), rng.normal(1, 0.15, (len(numbers), 1))
    moved_TR = along_R * (0 if numbers == UNTOUCHED else strength_T1)
    gain_TR = 0.5 * skill_T1 * (1 - np.exp(-3 * moved_TR))
    lost_TR = 0.3 * (2 - skill_T1) * moved_TR**3
    attacked = np.char.startswith(kinds, "attacked")
    return np.clip(np.where(attacked, 0.4 + gain_TR, 0.96 - lost_TR), 0.01, 0.99)


def metric_rows(numbers: range, rng: np.random.Generator) -> pa.Table:
    """The training metrics of some trials."""
    T, M = len(numbers), len(METRICS)
    columns = {
        "sweep": pa.repeat(SWEEP, T * 2 * M),
        "trial_id": pa.array(np.repeat([trial_id(n) for n in numbers], 2 * M)),
        "attempt": np.zeros(T * 2 * M, np.int64),
        "epoch": np.tile(np.repeat([1, 2], M), T),
        "step": np.tile(np.repeat([40, 80], M), T),
        "name": pa.array(np.tile(np.array(METRICS), 2 * T)),
        "value": rng.random(T * 2 * M),
    }
    return pa.table(columns).cast(TABLES["metrics"])


def trial_rows(numbers: range, rng: np.random.Generator) -> pa.Table:
    """The trials themselves, each with settings of its own."""
    rows = [
        {
            **TRIAL,
            "sweep": SWEEP,
            "trial_id": trial_id(n),
            "attempt": 0,
            "beta": b,
            "kl_weight": k,
            "learning_rate": r,
            "checkpoint_uri": f"s3://bucket/prefix/checkpoints/sweep={SWEEP}/{trial_id(n)}/policy.safetensors",
        }
        for n, (b, k, r) in zip(numbers, rng.random((len(numbers), 3)).tolist(), strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["trials"])


def trial_id(number: int) -> str:
    return "reference" if number in UNTOUCHED else f"{number:06d}"


def make_sealed(uri: str, trials: int) -> None:
    """A sealed sweep, without the small objects that it would have been sealed from."""
    objects, rng = Objects(uri), np.random.default_rng(0)
    ResultStore(uri).write_config(SWEEP, CONFIG)
    for table, rows in (("trials", trial_rows), ("metrics", metric_rows), ("evals", eval_rows)):

        def pieces(rows=rows) -> Iterator[Piece]:  # type: ignore[no-untyped-def]  # the three above
            for start in range(0, trials, 1000):
                some = range(start, min(start + 1000, trials))
                yield {trial_id(n): 0 for n in some}, rows(some, rng)
            yield {trial_id(n): 0 for n in UNTOUCHED}, rows(UNTOUCHED, rng)

        parts = []
        for piece in gathered(pieces()):
            part, data = encode_part(table, f"{table}/sweep={SWEEP}", piece)
            objects.put(part.key, data)
            parts.append(part)
        objects.put(f"{table}/sweep={SWEEP}/{MANIFEST}", manifest_of(parts))


def read(uri: str, program: str = READER) -> dict[str, float]:
    """What a fresh process needs to read what the front needs, or for another program."""
    evict(Path(uri))
    command = [sys.executable, "-c", program, uri, json.dumps(VALIDATION), SWEEP]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def evict(folder: Path) -> None:
    """Drops files from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size(folder: Path) -> tuple[int, float]:
    """Files below a folder, and their bytes [MiB]."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes) / 2**20


def measure_open(store: ResultStore, trials: int) -> list[Line]:
    """Writes a sweep as a driver does, reads it, and seals it; seconds or milliseconds per trial."""
    rng, seconds = np.random.default_rng(0), []
    for number in range(trials):
        evals = eval_rows(range(number, number + 1), rng).drop_columns(["sweep"]).to_pylist()
        metrics = metric_rows(range(number, number + 1), rng).drop_columns(["sweep"]).to_pylist()
        began = time.perf_counter()
        store.write_started(SWEEP, trial_id(number), 0, SETTINGS)
        store.write_trial(SWEEP, trial_id(number), 0, TRIAL, metrics, evals)
        seconds.append(1000 * (time.perf_counter() - began))
    found = read(store.uri)
    began = time.perf_counter()
    store.compact(SWEEP)
    sealing = 1000 * (time.perf_counter() - began) / trials
    return [
        Line("open: writing a trial", Spread.of(seconds), "ms"),
        Line(
            f"open: reading {trials} trials, per trial", Spread.of([1000 * found["seconds"] / trials]), "ms"
        ),
        Line(f"open: sealing {trials} trials, per trial", Spread.of([sealing]), "ms"),
    ]


def main(
    *, sizes: tuple[int, ...] = (1_000, 10_000, 100_000), opened: int = 1_000, rounds: int = 5,
    smoke: bool = False, results: Path = RESULTS,
) -> None:  # fmt: skip
    """Times the result store.

    Args:
        sizes: trials of the sealed sweeps [count].
        opened: trials of the sweep that is written one by one and sealed [count].
        rounds: times that each is read [count].
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    if smoke:
        sizes, opened, rounds = (20, 40), 3, 2
    console, load_before = the_console(), load()
    lines, single = [], {}
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as temporary:
        lines += measure_open(ResultStore(Path(temporary) / "open"), opened)
        few = str(Path(temporary) / "few")
        make_sealed(few, FEW)
        for trials in sizes:
            uri = Path(temporary) / str(trials)
            began = time.perf_counter()
            make_sealed(str(uri), trials)
            files, mebibytes = size(uri)
            made = time.perf_counter() - began
            console.print(f"{trials} trials: {files} files, {mebibytes:.1f} MiB, made in {made:.1f} s")
            runs = [read(str(uri)) for _ in range(rounds)]
            both = [(read(few, COMMAND), read(str(uri), COMMAND)) for _ in range(rounds)]
            start, whole = [one for one, _ in both], [other for _, other in both]
            beyond = Spread.of([other["seconds"] - one["seconds"] for one, other in both])
            largest = trials == max(sizes) and not smoke
            what = f"sealed, {trials} trials"
            time_goal, memory_goal = (SECONDS_GOAL, MEMORY_GOAL) if largest else (None, None)
            lines += [
                Line(f"{what}: reading", _spread(runs, "seconds"), "s", time_goal, at_least=False),
                Line(f"{what}: processor time, all threads", _spread(runs, "processor"), "s"),
                Line(f"{what}: the imports alone", _spread(runs, "imports"), "s"),
                Line(f"{what}: the trials alone", _spread(runs, "trials"), "s"),
                Line(f"{what}: the counts alone", _spread(runs, "evals"), "s"),
                Line(f"{what}: peak memory", _spread(runs, "memory"), "MiB", memory_goal, at_least=False),
                Line(f"{what}: the whole of clippo front", _spread(whole, "seconds"), "s"),
                Line(f"{what}: clippo front beyond its start", beyond, "s", time_goal, at_least=False),
                Line(
                    f"{what}: peak memory of clippo front",
                    _spread(whole, "memory"),
                    "MiB",
                    memory_goal,
                    at_least=False,
                ),
                Line(f"{what}: on disk", Spread.of([mebibytes]), "MiB"),
            ]
            single[str(trials)] = {
                "files": files,
                "mebibytes": mebibytes,
                "runs": runs,
                "whole": whole,
                "start": start,
            }
    finish(
        "store", lines, results_folder(results, smoke), console,
        settings={
            "sizes": list(sizes), "few": FEW, "opened": opened, "rounds": rounds, "sets": len(SETS),
            "variants": len(VARIANTS), "part_rows": PART_ROWS,
        },
        load_before=load_before, single=single,
    )  # fmt: skip


def _spread(runs: list[dict[str, float]], name: str) -> Spread:
    return Spread.of([run[name] for run in runs])


if __name__ == "__main__":
    program(main, __doc__)
