"""How sure a front is: intervals and probabilities from counts and from repeated seeds.

A number is a count, so its noise is known. One accuracy has a closed interval (`wilson_interval`), and so has
a retention (`retention_interval`). What is compared with other points (a place on the front, a
hypervolume) is drawn again and again instead: `accuracy_at` says which accuracy the counts allow at a normal
deviate, and whoever draws the deviates decides which points move together.

Shapes: R draws, P points, S evaluation sets, M objectives.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clippo.errors import ConfigError
from clippo.front.hypervolume import hypervolume
from clippo.front.pareto import pareto_mask

Array = NDArray[np.float64]
Interval = tuple[Array, Array]

CONFIDENCE = 0.9
"""Of all intervals that are shown."""


def wilson_interval(n_correct: ArrayLike, n_total: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The interval of an accuracy from its counts (Wilson, JASA 1927; Brown et al., Stat. Sci. 2001).

    Sound where the textbook's ``p +- z sqrt(p (1 - p) / n)`` is not: near 0 and 1, and for small n. With
    nothing measured (n_total = 0) it is [0, 1].

    Takes counts of any shapes that broadcast, 0 <= n_correct <= n_total; ``confidence`` in (0, 1).

    Returns:
        (low, high), each of the broadcast shape.

    Raises:
        ConfigError: for a confidence out of its bounds.

    >>> low, high = wilson_interval([90, 1000], [100, 1000])
    >>> low.round(4), high.round(4)
    (array([0.8396, 0.9973]), array([0.9393, 1.    ]))
    """
    z = deviate(confidence)
    correct, total = _counts(n_correct, n_total)
    centre = (correct + z**2 / 2) / (total + z**2)
    variance = correct * (total - correct) / np.maximum(total, 1)
    half_width = z / (total + z**2) * np.sqrt(variance + z**2 / 4)
    return np.clip(centre - half_width, 0, 1), np.clip(centre + half_width, 0, 1)


