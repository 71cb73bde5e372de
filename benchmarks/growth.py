"""How building the prepared set and an epoch grow with the number of pictures, in time and in memory.

Each number of pictures has a process of its own, so that its peak of memory is its own. Memory is what a
process and its children hold besides files (RssAnon): mapped files are page cache, which the system takes
back. Needs /proc, so Linux.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import torch

from benchmarks.common import (
    BUNDLED,
    RESULTS,
    ROOT,
    Line,
    NoCheckpoints,
    Spread,
    data_of,
    finish,
    load,
    opened,
    prepared_folder,
    program,
    random_model,
    results_folder,
    the_console,
    the_device,
)  # fmt: skip
from clippo.config import TrainConfig
from clippo.front.plot import save_chart
from clippo.model import policy_of
from clippo.train import TrialSettings, fit

SIZES = (1_000, 3_000, 10_000, 30_000)
EPOCHS = 5  # of each size, of which the median counts
LINEAR_GOAL, MEMORY_GOAL = 1.1, 1.1  # the largest size beside the smallest but one, and beside the smallest
WAITING_GOAL = 0.05
MIB = 2**20


def measure(pictures: int, trainable: str, workers: int, threads: int, folder: Path) -> dict[str, float]:
    """Builds a prepared set of this many pictures and trains on it."""
    torch.set_num_threads(threads)
    model = dataclasses.replace(random_model(BUNDLED, folder), trainable=trainable)
    with peak_memory() as build_peak:
        began = time.perf_counter()
        built = prepared_folder(data_of(pictures, eval_pictures=16), model, folder, workers=workers)
        build_s = time.perf_counter() - began
    settings = TrialSettings(loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=1e-5, epochs=EPOCHS, seed=0)
    reports: list[dict[str, Any]] = []
    with peak_memory() as epoch_peak:
        began = time.perf_counter()
        clip, prepared, frozen = opened(built, model)
        open_s = time.perf_counter() - began
        fit(
            policy_of(clip, trainable), prepared, frozen, settings, TrainConfig(), report=reports.append,
            checkpoints=NoCheckpoints(), device=the_device(),
        )  # fmt: skip
    return {
        "pictures": pictures,
        "build_s": build_s,
        "build_peak_mib": build_peak() / MIB,
        "disk_mib": sum(f.stat().st_size for f in built.rglob("*") if f.is_file()) / MIB,
        "open_s": open_s,
        "epoch_s": Spread.of([r["metrics"]["train_s"] for r in reports]).median,
        "epoch_waiting_s": Spread.of([r["metrics"]["data_s"] for r in reports]).median,
        "epoch_peak_mib": epoch_peak() / MIB,
    }


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """The most bytes that this process and its children held at once, looked up every 50 ms."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, sum(map(_anonymous, _tree(os.getpid()))))
            if done.wait(0.05):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        watcher.join()


