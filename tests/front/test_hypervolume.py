import itertools
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clippo.errors import ConfigError
from clippo.front import hypervolume, pareto_mask


def clouds(objectives: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(-2, 5)] * objectives), max_size=12)


def count_cells(points: list[tuple[int, ...]], reference: tuple[int, ...]) -> int:
    """Unit cells that some point dominates: the hypervolume of points on a grid."""
    return sum(
        any(all(c < x for c, x in zip(cell, point, strict=True)) for point in points)
        for cell in itertools.product(*(range(r, 6) for r in reference))
    )


@pytest.mark.parametrize("objectives", [2, 3])
@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_equals_brute_force(objectives: int, data: st.DataObject) -> None:
    points = data.draw(clouds(objectives))
    reference = data.draw(st.tuples(*[st.integers(-1, 2)] * objectives))
    assert hypervolume(points, reference) == count_cells(points, reference)


@pytest.mark.parametrize("objectives", [2, 3])
def test_only_the_front_counts_and_axes_scale(objectives: int) -> None:
    rng = np.random.default_rng(0)
    points, reference = rng.uniform(size=(60, objectives)), np.full(objectives, 0.1)
    scale, shift = np.array([2.0, 0.5, 3.0])[:objectives], np.array([1.0, -4.0, 0.3])[:objectives]
    whole = hypervolume(points, reference)
    assert 0 < whole < 0.9**objectives
    assert hypervolume(points[pareto_mask(points)], reference) == pytest.approx(whole)
    assert hypervolume(points * scale + shift, reference * scale + shift) == pytest.approx(
        whole * scale.prod()
    )
    assert hypervolume(points[:, ::-1], reference) == pytest.approx(whole)


def test_staircase_in_closed_form() -> None:
    steps = np.arange(1, 1001)
    assert hypervolume(np.stack((steps, 1001 - steps), axis=1), [0, 0]) == 1000 * 1001 / 2


def test_a_third_objective_that_is_constant_is_a_height() -> None:
    points = np.random.default_rng(3).uniform(size=(30, 2))
    flat = np.column_stack((points, np.full(30, 0.25)))
    assert hypervolume(flat, [0, 0, 0]) == pytest.approx(hypervolume(points, [0, 0]) / 4)


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0),
        ([[2, 3]], 2),
        ([[2, 3], [2, 3]], 2),
        ([[1, 9], [9, 1]], 0),  # on the reference lines, not above them
        ([[0, 9], [2, 3]], 2),
        ([[nan, 9], [2, nan], [2, 3]], 2),
        ([[inf, 1], [-inf, 9], [2, 3]], 2),
        ([[inf, 2], [2, 3]], inf),
        ([[inf, 3], [inf, 3]], inf),
        ([[inf, 3], [inf, 2], [2, inf], [2, inf], [inf, inf]], inf),
    ],
)
def test_values_at_the_edges(points: list[list[float]], area: float) -> None:
    assert hypervolume(points, [1, 1]) == area


def test_infinity_in_three_objectives() -> None:
    assert hypervolume([[2, 2, inf], [3, 3, inf], [inf, 2, 2]], [1, 1, 1]) == inf
    assert hypervolume([[2, inf, 1], [2, 2, 2.0], [nan, 3, 3]], [1, 1, 1]) == 1


@pytest.mark.parametrize("reference", [[0], [0, 0, 0, 0], [0, inf], [nan, 0], 0])
def test_a_bad_reference_point_is_refused(reference: Any) -> None:
    with pytest.raises(ConfigError, match="two or three finite numbers"):
        hypervolume([[1, 1]], reference)


@pytest.mark.parametrize("points", [[1, 1], [[1, 1, 1]]])
def test_points_that_do_not_fit_are_refused(points: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected \(points, 2\)"):
        hypervolume(points, [0, 0])
