"""The front as text."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from clippo.front.front import Front, well_spread
from clippo.front.points import read_front
from clippo.front.table import print_front, recommendation
from tests.front.sweeps import OBJECTIVES, WORDS, make_sweep


def front(trials: int, **options: Any) -> Front:
    sweep = make_sweep(trials, seeds=int(options.pop("seeds", 1)))
    return read_front("made", sweep.trial_table, sweep.evals, OBJECTIVES, words=WORDS, **options)


@pytest.fixture(scope="module")
def made() -> Front:
    return front(60, min_retention=0.97)


def printed(front: Front, *, everything: bool = False) -> str:
    output = io.StringIO()
    print_front(front, Console(file=output, width=80), everything=everything)
    return output.getvalue()


def test_it_fits_80_columns_and_one_screen(made: Front) -> None:
    lines = printed(made).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 65
    assert not [line for line in lines if "…" in line], "nothing is cut off"


def test_what_it_says(made: Front) -> None:
    text = printed(made)
    flat = " ".join(text.split())
    assert "Pareto front of made" in text
    assert f"{len(made.front)} of {len(made.points)} points are on the front" in flat
    assert (
        f"Recommended (R): trial {made.recommended.trial_id}, weights {made.recommended.variant}, the most"
        in flat
    )
    assert f"its robustness is {made.recommended.test['robustness']:.3f}" in flat
    assert f"hypervolume {made.hypervolume:.3f} (" in flat
    assert f"Preference optimisation adds {made.gain:.3f} (" in flat
    assert "device-hours (" in flat
    assert "No setting was repeated" in flat
    for method in ("untouched model", "cross-entropy tuning", "PAINT", "preference optimisation"):
        assert method in text
    marks = [line[:2].strip() for line in text.splitlines()]
    assert marks.count("R") == 1


def test_the_rows_are_well_spread_and_all_of_them_on_request(made: Front) -> None:
    shown = well_spread(made, 6)
    assert len(shown) == 6
    for p in (made.reference, made.recommended, made.knee, made.front[0], made.front[-1]):
        assert any(p is s for s in shown)
    wanted = [p for p in made.points if p.on_front or p is made.reference]
    assert well_spread(made, 1000) == wanted
    for everything in (False, True):
        rows = well_spread(made, 1000 if everything else 12)
        text = printed(made, everything=everything)
        assert ("not shown (--all)" in text) == (len(rows) < len(wanted))
        assert sum("beta" in line for line in text.splitlines()) == sum(
            "beta" in p.settings for p in rows if p.settings.get("beta")
        )


def test_two_sentences_say_what_and_why(made: Front) -> None:
    text = recommendation(made)
    assert text.count(". ") == 1
    assert text.endswith(".")
    assert "keeps 0.97" in text
    chance = f"{100 * (made.recommended.chance or 0):.0f} %"
    told = "on pictures like those of validation, and leaving out that it was picked among many"
    assert f"(here {chance}, {told})" in text


def test_a_test_retention_below_the_bound_is_said() -> None:
    said = [recommendation(front(16, min_retention=r)) for r in (0.97, 0.975, 0.98, 0.985)]
    for text, bound in zip(said, ("0.97", "0.975", "0.98", "0.985"), strict=True):
        retention = float(text.split("its retention ")[1].split()[0])
        assert (f"which is below {bound}" in text) == (retention < float(bound))


def test_where_nothing_keeps_enough_the_untouched_model_is_recommended() -> None:
    made = front(3, min_retention=1.0)
    text = " ".join(printed(made).split())
    if made.recommended is made.reference:
        assert "Recommended (R): the untouched model. No tuned one keeps 1 of what" in text
        assert "preference optimisation none" in text


def test_every_confirmed_trial_is_shown(made: Front) -> None:
    """Also one whose points are none of the well-spread ones of the table."""
    fresh = {"robustness": 0.123, "retention": 0.456}
    limits = {"robustness": (0.1, 0.2), "retention": (0.4, 0.5)}
    long = [
        replace(p, on_front=True, confirmed=fresh, confirmed_intervals=limits) for p in made.points[1::20]
    ]
    crowded = replace(made, points=[made.reference, *long], knee=None)
    trials = {p.trial_id for p in long}
    assert trials - {p.trial_id for p in well_spread(crowded, 12)}, "or this tests nothing"
    for everything in (False, True):
        text = printed(crowded, everything=everything).split("a fresh seed")[1].split("\n\n")[0]
        rows = [line.split()[0] for line in text.splitlines() if ".123" in line]
        assert set(rows) == trials
        assert len(rows) == len(long) if everything else len(rows) < len(long)


def test_the_front_of_other_objectives_marks_what_keeps_too_little(made: Front) -> None:
    some = [replace(p, feasible=bool(n % 2)) for n, p in enumerate(made.points[:8])]
    searched = replace(made, searched=[(p, {"device_s": 1.25, "retention": p.retention}) for p in some])
    text = printed(searched).split("device_s")[1].split("\n\n")[0]
    rows = [line.split() for line in text.splitlines() if "1.25" in line]
    assert [row[0] == "<" for row in rows] == [not p.feasible for p in some]
    assert [s["feasible"] for s in searched.to_json()["searched"]] == [p.feasible for p in some]


def test_repeated_seeds_are_said() -> None:
    text = " ".join(printed(front(6, seeds=3)).split())
    assert "4 settings were repeated; another seed moves robustness by" in text


def test_only_the_untouched_model() -> None:
    sweep = make_sweep(0)
    lone = read_front("new", sweep.trial_table.slice(0, 1), sweep.evals, OBJECTIVES, words=WORDS)
    text = printed(lone)
    assert "1 of 1 points are on the front" in text
    assert "untouched" in text