def _tree(pid: int) -> list[int]:
    """A process and all that it started."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in path.read_text().split()]
        except OSError:  # it has ended
            continue
    return [pid, *(p for child in children for p in _tree(child))]


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def main(
    *, sizes: tuple[int, ...] = SIZES, rounds: int = 5, trainable: str = "last:1", workers: int = 1,
    threads: int = 2, smoke: bool = False, results: Path = RESULTS, one: int = 0, folder: Path = Path(),
) -> None:  # fmt: skip
    """Builds prepared sets of growing size and trains an epoch on each.

    Args:
        sizes: pictures, and pairs [count].
        rounds: how often every size is measured, one size after another [count].
        trainable: image, last:K or transform, of the bundled model.
        workers: processes that build; more than 1 are workers of Ray [count].
        threads: threads of torch in the epoch [count].
        smoke: tiny, to see that the program works.
        results: folder of the JSON, the CSV and the plot.
        one: measure this one size in this process and print it, as the program calls itself [count].
        folder: where ``one`` puts its prepared set.
    """
    if one:
        print(json.dumps(measure(one, trainable, workers, threads, folder)))
        return
    if smoke:
        sizes, rounds, threads = (32, 64), 1, 1
    console, load_before = the_console(), load()
    torch.set_num_threads(threads)
    measured: list[list[dict[str, float]]] = []  # of each round, by size
    for _ in range(rounds):
        measured.append([])
        for size in sizes:
            measured[-1].append(found := _in_a_process(size, trainable, workers, threads))
            console.print("  ".join(f"{n} {v:.4g}" for n, v in found.items()), highlight=False)
    flat = [{"round": n, **row} for n, rows in enumerate(measured, 1) for row in rows]
    path = results_folder(results, smoke)
    with (path / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    save_chart(chart(medians(measured)), str(path / "growth.png"))
    finish(
        "growth", lines_of(measured), path, console,
        settings={
            "sizes": sizes, "rounds": rounds, "trainable": trainable, "workers": workers, "threads": threads,
        },
        load_before=load_before, measured=flat,
    )  # fmt: skip


def _in_a_process(size: int, trainable: str, workers: int, threads: int) -> dict[str, float]:
    folder = tempfile.mkdtemp(prefix="clippo-benchmark-")
    command = [sys.executable, "-m", "benchmarks.growth", "--one", str(size), "--trainable", trainable]
    command += ["--workers", str(workers), "--threads", str(threads), "--folder", folder]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(folder)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(measured: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """Of each size the medians of all rounds."""
    return [
        {key: Spread.of([row[key] for row in rows]).median for key in rows[0]}
        for rows in zip(*measured, strict=True)
    ]


def lines_of(measured: Sequence[Sequence[dict[str, float]]]) -> list[Line]:
    """The growth from the smallest to the largest size, of each round.

    Time: seconds a picture at the largest size over those at the second smallest, since at the smallest what
    is done once still counts; and the exponent of pictures between them. Memory: largest over smallest.
    """
    lines = []
    sizes = np.array([row["pictures"] for row in measured[0]])
    base = 1 if len(sizes) > 2 else 0
    for name, key in (("building", "build_s"), ("an epoch", "epoch_s")):
        seconds_RS = np.array([[row[key] for row in rows] for rows in measured])
        each_RS = seconds_RS / sizes
        grown = f"{name}: seconds a picture, {sizes[-1]:,} over {sizes[base]:,} pictures"
        exponents = [float(np.polyfit(np.log(sizes[base:]), np.log(s[base:]), 1)[0]) for s in seconds_RS]
        lines += [
            Line(grown, Spread.of(list(each_RS[:, -1] / each_RS[:, base])), "x", LINEAR_GOAL, at_least=False),
            Line(f"{name}: exponent of pictures, from {sizes[base]:,} on", Spread.of(exponents), ""),
            Line(f"{name}: of 1,000 pictures, at {sizes[-1]:,}", Spread.of(list(1000 * each_RS[:, -1])), "s"),
        ]
    for i, size in enumerate(sizes):
        shares = Spread.of([rows[i]["epoch_waiting_s"] / rows[i]["epoch_s"] for rows in measured])
        what = f"an epoch: waiting for data, {size:,} pictures"
        lines.append(Line(what, shares, "share", WAITING_GOAL, at_least=False))
    for name, key in (("building", "build_peak_mib"), ("an epoch", "epoch_peak_mib")):
        ratio = Spread.of([rows[-1][key] / rows[0][key] for rows in measured])
        what = f"{name}: peak memory, {sizes[-1]:,} over {sizes[0]:,} pictures"
        lines.append(Line(what, ratio, "x", MEMORY_GOAL, at_least=False))
        lines.append(Line(f"{name}: peak memory", Spread.of([rows[-1][key] for rows in measured]), "MiB"))
    return lines


def chart(measured: Sequence[dict[str, float]]) -> alt.HConcatChart:
    """Time and memory against pictures; a line through the largest size shows what linear would be."""
    largest = measured[-1]

    def panel(title: str, keys: dict[str, str], linear: bool) -> alt.LayerChart:
        rows = [
            {"pictures": m["pictures"], "value": m[k], "of": n} for m in measured for n, k in keys.items()
        ]
        base = alt.Chart(alt.InlineData(values=rows)).encode(
            alt.X("pictures:Q", title="pictures"),
            alt.Y("value:Q", title=title),
            alt.Color("of:N", title=None, scale=alt.Scale(domain=list(keys), range=["#0072B2", "#D55E00"])),
            alt.Shape("of:N", title=None, scale=alt.Scale(domain=list(keys), range=["circle", "square"])),
        )
        layers = [base.mark_point(filled=True, size=70, opacity=1)]
        if linear:
            ends = [
                {"pictures": x, "value": largest[k] * x / largest["pictures"], "of": n}
                for x in (0, largest["pictures"])
                for n, k in keys.items()
            ]
            line = alt.Chart(alt.InlineData(values=ends)).mark_line(strokeDash=[4, 3], strokeWidth=1)
            layers.append(line.encode(x="pictures:Q", y="value:Q", color="of:N"))
        else:
            layers.append(base.mark_line(strokeWidth=1))
        return alt.layer(*layers).properties(width=320, height=240)

    return alt.hconcat(
        panel("seconds", {"building": "build_s", "an epoch": "epoch_s"}, linear=True),
        panel(
            "peak memory [MiB]", {"building": "build_peak_mib", "an epoch": "epoch_peak_mib"}, linear=False
        ),
    )


if __name__ == "__main__":
    program(main, __doc__)
