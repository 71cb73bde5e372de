"""How groups are read: accuracy by majority and minority, the lean of pictures without a group, intervals.

What counts as a concept's majority group is given with each picture; no group has a name here, and there may
be more than two.

Shapes: N pictures, G groups.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clippo.errors import ConfigError


def majority_counts(
    predicted: ArrayLike, groups: ArrayLike, majority: ArrayLike
) -> dict[str, tuple[int, int]]:
    """(correct, total) of the pictures that show their concept's majority group, and of all others.

    Takes ``predicted``, ``groups`` and ``majority``, each (N,): the group that was read, the one that is
    shown, and the majority group of the picture's concept.

    Raises:
        ConfigError: for arrays that do not fit.

    >>> majority_counts(predicted=["m", "m", "f"], groups=["m", "f", "f"], majority=["m", "m", "f"])
    {'majority': (2, 2), 'minority': (0, 1)}
    """
    said, shown, usual = (np.asarray(values) for values in (predicted, groups, majority))
    if not said.shape == shown.shape == usual.shape or said.ndim != 1:
        raise ConfigError(
            f"predictions of shape {said.shape} for groups of shape {shown.shape} and majorities of shape "
            f"{usual.shape}; expected one each"
        )
    right, is_majority = said == shown, shown == usual
    return {
        name: (int(right[chosen].sum()), int(chosen.sum()))
        for name, chosen in (("majority", is_majority), ("minority", ~is_majority))
    }


def lean(logits: ArrayLike, majority: ArrayLike) -> float:
    """How far pictures that show no group are read as their concept's majority: its mean probability.

    1/G leans nowhere, more leans towards the majority, less against it. The sign matters: a mean distance
    from 1/G would be as large for a model that guesses either group as for one that always guesses the same.

    Takes ``logits`` (N, G), the model's scaled similarities with one caption for each group, and ``majority``
    (N,), columns of them.

    Raises:
        ConfigError: for arrays that do not fit.

    >>> round(lean([[2.0, 0.0], [0.0, 2.0]], majority=[0, 1]), 3), lean([[1.0, 1.0]], majority=[1])
    (0.881, 0.5)
    """
    logits_NG, majority_N = np.asarray(logits, dtype=np.float64), np.asarray(majority)
    if logits_NG.ndim != 2 or logits_NG.shape[:1] != majority_N.shape or not len(majority_N):
        raise ConfigError(
            f"logits of shape {logits_NG.shape} for majorities of shape {majority_N.shape}; "
            "expected a row each"
        )
    shares_NG = np.exp(logits_NG - logits_NG.max(axis=1, keepdims=True))
    shares_NG /= shares_NG.sum(axis=1, keepdims=True)
    return float(shares_NG[np.arange(len(majority_N)), majority_N].mean())


def bootstrap_interval(
    measure: Callable[[NDArray[np.int64]], float],
    strata: ArrayLike,
    *,
    confidence: float = 0.9,
    draws: int = 400,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of a measure that another pool of pictures, drawn like this one, would give.

    Pictures are drawn with replacement within their stratum, so a balanced pool stays balanced. The interval
    is ``measure +- z * standard deviation of the draws``. Quantiles of the draws would be wrong for
    measures such as MaxSkew that noise can only increase: the draws have the noise twice, and near 0 a
    90 % interval of quantiles covers in 28 cases of 100 (docs/EXPERIMENTS.md).

    Takes ``measure``, a function of the indices (N,) of the pictures that count, some more than once;
    ``strata`` (N,), labels such as concept and group as one; ``confidence`` in (0, 1); ``draws`` >= 2.

    Raises:
        ConfigError: for a confidence or a number of draws out of its bounds.

    >>> right = np.array([1, 1, 1, 0] * 25)
    >>> low, high = bootstrap_interval(lambda index: float(right[index].mean()), np.zeros(100))
    >>> round(low, 2), round(high, 2)
    (0.68, 0.82)
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, but must be between 0 and 1, both excluded")
    if draws < 2:
        raise ConfigError(f"draws is {draws}, but must be at least 2; 400 are usual")
    _, stratum_N = np.unique(np.asarray(strata), return_inverse=True)
    sorted_N = np.argsort(stratum_N, kind="stable")
    sizes = np.bincount(stratum_N)
    # Each place of a stratum takes one of the stratum's pictures.
    start_N, size_N = np.repeat(np.cumsum(sizes) - sizes, sizes), np.repeat(sizes, sizes)
    rng = np.random.default_rng(seed)
    drawn = [measure(sorted_N[start_N + rng.integers(0, size_N)]) for _ in range(draws)]
    here = measure(np.arange(len(stratum_N)))
    half_width = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(drawn, ddof=1))
    return here - half_width, here + half_width
