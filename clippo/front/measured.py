"""What each point measured on a split: value and interval of every number."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from clippo.evaluate.objectives import RETENTION
from clippo.evaluate.rankings import resamples
from clippo.front.counts import CountTable
from clippo.front.front import Measured
from clippo.front.split import SPREAD_DRAWS, Ranked, SplitCounts
from clippo.front.uncertainty import CONFIDENCE, Array, wilson_interval


def numbers_of(
    counts: CountTable, name: str, split: SplitCounts, limits: tuple[Array, Array],
    points: NDArray[np.int64] | slice = slice(None),
) -> list[dict[str, Measured]]:  # fmt: skip
    """What was measured on a split, of some points (default: all): value and interval of each number.

    Args:
        split, limits: of these points.
    """
    numbers = {}
    for n, counted in counts.numbers(name).items():
        correct, total = (count[points] for count in counted)
        limits_of_n = wilson_interval(np.nan_to_num(correct), np.nan_to_num(total))
        numbers[n] = correct / total, *limits_of_n
    for eval_set, ranked in counts.rankings.items():
        part, _, which = eval_set.partition("/")
        for measure, values in of_rankings(ranked).items() if part == name == "test" else ():
            numbers[f"{measure}/{which}"] = values
    low, high = limits
    ends = split.goal.value(low[:, 0]), split.goal.value(high[:, 0])
    numbers[split.goal.name] = split.goals(), np.minimum(*ends), np.maximum(*ends)
    numbers[RETENTION] = split.objectives()[:, 1], low[:, 1], high[:, 1]
    measured = [list(zip(*(a.tolist() for a in n), strict=True)) for n in numbers.values()]
    return [
        {n: x for n, x in zip(numbers, of_point, strict=True) if not math.isnan(x[0])}
        for of_point in zip(*measured, strict=True)
    ]


def of_rankings(ranked: Ranked) -> dict[str, tuple[Array, Array, Array]]:
    """What else rankings say of each point, with 90 % intervals."""
    skew, table = ranked.skews(), ranked.table
    numbers = {"max_skew": (skew, *ranked.interval(skew, ranked.spread(), CONFIDENCE))}
    of_majority = ranked.only(table.majority_L >= 0)
    others = {
        "ndkl": (ranked, table.ndkls),
        "majority_share": (of_majority, of_majority.table.majority_shares),
    }
    taken = resamples(int(table.pictures_LM.max(initial=-1)) + 1, SPREAD_DRAWS)
    for name, (some, measure) in others.items():
        if len(some.table):
            value, spread = some.mean(measure()), some.mean(measure(taken)).std(axis=0)
            numbers[name] = value, *some.interval(value, spread, CONFIDENCE)
    return numbers
