"""Compares ways of searching on the tabular benchmark, at equal epochs.

Each sweep has 4 workers, pays for every epoch and sees robustness and retention on validation pictures after
it. What counts is the hypervolume of the trials that were trained to the end, since only their weights are
handed to the user, as a share of that of the whole table. It is also given as it would be if the weights of
trials that were stopped early were handed out too; and on test pictures, for the trials which validation
pictures put on the front.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import pickle
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import optuna
import torch

from benchmarks.common import (
    RESULTS,
    ROOT,
    Line,
    Spread,
    finish,
    load,
    program,
    results_folder,
    the_console,
)  # fmt: skip
from benchmarks.search.simulate import WORKERS, Floats, Tabular, simulate
from benchmarks.search.strategies import OURS, RANDOM, RIVALS, STRATEGIES, VARIANTS
from benchmarks.search.table import TABLE
from clippo.front.plot import GREY, save_chart, styled

ENOUGH = 0.95
SHARES = (ENOUGH, 0.97)
RANDOM_GOAL, RIVAL_GOAL = 0.5, 0.75
KINDS = {
    "validation": "trained to the end",
    "stopped too": "trained to the end or stopped",
    "test": "trained to the end, test pictures",
}


def one(name: str, seed: int, budget: int, path: Path, cache: Path | None) -> dict[str, Any]:
    """One sweep: its curves and what it did; taken from the cache if it is there."""
    kept = cache and cache / f"{name}, seed {seed}, {budget} epochs.pickle"
    if kept and kept.exists():
        found: dict[str, Any] = pickle.loads(kept.read_bytes())
        return found
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # Syne Tune's EHVI mixes float and double, and BoTorch refuses
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.WARNING)
    table = Tabular.load(path)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sweep = simulate(table, (STRATEGIES | VARIANTS)[name](table, seed, budget), budget, seed)
    found = {
        "name": name,
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "trials": len(sweep.epochs),
        "whole": sum(epochs == table.epochs for epochs in sweep.epochs),
        "validation": sweep.curve(table, budget, split="validation"),
        "stopped too": sweep.curve(table, budget, split="validation", stopped_too=True),
        "test": sweep.curve(table, budget, split="test"),
    }
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(pickle.dumps(found))
    return found


def epochs_to(curve: Floats, share: float = ENOUGH) -> int:
    """Epochs until a curve has come so far; those of the whole curve if it does not.

    >>> epochs_to(np.array([0.0, 0.5, 0.96, 0.97]))
    2
    """
    there = np.flatnonzero(curve >= share)
    return int(there[0]) if len(there) else len(curve) - 1


def ratio(mine: Sequence[int], theirs: Sequence[int], rng: np.random.Generator, n: int = 2000) -> Spread:
    """The ratio of two medians; its quartiles are those of medians of samples drawn again."""
    (a, b) = (np.asarray(x, np.float64) for x in (mine, theirs))
    drawn = [np.median(rng.choice(x, (n, len(x))), axis=1) for x in (a, b)]
    low, high = np.quantile(drawn[0] / drawn[1], (0.25, 0.75)).tolist()
    return Spread(float(np.median(a) / np.median(b)), low, high, len(a))


def lines_of(runs: Sequence[dict[str, Any]], budget: int) -> list[Line]:
    """What the comparison says."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    lines = []
    rng = np.random.default_rng(0)
    for kind in ("validation", "stopped too"):
        needed = {n: [epochs_to(r[kind]) for r in runs if r["name"] == n] for n in names}
        rivals = [n for n in RIVALS if n in needed]
        best = min(rivals, key=lambda n: float(np.median(needed[n])), default=None)
        for other, goal in ((RANDOM, RANDOM_GOAL), (best, RIVAL_GOAL)):
            if OURS in needed and other in needed:
                what = f"epochs to {ENOUGH:.0%}, {KINDS[kind]}: {OURS} / {other}"
                what += " (best rival)" if other == best else ""
                value = ratio(needed[OURS], needed[other], rng)
                lines.append(Line(what, value, "x", goal, at_least=False))
    for kind, share in itertools.product(("validation", "stopped too"), SHARES):
        for name in names:
            mine = [r[kind] for r in runs if r["name"] == name]
            missed = sum(curve[-1] < share for curve in mine)
            what = f"epochs to {share:.0%}, {KINDS[kind]}: {name}"
            what += f" (at least; {missed} of {len(mine)} did not get there)" if missed else ""
            lines.append(Line(what, Spread.of([epochs_to(curve, share) for curve in mine]), "epochs"))
    for at, kind in itertools.product((budget // 2, budget), KINDS):
        for name in names:
            reached = [float(r[kind][at]) for r in runs if r["name"] == name]
            lines.append(Line(f"after {at} epochs, {KINDS[kind]}: {name}", Spread.of(reached), "of best"))
    return lines


def chart(runs: Sequence[dict[str, Any]], budget: int) -> Any:
    """Hypervolume against epochs: medians, with the quartiles as bands."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    panels = []
    for kind in ("validation", "stopped too"):
        rows = []
        for name in names:
            curves = np.array([run[kind] for run in runs if run["name"] == name])
            low, median, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
            rows += [
                {"epochs": t, "name": name, "low": low[t], "median": median[t], "high": high[t]}
                for t in range(0, budget + 1, max(1, budget // 300))
            ]
        base = alt.Chart(alt.InlineData(values=rows), title=KINDS[kind]).encode(
            x=alt.X("epochs:Q", title="epochs that all trials took"),
            color=alt.Color(
                "name:N", title=None, scale=alt.Scale(domain=names, range=COLOURS[: len(names)])
            ).legend(symbolOpacity=1, columns=5),
        )
        scale = alt.Scale(domain=[0.8, 1.0])
        title = "hypervolume, share of the table's best"
        panel = alt.layer(
            base.mark_area(opacity=0.12, clip=True).encode(
                y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q"
            ),
            base.mark_line(strokeWidth=1.8, clip=True).encode(y=alt.Y("median:Q", scale=scale, title=title)),
            alt.Chart(alt.InlineData(values=[{"y": ENOUGH}]))
            .mark_rule(strokeDash=[4, 4], color=GREY)
            .encode(y="y:Q"),
        )
        panels.append(panel.properties(width=400, height=340))
    return styled(alt.hconcat(*panels))


COLOURS = ("#D55E00", "#222222", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#8A8A8A", "#7F3C8D")


def main(
    *, names: tuple[str, ...] = tuple(STRATEGIES), seeds: int = 20, budget: int = 450, processes: int = 2,
    cache: Path | None = None, table: Path = TABLE, smoke: bool = False, results: Path = RESULTS,
    plot: Path = ROOT / "docs" / "search",
) -> None:  # fmt: skip
    """Compares the strategies.

    Args:
        names: which of them.
        seeds: sweeps of each [count].
        budget: epochs of each sweep, all its trials together [count].
        processes: sweeps that are simulated at the same time [count].
        cache: folder that keeps finished sweeps, so that a comparison can be taken up again.
        table: the Parquet file.
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
        plot: name of the picture without its suffix.
    """
    console, load_before = the_console(), load()
    folder = results_folder(results, smoke)
    if smoke:
        names, seeds, budget, plot = (OURS, RANDOM), 1, 120, folder / "search"
    jobs = [(name, seed) for seed in range(seeds) for name in names]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(one, name, seed, budget, table, cache) for name, seed in jobs]
        runs = [future.result() for future in futures]
    for suffix in (".png", ".svg"):
        save_chart(chart(runs, budget), plot.with_suffix(suffix))
    found = Tabular.load(table)
    finish(
        "search", lines_of(runs, budget), folder, console,
        settings={
            "seeds": seeds, "budget": budget, "workers": WORKERS, "strategies": list(names),
            "reference_points": found.reference_points, "best_hypervolume": found.best,
        },
        load_before=load_before,
        runs=[
            {key: run[key] for key in ("name", "seed", "seconds", "trials", "whole")}
            | {f"epochs to {ENOUGH:.0%}, {KINDS[kind]}": epochs_to(run[kind]) for kind in KINDS}
            for run in runs
        ],
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
