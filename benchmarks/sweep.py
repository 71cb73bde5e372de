"""A sweep of clippo beside the same settings run through Ray Tune around the published procedure.

Both are commands that start from nothing: ``sweeps/typo_sweep.py`` with its defaults (it prepares its
pictures, searches, measures, keeps checkpoints and rows), then ``benchmarks.published_sweep`` with the
settings that the first one tried, as many trials at once, one thread each. The second one measures what the
published code does, which is clean and attacked pictures, and the averaged weights on the other sets that
clippo measures, since one of them is part of an objective; once more without these.

By default a trial of clippo also measures the curve between reference and tuned weights, which the published
procedure does not have; so the first command is run once more without it. Its search may draw other settings,
since what it knows depends on which trial ends first; the epochs of all its trials are told, and no ratio.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    RESULTS,
    ROOT,
    Line,
    Spread,
    finish,
    load,
    program,
    ratios,
    results_folder,
    the_console,
)  # fmt: skip
from clippo.config import DataConfig, SearchConfig, TrainConfig
from clippo.results import ResultStore

GOAL = 5.0
NAME = "benchmark"
SETTINGS = ("loss", "beta", "kl_weight", "learning_rate", "epochs", "seed")


def run(command: Sequence[str], log: Path) -> float:
    """Runs a program of this repository; returns its wall time [seconds].

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    began = time.perf_counter()
    with log.open("w") as output:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - began


def finished(store: Path) -> list[dict[str, Any]]:
    """Settings and wall time of the trials of our sweep, in the order of their names.

    Raises:
        SystemExit: a trial failed; the same work would not be compared.
    """
    trials = [t for t in ResultStore(str(store)).trials(NAME).to_pylist() if t["trial_id"].isdigit()]
    failed = [t["trial_id"] for t in trials if t["status"] != "completed"]
    if failed:
        raise SystemExit(f"trials {', '.join(failed)} failed; run again")
    return sorted(trials, key=lambda t: t["trial_id"])


def _epochs(rows: Sequence[dict[str, Any]]) -> int:
    return sum(row["epochs"] for row in rows)


def main(*, trials: int = 16, rounds: int = 5, smoke: bool = False, results: Path = RESULTS) -> None:
    """Times two sweeps of the same settings.

    Args:
        trials: settings that are tried [count].
        rounds: how often both sides run, one after the other [count].
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    data, train, search = DataConfig(), TrainConfig(), SearchConfig()
    pictures, eval_pictures, epochs = data.train_pictures, data.eval_pictures, search.epochs
    if smoke:
        trials, rounds, pictures, eval_pictures, epochs = 1, 1, 64, 8, (1, 1)
    console, load_before = the_console(), load()
    torch.set_num_threads(1)  # as both sides do; the JSON says so
    ours: list[dict[str, Any]] = []  # every trial of every round
    theirs: list[dict[str, Any]] = []
    our_seconds, their_seconds, our_epochs = list[float](), list[float](), list[int]()
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as temporary:
        folder = Path(temporary)

        def sweep(name: str, *more: str) -> tuple[float, list[dict[str, Any]]]:
            flags = {
                "--name": NAME, "--results": folder / name, "--search.trials": trials,
                "--data.train-pictures": pictures, "--data.eval-pictures": eval_pictures,
            }  # fmt: skip
            command = ["sweeps/typo_sweep.py", *(str(word) for flag in flags.items() for word in flag)]
            # Neither baselines nor confirmation: the other side has none.
            command += ["--search.epochs", *map(str, epochs), "--search.confirm", "0", "--search.baselines"]
            seconds = run([*command, *more], folder / f"{name}.log")
            console.print(f"clippo, {trials} trials: {seconds:.1f} s", highlight=False)
            return seconds, finished(folder / name)

        def published_sweep(rows: list[dict[str, Any]], *more: str) -> tuple[float, list[dict[str, Any]]]:
            settings, report = folder / "settings.json", folder / "report.json"
            settings.write_text(json.dumps([{k: row[k] for k in SETTINGS} for row in rows]))
            flags = {
                "--report": report, "--concurrency": search.concurrency, "--train-pictures": pictures,
                "--eval-pictures": eval_pictures, "--batch-size": train.batch_size,
            }  # fmt: skip
            command = ["-m", "benchmarks.published_sweep", str(settings)]
            command += [str(word) for flag in flags.items() for word in flag]
            seconds = run([*command, *more], folder / "published.log")
            console.print(f"published, {trials} trials: {seconds:.1f} s", highlight=False)
            published = json.loads(report.read_text())
            assert [p["settings"] for p in published] == [{k: row[k] for k in SETTINGS} for row in rows]
            return seconds, published

        for number in range(rounds):
            seconds, rows = sweep(f"round-{number}")
            our_seconds.append(seconds)
            our_epochs.append(_epochs(rows))
            ours += rows
            seconds, published = published_sweep(rows)
            their_seconds.append(seconds)
            theirs += published
        fewer_seconds = published_sweep(rows, "--clean-and-attacked")[0]
        fewer = Spread.of([fewer_seconds / our_seconds[-1]])
        without: list[Line] = []
        if not smoke:
            seconds, rows = sweep("without", "--train.alphas")  # none
            name = f"clippo without the curve: whole sweep, {_epochs(rows)} epochs"
            without.append(Line(name, Spread.of([seconds]), "s"))
    trained = f"{min(our_epochs)} to {max(our_epochs)} epochs" if rounds > 1 else f"{our_epochs[0]} epochs"
    each = ratios([p["wall_s"] for p in theirs], [row["wall_s"] for row in ours])
    lines = [
        Line("published / clippo: whole sweep", Spread.of(ratios(their_seconds, our_seconds)), "x", GOAL),
        Line("published, clean and attacked pictures alone / clippo: whole sweep", fewer, "x", GOAL),
        Line("published / clippo: a trial, without start of Ray and preparing", Spread.of(each), "x"),
        Line(f"clippo: whole sweep, {trained}", Spread.of(our_seconds), "s"),
        Line(f"published: whole sweep, {trained}", Spread.of(their_seconds), "s"),
        Line("published, clean and attacked pictures alone: whole sweep", Spread.of([fewer_seconds]), "s"),
        *without,
    ]
    finish(
        "sweep", lines, results_folder(results, smoke), console,
        settings={
            "trials": trials, "rounds": rounds, "train_pictures": pictures, "eval_pictures": eval_pictures,
            "epochs": epochs, "concurrency": search.concurrency, "batch_size": train.batch_size,
        },
        load_before=load_before,
        rounds=[
            {"clippo_s": mine, "published_s": other, "epochs": n}
            for mine, other, n in zip(our_seconds, their_seconds, our_epochs, strict=True)
        ],
        published=theirs,
        clippo=[{"wall_s": r["wall_s"], "precision": r["precision"]} for r in ours],
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
