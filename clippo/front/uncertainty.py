"""How sure a front is: intervals and probabilities from counts.

A number is a count, so its noise is known. One accuracy has a closed interval (`wilson_interval`). What is
computed from several (a retention, a place on the front, a hypervolume) has none, so the accuracies are
drawn again and again (`accuracy_draws`, `retention_draws`) and the statistic is computed from each draw.
Draws come from a generator that is handed in: with a fixed seed they repeat, and quantities drawn one after
the other from one generator are independent, which two generators of the same seed are not.

Shapes: R draws, P points, S evaluation sets, M objectives.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clippo.errors import ConfigError
from clippo.front.pareto import pareto_mask

Interval = tuple[NDArray[np.float64], NDArray[np.float64]]


def wilson_interval(n_correct: ArrayLike, n_total: ArrayLike, confidence: float = 0.9) -> Interval:
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
    _check_confidence(confidence)
    correct, total = _counts(n_correct, n_total)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (correct + z**2 / 2) / (total + z**2)
    variance = correct * (total - correct) / np.maximum(total, 1)
    half_width = z / (total + z**2) * np.sqrt(variance + z**2 / 4)
    return np.clip(centre - half_width, 0, 1), np.clip(centre + half_width, 0, 1)


def accuracy_draws(
    n_correct: ArrayLike, n_total: ArrayLike, *, draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Accuracies that the counts allow: (R, ...) draws for counts of any shape (...).

    From Beta(n_correct + 1/2, n_total - n_correct + 1/2), the Jeffreys posterior (Brown et al., 2001). A
    binomial of the observed share would call 100 of 100 certain; this does not.

    >>> float(accuracy_draws(100, 100, draws=1000, rng=np.random.default_rng(0)).mean().round(3))
    0.995
    """
    correct, total = _counts(n_correct, n_total)
    return rng.beta(correct + 0.5, total - correct + 0.5, size=(draws, *correct.shape))


def retention_draws(
    policy_correct: ArrayLike,
    policy_total: ArrayLike,
    reference_correct: ArrayLike,
    reference_total: ArrayLike,
    *,
    draws: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Retentions that the counts allow: the mean over sets of policy / reference accuracy, each capped at 1.

    The reference is one model, so with (S,) counts its draw is shared by all points. Policy and reference
    are drawn independently although they saw the same pictures, since counts do not hold the pairing: the
    spread is, if anything, too large. Near the cap the draws lie below the point estimate; the untouched
    model retains 1 by definition and needs none.

    Takes policy counts (..., S), for instance (P, S); reference counts that broadcast to them.

    Returns:
        (R, ...) draws.
    """
    policy = accuracy_draws(policy_correct, policy_total, draws=draws, rng=rng)
    reference = accuracy_draws(reference_correct, reference_total, draws=draws, rng=rng)
    reference = reference.reshape(draws, *(1,) * (policy.ndim - reference.ndim), *reference.shape[1:])
    retention: NDArray[np.float64] = np.minimum(policy / reference, 1.0).mean(axis=-1)
    return retention


def draws_interval(draws: ArrayLike, confidence: float = 0.9) -> Interval:
    """The central interval of (R, ...) draws of any statistic: (low, high), each (...).

    Raises:
        ConfigError: for a confidence out of its bounds.
    """
    _check_confidence(confidence)
    low, high = np.quantile(
        np.asarray(draws, dtype=np.float64), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0
    )
    return low, high


def retention_interval(
    policy_correct: ArrayLike,
    policy_total: ArrayLike,
    reference_correct: ArrayLike,
    reference_total: ArrayLike,
    confidence: float = 0.9,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of the retention of each point: `draws_interval` of `retention_draws`.

    >>> low, high = retention_interval([[880], [700]], [[1000], [1000]], [900], [1000])
    >>> low.round(2), high.round(2)
    (array([0.95, 0.75]), array([1.  , 0.81]))
    """
    rng = np.random.default_rng(seed)
    sampled = retention_draws(
        policy_correct, policy_total, reference_correct, reference_total, draws=draws, rng=rng
    )
    return draws_interval(sampled, confidence)


def front_probability(draws_RPM: ArrayLike) -> NDArray[np.float64]:
    """Each point's probability of being on the front, all objectives maximised: (P,).

    The share of draws in which no other point dominates it. An objective that has no noise is a constant
    over the draws.

    Takes ``draws_RPM``, the objectives of all points in each draw, for instance
    ``np.stack((accuracy_draws(...), retention_draws(...)), axis=-1)``.

    >>> rng = np.random.default_rng(0)
    >>> robustness = accuracy_draws([900, 500, 480], [1000] * 3, draws=1000, rng=rng)
    >>> retention = accuracy_draws([700, 950, 900], [1000] * 3, draws=1000, rng=rng)
    >>> front_probability(np.stack((robustness, retention), axis=-1)).round(1)
    array([1. , 1. , 0.2])
    """
    draws = np.asarray(draws_RPM, dtype=np.float64)
    probability: NDArray[np.float64] = np.mean([pareto_mask(points_PM) for points_PM in draws], axis=0)
    return probability


def _counts(n_correct: ArrayLike, n_total: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    correct, total = np.broadcast_arrays(
        np.asarray(n_correct, dtype=np.float64), np.asarray(n_total, dtype=np.float64)
    )
    assert ((correct >= 0) & (correct <= total)).all(), "counts out of 0 <= n_correct <= n_total"
    return correct, total


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(
            f"confidence is {confidence}, but must be between 0 and 1, both excluded; 0.9 is usual"
        )
