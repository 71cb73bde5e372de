"""What is stored of a ranking gives its measures and their spread."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clippo.errors import ConfigError
from clippo.evaluate import bootstrap_interval, max_skew, ndkl, top_share
from clippo.evaluate.rankings import DEPTH, Ranking, RankingTable, mean_skew, ranked, resamples

CASES = json.loads((Path(__file__).parents[1] / "golden" / "ranking_bias.json").read_text())


def kept(scores: Any, groups: Any, k: int, majority: int | None = None) -> Ranking:
    names, codes = np.unique(groups, return_inverse=True)
    return ranked(scores, codes, k, query="a", group_names=[str(n) for n in names], majority=majority)


@pytest.mark.parametrize("case", CASES)
def test_golden_from_what_is_stored(case: dict[str, Any]) -> None:
    found = kept(case["scores"], case["groups"], case["k"])
    assert mean_skew([found]) == pytest.approx(case["maxskew_eq_opp"], rel=0, abs=1e-9)
    assert RankingTable.of([found]).ndkls() == pytest.approx([case["ndkl_eq_opp"]], rel=0, abs=1e-9)


def test_a_draw_is_the_measure_of_the_resampled_pool() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 3, 300)
    scores = rng.normal(size=(2, 300))
    taken = resamples(300, draws=20)
    # Of different lengths: the table pads the shorter one.
    table = RankingTable.of([kept(scores[0], groups, 12, 1), kept(scores[1], groups, 7, 2)])
    shares = table.majority_shares(taken)
    for i, (k, majority) in enumerate(((12, 1), (7, 2))):
        pools = [(np.repeat(scores[i], t), np.repeat(groups, t)) for t in taken]
        assert table.skews(taken)[:, i] == pytest.approx([max_skew(s, g, k) for s, g in pools])
        assert table.ndkls(taken)[:, i] == pytest.approx([ndkl(s, g, k) for s, g in pools])
        assert shares[:, i] == pytest.approx([top_share(s, g, k, majority) for s, g in pools])
    assert len(set(table.skews(taken)[:, 0].round(9))) > 3


def test_rankings_of_two_and_of_three_groups_in_one_table() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=60)
    two, three = (kept(scores, np.arange(60) % n, 10) for n in (2, 3))
    table = RankingTable.of([two, three])
    for found, measure in ((table.skews(), max_skew), (table.ndkls(), ndkl)):
        assert found == pytest.approx([measure(scores, np.arange(60) % n, 10) for n in (2, 3)])


def test_a_resample_that_is_smaller_than_the_top_counts_what_it_has() -> None:
    table = RankingTable.of([kept([0.4, 0.3, 0.2, 0.1], [0, 1, 0, 1], 4)])
    few = np.array([[0, 2, 0, 1]])
    assert table.ndkls(few)[0] == pytest.approx([np.log(2)]), "one group alone, three times"
    assert table.ndkls(np.zeros((1, 4), dtype=np.uint8))[0] == [0]


def test_the_stored_places_give_the_spread_of_the_whole_pool() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat([0, 1], 200)
    scores = rng.normal(size=400) + 0.5 * (groups == 0)
    found = kept(scores, groups, 24)
    assert len(found.pictures) == DEPTH * 24
    spread = RankingTable.of([found]).skews(resamples(400, draws=2000)).std()
    low, high = bootstrap_interval(lambda i: max_skew(scores[i], groups[i], 24), groups, draws=600)
    assert spread == pytest.approx((high - low) / 2 / 1.645, rel=0.15)


@pytest.mark.parametrize(
    ("scores", "groups", "k", "message"),
    [
        ([0.1, 0.2], [0], 1, "expected one each"),
        ([0.1, np.nan], [0, 1], 1, "NaN"),
        ([0.1, 0.2], [0, 1], 3, "k is 3, but must be between 1 and the number of pictures, 2"),
    ],
)
def test_errors(scores: list[float], groups: list[int], k: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kept(scores, groups, k)
