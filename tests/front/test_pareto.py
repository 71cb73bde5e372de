import time
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clippo.errors import ConfigError
from clippo.front import pareto_mask

# few values, so that ties, duplicates and constant columns are the rule
value = st.sampled_from([-inf, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0, inf, nan])


def clouds(max_objectives: int = 4) -> st.SearchStrategy[list[list[float]]]:
    return st.integers(1, max_objectives).flatmap(
        lambda m: st.lists(st.lists(value, min_size=m, max_size=m), max_size=25)
    )


def brute_force(points: list[list[float]]) -> list[bool]:
    def dominates(a: list[float], b: list[float]) -> bool:
        at_least_as_good = all(x >= y for x, y in zip(a, b, strict=True))
        return at_least_as_good and any(x > y for x, y in zip(a, b, strict=True))

    measured = [p for p in points if p == p and not any(x != x for x in p)]
    return [p in measured and not any(dominates(q, p) for q in measured) for p in points]


@given(points=clouds())
@settings(deadline=None, max_examples=500)
def test_equals_brute_force(points: list[list[float]]) -> None:
    assert pareto_mask(points).tolist() == brute_force(points)


@given(points=clouds(), data=st.data())
@settings(deadline=None, max_examples=200)
def test_minimizing_is_maximizing_the_negative(points: list[list[float]], data: st.DataObject) -> None:
    negated = [[-x for x in p] for p in points]
    assert pareto_mask(points, maximize=False).tolist() == brute_force(negated)
    if points:
        each = data.draw(st.lists(st.booleans(), min_size=len(points[0]), max_size=len(points[0])))
        signed = [[x if up else -x for x, up in zip(p, each, strict=True)] for p in points]
        assert pareto_mask(points, maximize=each).tolist() == brute_force(signed)


@pytest.mark.parametrize("objectives", [2, 3])
def test_equals_brute_force_on_continuous_points(objectives: int) -> None:
    points = np.random.default_rng(0).normal(size=(300, objectives))
    mask = pareto_mask(points)
    assert mask.tolist() == brute_force(points.tolist())
    assert 0 < mask.sum() < 100


def test_equal_points_are_on_the_front_together() -> None:
    assert pareto_mask([[1, 1], [1, 1], [0, 1], [1, 0]]).tolist() == [True, True, False, False]


def test_constant_points_are_all_on_the_front() -> None:
    assert pareto_mask(np.full((4, 3), 0.5)).all()


def test_a_point_with_a_nan_is_off_and_dominates_nothing() -> None:
    assert pareto_mask([[nan, 9.0], [9.0, nan], [1.0, 1.0]]).tolist() == [False, False, True]
    assert not pareto_mask([[nan, nan]]).any()


def test_infinity_is_the_best_value_there_is() -> None:
    assert pareto_mask([[inf, 0.0], [5.0, 5.0], [inf, -inf], [-inf, 6.0]]).tolist() == [
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("points", [[], np.zeros((0, 2))])
def test_no_points(points: Any) -> None:
    mask = pareto_mask(points)
    assert mask.shape == (0,)
    assert mask.dtype == np.bool_


def test_the_mask_does_not_depend_on_the_order_nor_change_the_points() -> None:
    points = np.random.default_rng(1).integers(0, 6, size=(50, 3)).astype(float)
    before, order = points.copy(), np.random.default_rng(2).permutation(50)
    assert (pareto_mask(points)[order] == pareto_mask(points[order])).all()
    assert (points == before).all()


def test_two_objectives_take_n_log_n() -> None:
    first = np.random.default_rng(0).permutation(200_000)
    started = time.process_time()
    assert pareto_mask(np.stack((first, -first), axis=1)).all()  # the worst case: every point is on the front
    assert time.process_time() - started < 5  # some 0.1 s; comparing all pairs takes minutes


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        pareto_mask([1, 2, 3])
    with pytest.raises(ConfigError, match="maximize has 1 entries for 2 objectives"):
        pareto_mask([[1, 2]], maximize=[True])
