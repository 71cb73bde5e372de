"""The front of a search whose objectives were others than the task's goal and retention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import pyarrow as pa

from clippo.evaluate import Counts
from clippo.evaluate.objectives import COST, share_of
from clippo.front.counts import AVERAGED, REFERENCE
from clippo.front.front import Front, Point
from clippo.front.pareto import pareto_mask


def searched_front(
    front: Front, evals: pa.Table, names: Sequence[str]
) -> list[tuple[Point, dict[str, float]]]:
    """The points that no other beats in the objectives of the search, with what they reached.

    Only the averaged weights are compared, as they were in the search, on validation pictures.

    Args:
        evals: the evaluations of the sweep, the columns of `EVAL_COLUMNS`.
        names: of the objectives of the search.
    """
    candidates = [p for p in front.points if p.variant == AVERAGED or p.trial_id == REFERENCE]
    counts = _counts(evals, {i for p in candidates for i in p.trial_ids})
    values = [[_value(front, p, o, counts) for o in names] for p in candidates]
    on_front = pareto_mask(values, [front.objectives.is_maximised(o) for o in names])
    found = zip(candidates, values, on_front, strict=True)
    return [(p, dict(zip(names, v, strict=True))) for p, v, on in found if on]


def _value(front: Front, point: Point, objective: str, counts: dict[str, list[Counts]]) -> float:
    if objective in front.objectives.names:
        return point.goal if objective == front.goal.name else point.retention
    if objective == COST:
        return point.device_s
    return fmean(share_of(objective, counts[i], split="validation") for i in point.trial_ids)


def _counts(evals: pa.Table, trial_ids: set[str]) -> dict[str, list[Counts]]:
    """What the averaged weights of each trial made of each set after its last epoch."""
    by_epoch: dict[str, dict[int, list[Counts]]] = defaultdict(lambda: defaultdict(list))
    for row in evals.to_pylist():
        if row["trial_id"] in trial_ids and row["variant"] in (AVERAGED, REFERENCE):
            measured = {n: row[n] for n in ("eval_set", "variant", "n_correct", "n_total", "n_fooled")}
            by_epoch[row["trial_id"]][row["epoch"]].append(Counts(**measured))
    return {trial_id: epochs[max(epochs)] for trial_id, epochs in by_epoch.items()}