def retention_interval(
    policy_correct: ArrayLike,
    policy_total: ArrayLike,
    reference_correct: ArrayLike,
    reference_total: ArrayLike,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The interval of a retention: the mean over sets of policy / reference accuracy, each capped at 1.

    Wilson's limits of the accuracies, carried over to their ratio and to the mean of the ratios by the method
    of variance estimates recovery (Donner and Zou, Stat. Methods Med. Res. 2012). Upper limits that reach
    the cap are added up instead of being combined as if they were independent, since a retention that is
    truly 1 is measured below it. Policy and reference count as independent although they saw the same
    pictures, as counts do not hold the pairing: the interval is, if anything, too wide. The untouched model
    retains 1 by definition and needs none.

    Takes policy counts (..., S), for instance (P, S); reference counts that broadcast to them,
    reference_correct > 0.

    Returns:
        (low, high), each (...).

    Raises:
        ConfigError: for a confidence out of its bounds.

    >>> low, high = retention_interval([[880, 900], [700, 700]], [[1000]], [900, 950], [1000])
    >>> low.round(2), high.round(2)
    (array([0.95, 0.74]), array([0.98, 0.78]))
    """
    policy, p_total = _counts(policy_correct, policy_total)
    reference, q_total = _counts(reference_correct, reference_total)
    policy, p_total, reference, q_total = np.broadcast_arrays(policy, p_total, reference, q_total)
    ratio = np.minimum((policy / p_total) / (reference / q_total), 1)
    retention, sets = ratio.mean(axis=-1), ratio.shape[-1]
    low, high = _ratio_interval(policy, p_total, reference, q_total, confidence)
    # Whether a set may be at the cap is asked of all sets at once, hence Bonferroni.
    capped = _ratio_interval(policy, p_total, reference, q_total, 1 - (1 - confidence) / sets)[1] >= 1
    below = np.sqrt(((ratio - np.clip(low, 0, ratio)) ** 2).sum(axis=-1))
    above = np.sqrt((np.where(capped, 0, high - ratio) ** 2).sum(axis=-1))
    highest = np.where(capped, 1, ratio).mean(axis=-1) + above / sets
    return np.clip(retention - below / sets, 0, 1), np.clip(highest, 0, 1)


def _ratio_interval(
    policy: Array, p_total: Array, reference: Array, q_total: Array, confidence: float
) -> Interval:
    """The interval of a ratio of two accuracies; the upper limit may be above 1."""
    p, q = policy / p_total, reference / q_total
    p_low, p_high = wilson_interval(policy, p_total, confidence)
    q_low, q_high = wilson_interval(reference, q_total, confidence)
    below = np.maximum(q_high * (2 * q - q_high), 1e-12)  # so small a reference says nothing: low is 0
    above = q_low * (2 * q - q_low)
    low = (p * q - np.sqrt((p * q) ** 2 - p_low * (2 * p - p_low) * below)) / below
    high = (p * q + np.sqrt((p * q) ** 2 - p_high * (2 * p - p_high) * above)) / above
    return np.maximum(low, 0), high


def widened(
    value: ArrayLike, interval: Interval, sd: ArrayLike, dof: int, confidence: float = CONFIDENCE
) -> Interval:
    """An interval with a second, independent source of noise added to it: seeds.

    Takes ``sd``, the standard deviation of ``value`` by that source, estimated with ``dof`` degrees of
    freedom; of the shape of the interval or one that broadcasts to it.

    >>> low, high = widened([0.5], wilson_interval([500], [1000]), 0.02, dof=4)
    >>> low.round(3), high.round(3)
    (array([0.45]), array([0.55]))
    """
    value, (low, high) = np.asarray(value, dtype=np.float64), interval
    extra = np.asarray(sd) * _student((1 + confidence) / 2, dof) if dof else np.zeros(())
    return (
        np.clip(value - np.hypot(value - low, extra), 0, 1),
        np.clip(value + np.hypot(high - value, extra), 0, 1),
    )


def seed_spread(repeated: Iterable[ArrayLike]) -> tuple[float, int]:
    """The standard deviation that another seed makes, from settings that were run with several.

    Pooled over the settings, as each has few seeds. All seeds were measured on the same pictures, so part of
    the pictures' noise is in it: the spread is, if anything, too large.

    Takes, for each setting, its numbers (one for each seed).

    Returns:
        The standard deviation and its degrees of freedom; (0, 0) where nothing was repeated.

    >>> seed_spread([[0.80, 0.82], [0.90], [0.70, 0.72, 0.74]])
    (0.018..., 3)
    """
    squares, dof = 0.0, 0
    for numbers in repeated:
        values = np.asarray(numbers, dtype=np.float64)
        squares += float(((values - values.mean()) ** 2).sum())
        dof += len(values) - 1
    return (math.sqrt(squares / dof), dof) if dof else (0.0, 0)


def accuracy_at(n_correct: ArrayLike, n_total: ArrayLike, deviate: ArrayLike) -> Array:
    """The accuracy that lies ``deviate`` standard deviations off the measured one.

    On the scale of arcsin(sqrt(p)), where the standard deviation is 1 / (2 sqrt(n)) for all p (Anscombe,
    Biometrika 1948, whose +3/8 keeps 100 of 100 from being certain). With normal deviates these are draws of
    a parametric bootstrap; deviates that are shared between points move them together.

    Takes counts and deviates of shapes that broadcast.

    >>> accuracy_at([50, 100], 100, [[-1.645], [0], [1.645]]).round(3)
    array([[0.418, 0.98 ],
           [0.5  , 0.996],
           [0.582, 1.   ]])
    """
    correct, total = _counts(n_correct, n_total)
    angle = np.arcsin(np.sqrt((correct + 0.375) / (total + 0.75)))
    moved: Array = np.asarray(angle + np.asarray(deviate) / (2 * np.sqrt(total + 0.5)))
    np.clip(moved, 0, np.pi / 2, out=moved)  # in place, as millions are drawn
    return np.square(np.sin(moved, out=moved), out=moved)


def curve_correlation(n_correct: ArrayLike, n_total: ArrayLike) -> float:
    """How much of the noise neighbours on a curve share, from how smooth curves are: 0 to 0.99.

    Interpolated weights are measured on the same pictures and err on mostly the same ones. Were they
    independent, the second differences of arcsin(sqrt(accuracy)) would have the variance 6 / (4 n); they have
    less. The true curve's own bend adds to it, so the correlation is, if anything, too small.

    Takes counts of (curves, points, sets), the points evenly spaced; NaN where nothing was measured.
    """
    correct, total = np.asarray(n_correct, dtype=np.float64), np.asarray(n_total, dtype=np.float64)
    angle = np.arcsin(np.sqrt((correct + 0.375) / (total + 0.75)))
    bend = np.diff(angle, n=2, axis=1) ** 2 / (6 / (4 * total[:, 1:-1] + 2))
    return 0.0 if np.isnan(bend).all() else float(np.clip(1 - np.nanmean(bend), 0, 0.99))


def front_probability(draws_RPM: ArrayLike) -> Array:
    """Each point's probability of being on the front, all objectives maximised: (P,).

    The share of draws in which no other point dominates it. An objective that has no noise is a constant
    over the draws.

    >>> rng = np.random.default_rng(0)
    >>> robustness = accuracy_at([900, 500, 480], 1000, rng.normal(size=(1000, 3)))
    >>> retention = accuracy_at([700, 950, 900], 1000, rng.normal(size=(1000, 3)))
    >>> front_probability(np.stack((robustness, retention), axis=-1)).round(1)
    array([1. , 1. , 0.2])
    """
    draws = np.asarray(draws_RPM, dtype=np.float64)
    probability: Array = np.mean([pareto_mask(points_PM) for points_PM in draws], axis=0)
    return probability


def cross_hypervolumes(
    choose_RPM: Array, measure_RPM: Array, again_RPM: Array, reference_point: ArrayLike
) -> Array:
    """The hypervolume of points that were chosen on one measurement and measured on another: (R,).

    A front as measured is the best of noisy points, so its hypervolume is too large. Choosing on one half
    of the information and measuring on the other takes that luck out, and more: half the information
    chooses worse. The few points that were chosen are noisy as well; what once more of their noise adds to
    them is taken off (the bootstrap's correction of a bias).

    Takes pairs of independent measurements of the same points: where ``y`` has noise of standard deviation
    s, ``y + e`` and ``y - e`` with e of the same s are such a pair (Leiner et al., Data fission, JASA 2023).
    ``again_RPM`` is the second of them with its noise, which is sqrt(2) s, added once more.
    """
    found = []
    for choose_PM, measure_PM, again_PM in zip(choose_RPM, measure_RPM, again_RPM, strict=True):
        chosen = pareto_mask(choose_PM)
        once, twice = (hypervolume(points[chosen], reference_point) for points in (measure_PM, again_PM))
        found.append(2 * once - twice)
    return np.array(found)


def hypervolume_interval(
    lowest: float, highest: float, draws: Iterable[Array], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of a hypervolume that lies between two estimates but for the noise of the counts.

    Args:
        lowest, highest: an estimate that is too small if anything, such as the mean of `cross_hypervolumes`,
            and one that is too large, such as the hypervolume as measured.
        draws: draws of it, (R,), under several models of the noise; the one with the widest spread counts.
    """
    half_width = deviate(confidence) * max(float(np.std(d)) for d in draws)
    return max(0.0, float(lowest) - half_width), float(highest) + half_width


def deviate(confidence: float) -> float:
    """The normal deviate of a central interval.

    Raises:
        ConfigError: ``confidence`` is not between 0 and 1.

    >>> round(deviate(0.9), 3)
    1.645
    """
    if not 0 < confidence < 1:
        raise ConfigError(
            f"confidence is {confidence}, but must be between 0 and 1, both excluded; {CONFIDENCE} is usual"
        )
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _student(probability: float, dof: int) -> float:
    """The quantile of Student's t."""
    from scipy.special import stdtrit  # a third of a second, for the few sweeps that repeat settings

    return float(stdtrit(dof, probability))


def _counts(n_correct: ArrayLike, n_total: ArrayLike) -> tuple[Array, Array]:
    correct, total = np.broadcast_arrays(
        np.asarray(n_correct, dtype=np.float64), np.asarray(n_total, dtype=np.float64)
    )
    # NaN, where nothing was measured, is neither and stays NaN.
    assert not ((correct < 0) | (correct > total)).any(), "counts out of 0 <= n_correct <= n_total"
    return correct, total
