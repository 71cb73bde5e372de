import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clippo.errors import ConfigError
from clippo.evaluate import max_skew, ndkl

CASES = json.loads((Path(__file__).parents[1] / "golden" / "ranking_bias.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_golden(case: dict[str, Any]) -> None:
    ranking = case["scores"], case["groups"], case["k"]
    assert max_skew(*ranking) == pytest.approx(case["maxskew_eq_opp"], rel=0, abs=1e-9)
    assert max_skew(*ranking, target="proportional") == pytest.approx(
        case["maxskew_dem_par"], rel=0, abs=1e-9
    )
    assert ndkl(*ranking) == pytest.approx(case["ndkl_eq_opp"], rel=0, abs=1e-9)
    assert ndkl(*ranking, target="proportional") == pytest.approx(case["ndkl_dem_par"], rel=0, abs=1e-9)


def test_there_are_12_golden_cases() -> None:
    assert len(CASES) == 12


def test_max_skew_by_hand() -> None:
    scores, groups = [5, 4, 3, 2, 1], ["a", "a", "b", "a", "b"]
    assert max_skew(scores, groups, k=4) == pytest.approx(math.log((3 / 4) / (1 / 2)))
    assert max_skew(scores, groups, k=4, target="proportional") == pytest.approx(math.log((3 / 4) / (3 / 5)))
    assert max_skew(scores, ["a", "b", "a", "b", "b"], k=4) == 0


def test_a_group_absent_from_the_top_counts_as_one_picture() -> None:
    scores, groups = range(20, 0, -1), ["a"] * 19 + ["b"]
    assert max_skew(scores, groups, k=2, target="proportional") == pytest.approx(math.log((1 / 2) / (1 / 20)))


def test_ndkl_by_hand() -> None:
    # the top 1 holds one group, KL = ln 2; the top 2 both, KL = 0; the top 3 two and one
    kl_3 = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    weights = [1 / math.log2(rank + 1) for rank in (1, 2, 3)]
    expected = (weights[0] * math.log(2) + weights[2] * kl_3) / sum(weights)
    assert ndkl([9, 8, 7, 6], ["a", "b", "a", "b"], k=3) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [max_skew, ndkl])
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_labels_order_and_score_scale_do_not_matter(
    measure: Callable[..., float], data: st.DataObject
) -> None:
    groups = data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=20))
    size = len(groups)
    k, target = data.draw(st.integers(1, size)), data.draw(st.sampled_from(["equal", "proportional"]))
    scores = data.draw(st.permutations(range(size)))
    value = measure(scores, groups, k, target)
    assert value >= 0
    order = data.draw(st.permutations(range(size)))
    shuffled = [scores[i] for i in order], [["x", "y", "z"][groups[i]] for i in order]
    assert measure(*shuffled, k, target) == pytest.approx(value)
    assert measure(np.exp(scores), groups, k, target) == pytest.approx(value)


@pytest.mark.parametrize("measure", [max_skew, ndkl])
def test_what_is_accepted(measure: Callable[..., float]) -> None:
    scores, groups = [0.4, 0.3, 0.2, 0.1], [0, 0, 1, 1]
    value = measure(scores, groups, 2)
    assert measure(torch.tensor(scores), torch.tensor(groups), 2) == pytest.approx(value)
    assert measure([1, 1, 1, 1], groups, 2) == pytest.approx(value)  # ties keep the order given
    assert measure([1, 1, 1, 1], groups[::-1], 2) == pytest.approx(value)
    assert measure(scores, ["one"] * 4, 2) == 0


@pytest.mark.parametrize("measure", [max_skew, ndkl])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0, but must be between 1 and the number of pictures, 3"),
        ({"k": 4}, "k is 4, but"),
        ({"target": "fair"}, "unknown target 'fair'; choose one of: equal, proportional"),
        ({"groups": [0, 1]}, "expected one each"),
        ({"scores": [0.1, math.nan, 0.3]}, "NaN"),
    ],
)
def test_errors(measure: Callable[..., float], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(**{"scores": [0.1, 0.2, 0.3], "groups": [0, 1, 0], "k": 2} | change)
