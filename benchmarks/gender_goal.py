"""What gender sweeps have reached on test pictures, from their stores, and how long the default one takes.

    python -m benchmarks.gender_goal STORE...
    python -m benchmarks.gender_goal --runs 3

A store is made by the gender sweep, those of the committed results by

    python sweeps/gender_sweep.py --results default                         # and again, default-again
    python sweeps/gender_sweep.py --results search-seed-1 --search.seed 1
    python sweeps/gender_sweep.py --results split-seed-2 --data.split-seed 2    # and 3, 4, 5, 6

Of each sweep, named after its store's folder, the untouched model, the recommended point, and its settings
with a fresh seed, all with 90 % intervals. The goals are for the fresh seed, by which nothing was chosen.
What the JSON has of other sweeps stays in it.

With ``--runs`` the default sweep is run so many times, each into a store that is thrown away, and the seconds
from the start of the command to its end are added to those of earlier runs. They mean something on a machine
that does nothing else; the load before each run is kept beside them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import RESULTS, Line, Spread, finish, load, program, the_console
from benchmarks.sweep import run
from clippo.front.points import front_of
from clippo.results import ResultStore

GOALS = {"max_skew/concept/seen": 0.24, "max_skew/concept/held_out": 0.30}  # at most
WALL_S = 180  # of the default sweep, at most
KEPT = ("concept_accuracy", "minority_accuracy")  # of seen concepts, at least the untouched model's
NUMBERS = (
    *GOALS, "max_skew/concept/unpaired", "ndkl/concept/seen", "ndkl/concept/held_out", *KEPT,
    "concept/held_out_accuracy", "minority/held_out_accuracy", "clean/kept_accuracy",
)  # fmt: skip


def main(
    stores: tyro.conf.Positional[tuple[str, ...]] = (), *, runs: int = 0, results: Path = RESULTS
) -> None:
    """What the sweeps in some stores have reached, and how long the default one takes.

    Args:
        runs: how often it is run and timed.
        results: folder of the JSON.
    """
    before, console = load(), the_console()
    new = [{"run": Path(store).name} | reached(ResultStore(store)) for store in stores]
    path, again = results / "gender.json", {sweep["run"] for sweep in new}
    known = json.loads(path.read_text()) if path.exists() else {"sweeps": []}
    sweeps = [sweep for sweep in known["sweeps"] if sweep["run"] not in again] + new
    timed = [*known.get("wall", ()), *(timed_run() for _ in range(runs))]
    lines = [line for sweep in sweeps for line in _lines(sweep)]
    if timed:
        spread = Spread.of([one["wall_s"] for one in timed])
        lines.append(Line("wall time of the default sweep", spread, "s", WALL_S, at_least=False))
    finish("gender", lines, results, console, settings={}, load_before=before, sweeps=sweeps, wall=timed)


def timed_run() -> dict[str, float]:
    """One run of the default sweep: its wall time [s], and the load average before it."""
    before = load()
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as folder:
        command = ["sweeps/gender_sweep.py", "--results", f"{folder}/results"]
        return {"wall_s": round(run(command, Path(folder) / "log"), 1), "load_before": before}


def reached(store: ResultStore) -> dict[str, Any]:
    """Seeds, settings and numbers on test pictures (value, ends of its interval) of a store's one sweep.

    Raises:
        SystemExit: it has none, or several.
    """
    names = store.sweeps()
    if len(names) != 1:
        raise SystemExit(f"{store.uri} has the sweeps {', '.join(names) or '(none)'}; give a store with one")
    (name,) = names
    config, front = store.known_config(name), front_of(store, name)
    best, untouched = front.recommended, front.reference
    measured = {
        "untouched": (untouched.test, untouched.test_intervals),
        "recommended": (best.test, best.test_intervals),
        "fresh_seed": (best.confirmed, best.confirmed_intervals),
    }
    return {
        "split_seed": config["data"]["split_seed"],
        "search_seed": config["search"]["seed"],
        "trial": best.trial_id,
        "variant": best.variant,
        "settings": best.settings,
        "numbers": {
            model: {n: [round(x, 4) for x in (values[n], *intervals[n])] for n in NUMBERS if n in values}
            for model, (values, intervals) in measured.items()
        },
    }


def _lines(sweep: dict[str, Any]) -> Iterator[Line]:
    fresh, untouched = sweep["numbers"]["fresh_seed"], sweep["numbers"]["untouched"]
    for name in (*GOALS, *KEPT):
        goal = GOALS.get(name, untouched[name][0])
        yield Line(f"{sweep['run']}: {name}", Spread.of([fresh[name][0]]), "", goal, at_least=name in KEPT)


if __name__ == "__main__":
    program(main, __doc__)
