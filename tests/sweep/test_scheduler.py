"""Early stopping: the decisions alone, and then in Ray Tune, which must act on them."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clippo.errors import ConfigError
from clippo.sweep.scheduler import Decision, Halving, epsilon_net

# few values, so that ties, duplicates and constant objectives are the rule; exact in every scale below
value = st.integers(-4, 4).map(lambda i: i / 4)


def clouds(min_size: int = 0, max_size: int = 25) -> st.SearchStrategy[list[list[float]]]:
    return st.integers(1, 3).flatmap(
        lambda m: st.lists(st.lists(value, min_size=m, max_size=m), min_size=min_size, max_size=max_size)
    )


def halving(factor: int = 3, min_epochs: int = 1, max_epochs: int = 10) -> Halving:
    return Halving(min_epochs=min_epochs, reduction_factor=factor, max_epochs=max_epochs)


def arrive(points: list[list[float]], factor: int = 3) -> list[Decision]:
    """The decisions at the first rung for trials that arrive in this order."""
    one = halving(factor)
    return [one.decide(str(i), 1, p) for i, p in enumerate(points)]


def ranks(points: list[list[float]]) -> list[int]:
    """Non-dominated ranks by their definition: one more than the worst rank of those that dominate."""

    def dominates(a: list[float], b: list[float]) -> bool:
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    found: dict[tuple[float, ...], int] = {}
    for p in sorted(points, reverse=True):  # whoever dominates a point comes before it
        found[tuple(p)] = max((found[tuple(q)] + 1 for q in points if dominates(q, p)), default=0)
    return [found[tuple(p)] for p in points]


def test_rungs_are_powers_of_the_reduction_factor_below_the_last_epoch() -> None:
    assert halving(3, 1, 10).rungs == (1, 3, 9)
    assert halving(3, 1, 9).rungs == (1, 3)
    assert halving(2, 3, 20).rungs == (3, 6, 12)
    assert halving(2, 4, 4).rungs == ()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 3, 9), "min_epochs is 0; it must be at least 1"),
     ((1, 1, 9), "reduction_factor is 1; it must be at least 2"),
     ((1, 3, 0), "max_epochs is 0; it must be at least 1")],
)  # fmt: skip
def test_numbers_that_are_too_small(numbers: tuple[int, int, int], message: str) -> None:
    min_epochs, factor, max_epochs = numbers
    with pytest.raises(ConfigError, match=message):
        halving(factor, min_epochs, max_epochs)


def test_worse_and_worse_trials() -> None:
    """Each is dominated by all before it: a third goes on, rounded up, and the first two always."""
    decisions = arrive([[-i, -i] for i in range(9)])
    assert [d.stop for d in decisions] == [False, False, *[True] * 7]
    assert [d.rank for d in decisions] == [d.place for d in decisions] == list(range(9))
    assert [d.of for d in decisions] == list(range(1, 10))


def test_better_and_better_trials_all_go_on() -> None:
    assert not any(d.stop for d in arrive([[i, i] for i in range(20)]))


def test_a_front_is_thinned_evenly() -> None:
    """Nine trials on a quarter of a circle: the middle, both ends, then the middles of the gaps."""
    arc = [[math.sin(i * math.pi / 16), math.cos(i * math.pi / 16)] for i in range(9)]
    order = epsilon_net(arc).tolist()
    assert (order[0], set(order[1:3]), set(order[3:5])) == (4, {0, 8}, {2, 6})
    late = [arrive([*arc[:i], *arc[i + 1 :], arc[i]])[-1] for i in range(9)]
    assert {d.rank for d in late} == {0}
    assert [i for i, d in enumerate(late) if not d.stop] == [0, 4, 8]


def test_inside_a_front_the_best_compromise_is_first() -> None:
    bulge = [[0.0, 1.0], [0.1, 0.95], [0.7, 0.7], [1.0, 0.0]]
    assert epsilon_net(bulge).tolist() == [2, 0, 3, 1]


def test_equal_trials_are_one_point_of_the_front() -> None:
    """The first of them represents it; the others come last."""
    decisions = arrive([[1, 1]] * 6)
    assert {d.rank for d in decisions} == {0}
    assert [d.place for d in decisions] == list(range(6))
    assert [d.stop for d in decisions] == [False, False, True, True, True, True]
    assert epsilon_net([[1, 0], [1, 0], [0, 1]]).tolist() == [0, 2, 1]


@given(points=clouds(min_size=1), factor=st.integers(2, 4))
@settings(deadline=None, max_examples=200)
def test_equals_brute_force(points: list[list[float]], factor: int) -> None:
    for n, decision in enumerate(arrive(points, factor), start=1):
        rank = ranks(points[:n])
        assert decision.rank == rank[-1]
        better, as_good = sum(r < rank[-1] for r in rank), rank.count(rank[-1])
        assert better <= decision.place < better + as_good
        assert decision.stop == (n >= factor and decision.place >= math.ceil(n / factor))
        assert (decision.rung, decision.of) == (1, n)


@given(points=clouds(min_size=1), factor=st.integers(2, 4))
@settings(deadline=None, max_examples=100)
def test_places_are_a_ranking_and_no_more_are_stopped_than_asked_for(
    points: list[list[float]], factor: int
) -> None:
    """Were each the last to arrive, at least a share of 1 / factor of them would go on."""
    late = []
    for i in range(len(points)):
        one = halving(factor)
        for j, p in enumerate(points):
            one.record(str(j), 1, p)
        late.append(one.decide(str(i), 1, points[i]))
    assert sorted(d.place for d in late) == list(range(len(points)))
    going_on = sum(not d.stop for d in late)
    assert going_on == (math.ceil(len(points) / factor) if len(points) >= factor else len(points))
    by_place = [d.rank for d in sorted(late, key=lambda d: d.place)]
    assert by_place == sorted(by_place)


@given(points=clouds(), data=st.data())
@settings(deadline=None, max_examples=100)
def test_units_of_the_objectives_do_not_matter(points: list[list[float]], data: st.DataObject) -> None:
    m = len(points[0]) if points else 1
    scales = data.draw(st.lists(st.sampled_from([2.0**-20, 0.5, 1.0, 2.0**30]), min_size=m, max_size=m))
    moved = [[x * s + s for x, s in zip(p, scales, strict=True)] for p in points]
    assert arrive(moved) == arrive(points)


@given(points=clouds(min_size=1))
@settings(deadline=None, max_examples=100)
def test_an_epsilon_net_is_greedy(points: list[list[float]]) -> None:
    """Every next point is one of those farthest from all before it, after scaling to the unit square."""
    array = np.array(points)
    span = np.ptp(array, axis=0)
    scaled = (array - array.min(axis=0)) / np.where(span > 0, span, 1)
    order = epsilon_net(points).tolist()
    assert sorted(order) == list(range(len(points)))
    assert scaled[order[0]].sum() == pytest.approx(scaled.sum(axis=1).max())
    for k in range(1, len(order)):
        gap = [min(math.dist(scaled[i], scaled[j]) for j in order[:k]) for i in order[k:]]
        assert gap[0] == pytest.approx(max(gap))


@given(points=clouds(min_size=1), data=st.data())
@settings(deadline=None, max_examples=100)
def test_trials_without_finite_values_stop_and_count_for_nothing(
    points: list[list[float]], data: st.DataObject
) -> None:
    one, asked = halving(), []
    for i, p in enumerate(points):
        if data.draw(st.booleans()):
            bad = [*p[:-1], data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))]
            decision = one.decide(f"bad{i}", 1, bad)
            assert decision.stop
            assert decision.place == decision.of - 1 == i
        asked.append(one.decide(str(i), 1, p))
    assert asked == arrive(points)


def test_between_rungs_all_finite_trials_go_on() -> None:
    one = halving()
    assert one.decide("a", 2, [0.0, 0.0]) == Decision(stop=False)
    assert one.decide("a", 2, [math.nan, 0.0]) == Decision(stop=True)
    assert one.counts() == {1: (0, 0), 3: (0, 0), 9: (0, 0)}


def test_a_trial_that_reports_again_gets_the_same_answer_and_counts_once() -> None:
    one = halving()
    first = [one.decide(str(i), 1, [i % 3, -i]) for i in range(12)]
    assert [one.decide(str(i), 1, [i % 3, -i]) for i in range(12)] == first
    # not even other values, or a late recovery, change what was decided
    assert [one.decide(str(i), 1, [99, 99]) for i in range(12)] == first
    nan = one.decide("nan", 1, [math.nan, 0])
    assert one.decide("nan", 1, [0, 0]) == nan
    assert one.counts()[1] == (12, sum(d.stop for d in first) + 1)


def test_rungs_do_not_know_each_other() -> None:
    one = halving()
    for i in range(6):
        one.decide(str(i), 1, [i, i])
    assert one.decide("0", 3, [0, 0]) == Decision(stop=False, rung=3, rank=0, place=0, of=1)


def test_a_trial_of_an_earlier_run_is_compared_with_and_is_decided_anew() -> None:
    one = halving()
    for i in range(3):
        one.record(str(i), 1, [i, i])
        one.record(str(i), 1, [i, i])
        one.record(str(i), 2, [i, i])
    assert one.counts() == {1: (3, 0), 3: (0, 0), 9: (0, 0)}
    assert one.decide("new", 1, [-1, -1]) == Decision(stop=True, rung=1, rank=3, place=3, of=4)
    assert one.decide("0", 1, [0, 0]) == Decision(stop=True, rung=1, rank=2, place=2, of=4)


@given(points=clouds(min_size=2), data=st.data())
@settings(deadline=None, max_examples=50)
def test_restored_it_goes_on_as_if_nothing_had_happened(
    points: list[list[float]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(points)))
    before = halving()
    decisions = [before.decide(str(i), 1, p) for i, p in enumerate(points[:cut])]
    before.decide("nan", 1, [math.nan] * len(points[0]))
    before.decide("0", 3, points[0])
    state: Any = json.loads(json.dumps(before.state()))
    after = halving()
    after.decide("forgotten", 1, points[0])
    after.restore(state)
    assert after.state() == before.state()
    assert [after.decide(str(i), 1, p) for i, p in enumerate(points[:cut])] == decisions
    rest = [after.decide(str(i), 1, p) for i, p in enumerate(points) if i >= cut]
    assert decisions + rest == arrive(points)
