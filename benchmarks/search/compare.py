"""Compares ways of searching on the tabular benchmark, at equal epochs.

Each sweep has 4 workers, pays for every epoch and sees robustness and retention on validation pictures after
it. What counts is the hypervolume of the trials that have ended, as a share of that of the whole table after
its last epoch. A trial that was stopped early counts with what its averaged weights had reached by then: they
can be handed out. So it is for every strategy that stops trials. Those that stop none are also compared on
test pictures, by the trials which validation pictures put on the front; the table has no test counts of
earlier epochs.
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
from benchmarks.search.strategies import EXPLAINING, OURS, RANDOM, RIVALS, STRATEGIES, VARIANTS
from benchmarks.search.table import TABLE
from clippo.front.plot import GREY, save_chart, styled

ENOUGH = 0.95
RANDOM_GOAL, RIVAL_GOAL = 0.5, 0.75
BUDGETS = {"Syne Tune EHVI": 225}
"""Of strategies whose proposals take seconds: they get fewer epochs than the others [epochs]."""
KINDS = {"ended": "validation pictures", "test": "test pictures"}


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
        "to the end": sum(epochs == table.epochs for epochs in sweep.epochs),
        "ended": sweep.curve(table, budget, split="validation"),
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
    needed = {n: [epochs_to(r["ended"]) for r in runs if r["name"] == n] for n in names}
    rivals = [n for n in RIVALS if n in needed]
    best = min(rivals, key=lambda n: float(np.median(needed[n])), default=None)
    for other, goal in ((RANDOM, RANDOM_GOAL), (best, RIVAL_GOAL)):
        if OURS in needed and other in needed:
            what = f"epochs to {ENOUGH:.0%}: {OURS} / {other}" + (" (best rival)" if other == best else "")
            lines.append(Line(what, ratio(needed[OURS], needed[other], rng), "x", goal, at_least=False))
    for share, name in itertools.product((ENOUGH, 0.97), names):
        mine = [r["ended"] for r in runs if r["name"] == name]
        missed = sum(curve[-1] < share for curve in mine)
        what = f"epochs to {share:.0%}: {name}"
        what += f" (at least; {missed} of {len(mine)} did not get there)" if missed else ""
        lines.append(Line(what, Spread.of([epochs_to(curve, share) for curve in mine]), "epochs"))
    for at, kind in itertools.product((budget // 2, budget), ("ended", "test")):
        for name in names:
            mine = [r for r in runs if r["name"] == name]
            if at > min(len(r["ended"]) - 1 for r in mine):
                continue
            if kind == "test" and any(r["to the end"] < r["trials"] for r in mine):
                continue
            reached = [float(r[kind][at]) for r in mine]
            lines.append(Line(f"after {at} epochs, {KINDS[kind]}: {name}", Spread.of(reached), "of best"))
    return lines


def chart(runs: Sequence[dict[str, Any]], budget: int) -> Any:
    """Hypervolume against epochs: medians, with the quartiles as bands."""
    names = [n for n in STRATEGIES if any(run["name"] == n for run in runs)]
    rows = []
    for name in sorted(names, key=lambda n: n == RANDOM):  # last, as others may lie on it
        curves = np.array([run["ended"] for run in runs if run["name"] == name])
        low, median, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
        rows += [
            {"epochs": t, "name": name, "low": low[t], "median": median[t], "high": high[t]}
            for t in range(0, len(median), max(1, budget // 300))
        ]
    colours = alt.Scale(domain=names, range=COLOURS[: len(names)])
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("epochs:Q", title="epochs that all trials took"),
        color=alt.Color("name:N", title=None, scale=colours).legend(symbolOpacity=1, orient="right"),
    )
    scale, title = alt.Scale(domain=[0.8, 1.0]), "hypervolume, share of the table's best"
    goal = alt.Chart(alt.InlineData(values=[{"y": ENOUGH}])).mark_rule(strokeDash=[4, 4], color=GREY)
    bands = base.mark_area(opacity=0.12, clip=True).encode(
        y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q"
    )
    dashes = alt.condition(alt.datum.name == RANDOM, alt.value([6, 3]), alt.value([1, 0]))
    medians = base.mark_line(strokeWidth=1.8, clip=True).encode(
        y=alt.Y("median:Q", scale=scale, title=title), strokeDash=dashes
    )
    return styled(alt.layer(bands, medians, goal.encode(y="y:Q")).properties(width=640, height=340))


COLOURS = (
    "#D55E00",
    "#222222",
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#8A8A8A",
    "#7F3C8D",
    "#999933",
)


def main(
    *, names: tuple[str, ...] = (*STRATEGIES, *EXPLAINING), seeds: int = 20, first_seed: int = 0,
    budget: int = 450, processes: int = 2, cache: Path | None = None, table: Path = TABLE,
    smoke: bool = False, results: Path = RESULTS, plot: Path = ROOT / "docs" / "search",
) -> None:  # fmt: skip
    """Compares the strategies.

    Args:
        names: which of them.
        seeds: sweeps of each [count].
        first_seed: of those seeds; what is chosen by a comparison is chosen on other seeds than it is
            reported on.
        budget: epochs of each sweep, all its trials together; some strategies get fewer (BUDGETS) [count].
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
    jobs = [(name, seed) for seed in range(first_seed, first_seed + seeds) for name in names]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [
            pool.submit(one, name, seed, min(budget, BUDGETS.get(name, budget)), table, cache)
            for name, seed in jobs
        ]
        runs = [future.result() for future in futures]
    for suffix in (".png", ".svg"):
        save_chart(chart(runs, budget), plot.with_suffix(suffix))
    found = Tabular.load(table)
    finish(
        "search", lines_of(runs, budget), folder, console,
        settings={
            "seeds": seeds, "first_seed": first_seed, "budget": budget, "workers": WORKERS,
            "budgets": {name: least for name, least in BUDGETS.items() if name in names},
            "strategies": list(names),
            "reference_points": found.reference_points, "best_hypervolume": found.best,
        },
        load_before=load_before,
        runs=[
            {key: run[key] for key in ("name", "seed", "seconds", "trials", "to the end")}
            | {f"epochs to {share:.0%}": epochs_to(run["ended"], share) for share in (ENOUGH, 0.97)}
            for run in runs
        ],
    )  # fmt: skip


if __name__ == "__main__":
    program(main, __doc__)
