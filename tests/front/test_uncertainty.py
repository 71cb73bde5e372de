"""Intervals against published values, and their coverage by simulation.

Shapes: R draws, P points, S sets, M objectives.
"""

import numpy as np
import pytest

from clippo.errors import ConfigError
from clippo.front import (
    accuracy_draws,
    draws_interval,
    front_probability,
    retention_draws,
    retention_interval,
    wilson_interval,
)

ACCURACIES = (0.02, 0.3, 0.55, 0.8, 0.95, 0.98)


@pytest.mark.parametrize(  # Newcombe, Statistics in Medicine 1998, table I, method 3
    ("n_correct", "n_total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(n_correct: int, n_total: int, low: float, high: float) -> None:
    assert wilson_interval(n_correct, n_total, confidence=0.95) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(n_total - n_correct, n_total, confidence=0.95)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_broadcasts_and_stays_within_bounds() -> None:
    low, high = wilson_interval([[0], [1], [7]], [7, 70, 7000])
    assert low.shape == high.shape == (3, 3)
    assert ((low >= 0) & (low < high) & (high <= 1)).all()
    assert high[2, 0] == 1
    assert low[0, 0] == 0


def test_nothing_measured_is_anything() -> None:
    low, high = wilson_interval(0, 0)
    assert (low, high) == pytest.approx((0, 1))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 90.0, float("nan")])
def test_confidence_has_bounds(confidence: float) -> None:
    with pytest.raises(ConfigError, match=r"confidence is .* between 0 and 1"):
        wilson_interval(1, 2, confidence)
    with pytest.raises(ConfigError, match=r"confidence is .* between 0 and 1"):
        draws_interval([1, 2], confidence)


@pytest.mark.parametrize("n_total", [171, 1000, 2000])
@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_wilson_90_percent_covers_at_least_87(n_total: int, accuracy: float) -> None:
    n_correct = np.random.default_rng(0).binomial(n_total, accuracy, size=20_000)
    low, high = wilson_interval(n_correct, n_total)
    assert 0.87 <= np.mean((low <= accuracy) & (accuracy <= high)) <= 0.95


@pytest.mark.parametrize("n_total", [171, 1000])
@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_drawn_accuracies_cover_too(n_total: int, accuracy: float) -> None:
    rng = np.random.default_rng(0)
    n_correct = rng.binomial(n_total, accuracy, size=4000)
    low, high = draws_interval(accuracy_draws(n_correct, n_total, draws=500, rng=rng))
    assert 0.87 <= np.mean((low <= accuracy) & (accuracy <= high)) <= 0.95


@pytest.mark.parametrize(
    ("policy_S", "reference_S"),
    [((0.6, 0.7), (0.95, 0.8)), ((0.93, 0.8), (0.95, 0.85)), ((0.2,), (0.9,)), ((0.9,), (0.6,))],
)
def test_retention_90_percent_covers_at_least_87(
    policy_S: tuple[float, ...], reference_S: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(0)
    shape = (2000, len(policy_S))
    policy_PS, reference_PS = rng.binomial(1000, policy_S, shape), rng.binomial(1000, reference_S, shape)
    low, high = retention_interval(policy_PS, [1000], reference_PS, [1000], draws=400)
    retention = np.minimum(np.divide(policy_S, reference_S), 1).mean()
    assert np.mean((low <= retention) & (retention <= high)) >= 0.87
    assert (high <= 1).all()


def test_retention_draws_share_the_reference_between_points() -> None:
    rng = np.random.default_rng(0)
    # nearly no noise of its own in the policies, so what is left is the reference's
    shared_RP = retention_draws([[500_000]] * 2, [1_000_000], [90], [100], draws=500, rng=rng)
    assert shared_RP.shape == (500, 2)
    assert np.corrcoef(shared_RP.T)[0, 1] > 0.99
    own_RP = retention_draws([[500_000]] * 2, [1_000_000], [[90]] * 2, [[100]] * 2, draws=500, rng=rng)
    assert abs(np.corrcoef(own_RP.T)[0, 1]) < 0.2


def test_a_fixed_seed_repeats() -> None:
    first, again, other = (retention_interval([80], [100], [90], [100], seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_every_accuracy_has_noise() -> None:
    draws = accuracy_draws([0, 100], 100, draws=500, rng=np.random.default_rng(0))
    assert draws.shape == (500, 2)
    assert (draws.std(axis=0) > 0.001).all()


def test_impossible_counts_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="n_correct"):
        wilson_interval(3, 2)


def test_front_probability_where_it_is_known() -> None:
    rng = np.random.default_rng(0)
    # of two points that are equal but for noise, one dominates the other with probability 1/4
    twins = front_probability(accuracy_draws(np.full((2, 2), 500), 1000, draws=4000, rng=rng))
    assert twins == pytest.approx([0.75, 0.75], abs=0.03)
    apart = front_probability(accuracy_draws([[900, 500], [500, 900], [300, 300]], 1000, draws=200, rng=rng))
    assert apart.tolist() == [1, 1, 0]


def test_front_probability_is_right_as_often_as_it_says() -> None:
    # Accuracies that really vary, so that what a probability promises can be counted.
    rng = np.random.default_rng(0)
    promised, happened = [], []
    for _ in range(150):
        true_PM = rng.beta(0.5, 0.5, size=(8, 2)) * 0.2 + 0.4
        counts_PM = rng.binomial(300, true_PM)
        promised.append(front_probability(accuracy_draws(counts_PM, 300, draws=100, rng=rng)))
        happened.append(front_probability(true_PM[None]))
    promise, truth = np.concatenate(promised), np.concatenate(happened)
    assert truth[promise > 0.9].mean() > 0.85
    assert truth[promise < 0.1].mean() < 0.15
    middle = (promise > 0.3) & (promise < 0.7)
    assert truth[middle].mean() == pytest.approx(promise[middle].mean(), abs=0.12)
