"""What the documents say of searches and of scale is what the committed results have."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[2]
README_ROWS = {
    "ours": "ours",
    "MOASHA (Syne Tune), its order mended": "MOASHA, repaired",
    "EHVI (Syne Tune), up to 225 epochs": "Syne Tune EHVI",
    "Optuna TPE": "Optuna TPE",
    "random": "random",
    "random, every trial of 3 epochs": "random, 3 epochs",
    "Optuna GP": "Optuna GP",
}
EXPERIMENTS_ROWS = {
    'the rule, TPE told what stopped trials had reached ("ours")': ["ours"],
    "the rule, random settings": ["ours, random settings"],
    "random settings, every trial ended after 3 epochs": ["random, 3 epochs"],
    "our TPE, halving at 3 and 6": ["ours, halving at 3 6"],
    "our TPE, trained to the end": ["ours, not stopped"],
    "MOASHA, its order mended (best rival)": ["MOASHA, repaired"],
    "Optuna's TPE": ["Optuna TPE"],
    "random, trained to the end": ["random"],
    "Syne Tune's evolution, Optuna's GP, MOASHA as released": ["Syne Tune evolution", "Optuna GP", "MOASHA"],
}


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table_after(text: str, start: str) -> dict[str, list[str]]:
    """The first table behind a text: cells by the first of each row, without emphasis."""
    [_, after] = re.split(r"\s+".join(map(re.escape, start.split())), text)  # it may be wrapped
    [_, *behind] = after.split("\n|", 1)
    rows = ("|" + behind[0]).split("\n\n")[0].replace("**", "").replace("`", "").splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {first: rest for first, *rest in cells if first.strip("- ")}


@pytest.fixture(scope="module")
def searched() -> dict[str, dict[str, Any]]:
    """The lines of the search benchmark by what they say, apart from how many did not get there."""
    return {line["what"].partition(" (")[0]: line for line in result("search")["lines"]}


def epochs(line: dict[str, Any]) -> str:
    missed = re.search(r"; (\d+) of (\d+) did not get there", line["what"])
    if missed and 2 * int(missed[1]) > int(missed[2]):
        return f"not reached by {missed[1]} of {missed[2]}"
    return f"{line['median']:.0f} ({line['quartiles'][0]:.0f} to {line['quartiles'][1]:.0f})"


def test_the_readme_compares_searches_as_they_were_measured(searched: dict[str, dict[str, Any]]) -> None:
    table = table_after((ROOT / "README.md").read_text(), "until a share of the table's best hypervolume")
    assert table == {
        row: [epochs(searched[f"epochs to {share}%: {name}"]) for share in (95, 97)]
        for row, name in README_ROWS.items()
    }
    assert all(searched[f"epochs to 95%: {name}"]["n"] == 20 for name in README_ROWS.values())


def test_the_experiments_compare_searches_as_they_were_measured(
    searched: dict[str, dict[str, Any]],
) -> None:
    text = (ROOT / "docs/EXPERIMENTS.md").read_text()
    table = table_after(text, "**Stopping what gets no better is what helps**")
    table.pop("", None)

    def cell(what: str, names: list[str], form: str) -> str:
        return ", ".join(format(searched[f"{what}: {name}"]["median"], form) for name in names)

    assert table == {
        row: [
            cell("epochs to 95%", names, ".0f"),
            cell("epochs to 97%", names, ".0f"),
            cell("after 450 epochs, validation pictures", names, ".3f"),
        ]
        for row, names in EXPERIMENTS_ROWS.items()
    }
    ratios = [line for what, line in searched.items() if "ours / " in what]
    told = [f"{r['median']:.2f}" for r in ratios]
    said = rf"ours needs {told[0]} \([^)]*\) of random's epochs and {told[1]} \("
    assert re.search(said, " ".join(text.split()))


def test_the_growth_of_the_driver_is_as_it_was_measured() -> None:
    table = table_after((ROOT / "docs/SCALE.md").read_text(), "were at hand.")
    ended = result("scale")["ended"][::4]  # of every fiftieth: of every 200
    expected = {}
    for i, ((wall, busy), (wall_after, busy_after)) in enumerate(pairwise(ended)):
        cells = [f"{(busy_after - busy) / 200:.3f} s", f"{(wall_after - wall) / 200:.2f} s"]
        expected[f"{200 * i + 1:,} to {200 * i + 200:,}"] = cells
    table.pop("finished trials")
    assert table == expected


def test_the_cost_of_samplers_is_as_it_was_measured() -> None:
    table = table_after((ROOT / "docs/SCALE.md").read_text(), "| 1,801 to 2,000 | 0.159 s | 0.91 s |")
    table.pop("processor time of taking in a result and proposing settings, 4 trials under way")
    driver = result("search-driver")
    medians = {line["what"]: line["median"] for line in driver["lines"]}
    sizes, samplers = (driver["settings"][name] for name in ("sizes", "samplers"))

    def cell(sampler: str, size: int) -> str:
        median = medians.get(f"{sampler}, {size} finished trials")
        return "not one within 60 s" if median is None else f"{median:.2g} s"

    assert table == {sampler: [cell(sampler, size) for size in sizes] for sampler in samplers}


def test_what_scale_says_of_its_run() -> None:
    text = " ".join((ROOT / "docs/SCALE.md").read_text().split())
    found = result("scale")
    lines = {line["what"]: line for line in found["lines"]}
    last, all_of_them = lines["proposing settings, the last 200"], lines["proposing settings"]
    low, high = last["quartiles"]
    snapshots, seconds = lines["snapshots of Ray's state"], lines["seconds of all snapshots"]
    before, after = found["load_before_and_after"]
    for said in (
        f"{last['median']:.2f} s at the median (quartiles {low:.2f} and {high:.2f})",
        f"all of them {all_of_them['median']:.3f} s",
        f"load average {before:.0f} before the run and {after:.0f} after",
        f"The {snapshots['median']:.0f} snapshots of the run took {seconds['median']:.0f} s",
    ):
        assert said in text
