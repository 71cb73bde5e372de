import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clippo.errors import ConfigError
from clippo.evaluate import bootstrap_interval, lean, majority_counts, max_skew, top_share


def test_majority_and_minority_by_hand_with_three_groups() -> None:
    counts = majority_counts(["a", "b", "c", "a", "b"], ["a", "b", "b", "c", "b"], ["a", "a", "a", "c", "b"])
    assert counts == {"majority": (2, 3), "minority": (1, 2)}


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_the_two_parts_are_all_pictures(rows: list[tuple[int, int, int]]) -> None:
    said, shown, usual = (list(column) for column in zip(*rows, strict=True))
    counts = majority_counts(said, shown, usual).values()
    assert sum(total for _, total in counts) == len(rows)
    assert sum(right for right, _ in counts) == sum(a == b for a, b in zip(said, shown, strict=True))


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12), st.floats(-50, 50))
@settings(deadline=None, max_examples=50)
def test_leans_towards_all_groups_add_up_to_one(row: list[float], shift: float) -> None:
    leans = [lean([row], [group]) for group in range(len(row))]
    assert sum(leans) == pytest.approx(1)
    assert lean([[x + shift for x in row]], [0]) == pytest.approx(leans[0], abs=1e-9)


def test_the_lean_has_a_sign() -> None:
    logits = [[3.0, 0.0], [0.0, 3.0]]
    assert lean(logits, [0, 1]) > 0.9
    assert lean(logits, [1, 0]) < 0.1
    assert lean(logits, [0, 0]) == pytest.approx(0.5)


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_top_shares_add_up_and_give_the_skew(data: st.DataObject) -> None:
    groups = [0, 1, 2, *data.draw(st.lists(st.integers(0, 2), max_size=20))]
    scores, k = data.draw(st.permutations(range(len(groups)))), data.draw(st.integers(1, len(groups)))
    shares = [top_share(scores, groups, k, group) for group in range(3)]
    assert sum(shares) == pytest.approx(1)
    assert max_skew(scores, groups, k) == pytest.approx(np.log(max(shares) * 3))


def _skewed_pool(bias: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores (20 queries, 48 pictures) of two groups of 24; ``bias`` lifts the first."""
    groups = np.repeat([0, 1], 24)
    return rng.normal(size=(20, 48)) + bias * (groups == 0), groups


def _mean_skew(scores: np.ndarray, groups: np.ndarray, index: np.ndarray) -> float:
    """The mean MaxSkew at 24 of two groups, all queries at once."""
    top = np.argsort(-scores[:, index], axis=1)[:, :24]
    share = groups[index][top].mean(axis=1)
    return float(np.log(2 * np.maximum(np.maximum(share, 1 - share), 1 / 24)).mean())


def test_the_fast_mean_of_the_next_test_is_max_skew() -> None:
    scores, groups = _skewed_pool(0.8, np.random.default_rng(1))
    expected = np.mean([max_skew(row, groups, 24) for row in scores])
    assert _mean_skew(scores, groups, np.arange(48)) == pytest.approx(expected)


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.2])
def test_a_90_percent_interval_of_max_skew_covers(bias: float) -> None:
    rng, every = np.random.default_rng(0), np.arange(48)
    expected = np.mean([_mean_skew(*_skewed_pool(bias, rng), every) for _ in range(1000)])
    covered = 0
    for seed in range(80):
        scores, groups = _skewed_pool(bias, rng)
        low, high = bootstrap_interval(
            lambda index, s=scores, g=groups: _mean_skew(s, g, index), groups, draws=80, seed=seed
        )
        covered += low <= expected <= high
    assert covered >= 64  # 72 of 80 are expected; quantiles of the draws cover about 22 at bias 0


def test_strata_keep_a_balanced_pool_balanced() -> None:
    strata = np.array([0, 1, 0, 1, 1, 1])
    seen = []
    low, high = bootstrap_interval(lambda index: seen.append(index) or strata[index].mean(), strata, draws=20)
    assert (low, high) == pytest.approx((4 / 6, 4 / 6))
    assert all(np.array_equal(strata[i], np.sort(strata)) for i in seen[:20])
    assert len({tuple(i) for i in seen}) > 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: majority_counts([0, 1], [0], [0]), "expected one each"),
        (lambda: lean([[0.1, 0.2]], [0, 1]), "expected a row each"),
        (lambda: lean(np.zeros((0, 2)), []), "expected a row each"),
        (lambda: top_share([1, 2], ["a", "b"], 1, "c"), "no picture has group 'c'; the groups are: a, b"),
        (
            lambda: bootstrap_interval(len, [0, 1], confidence=1),
            "confidence is 1, but must be between",
        ),
        (lambda: bootstrap_interval(len, [0, 1], draws=1), "draws is 1, but must be at least 2"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
