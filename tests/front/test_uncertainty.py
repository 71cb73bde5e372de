"""Intervals against published values, and their coverage by simulation.

Shapes: R draws, P points, S sets, M objectives.
"""

import numpy as np
import pytest

from clippo.errors import ConfigError
from clippo.front import front_probability, hypervolume, retention_interval, wilson_interval
from clippo.front.uncertainty import (
    accuracy_at,
    cross_hypervolumes,
    curve_correlation,
    hypervolume_interval,
    seed_spread,
    widened,
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
        retention_interval([1], [2], [1], [2], confidence)


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
    low, high = np.quantile(
        accuracy_at(n_correct, n_total, rng.normal(size=(500, 4000))), [0.05, 0.95], axis=0
    )
    assert 0.87 <= np.mean((low <= accuracy) & (accuracy <= high)) <= 0.95


def test_draws_go_through_the_measured_accuracy_and_have_noise_at_the_ends() -> None:
    assert accuracy_at([300, 5000], [1000, 10_000], 0) == pytest.approx([0.3, 0.5], abs=1e-3)
    assert accuracy_at([0, 100], 100, [-2, 2]).tolist() == [0, 1]
    assert (np.ptp(accuracy_at([0, 100], 100, [[-2], [2]]), axis=0) > 0.01).all()


@pytest.mark.parametrize("n_total", [171, 384])
@pytest.mark.parametrize(
    ("policy_S", "reference_S"),
    [
        ((0.6, 0.7), (0.95, 0.8)),
        ((0.93, 0.8), (0.95, 0.85)),
        ((0.2,), (0.9,)),
        ((0.9,), (0.6,)),
        ((0.97, 0.9, 0.95), (0.97, 0.9, 0.95)),  # keeps everything: all ratios are at the cap
        ((0.96, 0.9, 0.35), (0.97, 0.9, 0.95)),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_retention_90_percent_covers_at_least_87(
    policy_S: tuple[float, ...], reference_S: tuple[float, ...], n_total: int, shared: bool
) -> None:
    rng = np.random.default_rng(0)
    ease_PSN = rng.random((1000, len(policy_S), n_total))
    other_PSN = ease_PSN if shared else rng.random(ease_PSN.shape)  # both saw the same pictures, or not
    policy_PS = (ease_PSN < np.array(policy_S)[:, None]).sum(axis=-1)
    reference_PS = (other_PSN < np.array(reference_S)[:, None]).sum(axis=-1)
    low, high = retention_interval(policy_PS, [n_total], reference_PS, [n_total])
    retention = np.minimum(np.divide(policy_S, reference_S), 1).mean()
    assert np.mean((low <= retention) & (retention <= high)) >= 0.87
    assert ((low >= 0) & (high <= 1)).all()


def test_a_retention_interval_holds_what_was_measured() -> None:
    rng = np.random.default_rng(0)
    policy_PS, reference_S = rng.integers(0, 101, size=(500, 3)), np.array([3, 60, 100])
    low, high = retention_interval(policy_PS, [100], reference_S, [100])
    measured = np.minimum(policy_PS / reference_S, 1).mean(axis=1)
    assert ((low <= measured + 1e-12) & (measured <= high + 1e-12)).all()


def test_a_seed_moves_an_interval_apart() -> None:
    of_counts = wilson_interval([500], [1000])
    assert np.allclose(widened([0.5], of_counts, 0.0, dof=0), of_counts)
    low, high = widened([0.5], of_counts, 0.05, dof=30)
    expected = np.hypot(2 * 1.697 * 0.05, of_counts[1] - of_counts[0])
    assert high - low == pytest.approx(expected, abs=1e-3)
    assert widened([0.99], wilson_interval([99], [100]), 0.2, dof=2)[1] == 1


@pytest.mark.parametrize("shared", [False, True])
def test_90_percent_cover_at_least_87_where_seeds_differ(shared: bool) -> None:
    """Eight settings, three of them run with three seeds; what is wanted is the mean over all seeds."""
    rng = np.random.default_rng(0)
    n, seed_sd, covered = 400, 0.03, []
    for _ in range(300):
        mean_P = rng.uniform(0.3, 0.9, size=8)
        ease_N = rng.random(n)
        numbers = [
            [
                np.mean((ease_N if shared else rng.random(n)) < mean + rng.normal(0, seed_sd))
                for _ in range(3 if p < 3 else 1)
            ]
            for p, mean in enumerate(mean_P)
        ]
        sd, dof = seed_spread(numbers)
        assert dof == 6
        for own, mean in zip(numbers, mean_P, strict=True):
            value = np.mean(own)
            low, high = widened(value, wilson_interval(value * n, n), sd / np.sqrt(len(own)), dof)
            covered.append(low <= mean <= high)
    assert np.mean(covered) >= 0.87


def test_nothing_repeated_has_no_spread() -> None:
    assert seed_spread([[0.5], [0.7]]) == (0, 0)
    assert seed_spread([]) == (0, 0)
    assert seed_spread([[0.5, 0.5], [0.7]]) == (0, 1)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_correlation_of_a_curve_is_found(correlation: float) -> None:
    rng = np.random.default_rng(0)
    shape = 30, 11, 5  # curves, steps, sets
    common, own = rng.normal(size=(30, 1, 5)), rng.normal(size=shape)
    share = np.linspace(0.4, 0.8, 11)[:, None] ** [1, 2, 0.5, 1, 1]
    noise = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own
    counts = 400 * share + noise * np.sqrt(400 * share * (1 - share))
    assert curve_correlation(counts, np.full(shape, 400)) == pytest.approx(correlation, abs=0.06)


def test_a_bent_or_missing_curve_is_taken_as_independent() -> None:
    jump = np.tile([100, 300, 100, 300, 100], (2, 1))[..., None]
    assert curve_correlation(jump, np.full(jump.shape, 400)) == 0
    assert curve_correlation(np.full((2, 3, 1), np.nan), np.full((2, 3, 1), np.nan)) == 0


def test_impossible_counts_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="n_correct"):
        wilson_interval(3, 2)


def accuracies(n_correct: object, n_total: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    counts = np.asarray(n_correct)
    return accuracy_at(counts, n_total, rng.normal(size=(draws, *counts.shape)))


def test_front_probability_where_it_is_known() -> None:
    rng = np.random.default_rng(0)
    # of two points that are equal but for noise, one dominates the other with probability 1/4
    twins = front_probability(accuracies(np.full((2, 2), 500), 1000, 4000, rng))
    assert twins == pytest.approx([0.75, 0.75], abs=0.03)
    apart = front_probability(accuracies([[900, 500], [500, 900], [300, 300]], 1000, 200, rng))
    assert apart.tolist() == [1, 1, 0]


def test_front_probability_is_right_as_often_as_it_says() -> None:
    # Accuracies that really vary, so that what a probability promises can be counted.
    rng = np.random.default_rng(0)
    promised, happened = [], []
    for _ in range(150):
        true_PM = rng.beta(0.5, 0.5, size=(8, 2)) * 0.2 + 0.4
        counts_PM = rng.binomial(300, true_PM)
        promised.append(front_probability(accuracies(counts_PM, 300, 100, rng)))
        happened.append(front_probability(true_PM[None]))
    promise, truth = np.concatenate(promised), np.concatenate(happened)
    assert truth[promise > 0.9].mean() > 0.85
    assert truth[promise < 0.1].mean() < 0.15
    middle = (promise > 0.3) & (promise < 0.7)
    assert truth[middle].mean() == pytest.approx(promise[middle].mean(), abs=0.12)


def test_choosing_and_measuring_apart_takes_the_luck_out() -> None:
    """Of equal points the best is luck: as measured it is too good, chosen on one half it is not."""
    rng = np.random.default_rng(0)
    measured_PM = 0.5 + 0.02 * rng.normal(size=(200, 2))
    noise_RPM = 0.02 * rng.normal(size=(100, 200, 2))
    other_RPM = 0.02 * np.sqrt(2) * rng.normal(size=(100, 200, 2))
    halves = measured_PM + noise_RPM, measured_PM - noise_RPM, measured_PM - noise_RPM + other_RPM
    lucky = hypervolume(measured_PM, [0, 0])
    assert lucky > 0.29
    assert cross_hypervolumes(*halves, [0, 0]).mean() < 0.265


def test_the_widest_model_of_the_noise_counts() -> None:
    narrow, wide = np.array([0.9, 1.1]), np.array([0.5, 1.5])
    low, high = hypervolume_interval(0.9, 1.0, (narrow, wide))
    assert (low, high) == pytest.approx((0.9 - 1.645 * 0.5, 1.0 + 1.645 * 0.5), abs=1e-3)
    assert hypervolume_interval(0.1, 0.2, (wide,))[0] == 0
