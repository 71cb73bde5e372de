"""Operating points: what each trial offers, from the rows of a sweep.

A trial offers one point for each variant of its weights; the untouched model is a point of its own. Points
are compared and chosen on validation pictures, which the search saw; the test numbers beside them only report
what came of it.

Shapes: P points, the first of them the untouched model; M objectives, which are the gain of the goal and
retention; K settings that were run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clippo.errors import ConfigError
from clippo.evaluate.objectives import Goal, Objectives
from clippo.evaluate.words import Words
from clippo.front.choice import best_of, groups_of, knee_of
from clippo.front.counts import (
    AVERAGED,
    CONFIRM,
    EVAL_COLUMNS,
    RANKING_COLUMNS,
    REFERENCE,
    STOPPED,
    TRIAL_COLUMNS,
    CountTable,
    position,
    read_counts,
)
from clippo.front.evidence import Evidence, Mask, Noise, interval_of
from clippo.front.front import (
    METHODS,
    MIN_RETENTION,
    PREFERENCE,
    UNTOUCHED,
    Bounds,
    Comparison,
    Front,
    Measured,
    Point,
)
from clippo.front.measured import numbers_of
from clippo.front.methods import TUNING_LOSS, families_of, methods_of
from clippo.front.nearest import LARGE, nearest_trials
from clippo.front.pareto import pareto_mask
from clippo.front.searched import searched_front
from clippo.front.split import SplitCounts
from clippo.front.uncertainty import Array, seed_spread
from clippo.results import ResultStore, View
from clippo.results.arrow import is_in


def front_of(
    store: ResultStore, sweep: str, *, min_retention: float | None = None, trials: pa.Table | None = None
) -> Front:
    """The front of what is in the store, also while the sweep still runs.

    Of more than `LARGE` trials only the `nearest_trials` are looked at, and the others are counted, unless
    the goal follows from rankings or the search had other objectives.

    Args:
        min_retention: what the recommended point must keep; None: what the sweep was bound to, or 0.98.
        trials: the table of trials, of whoever has read it anyway.

    Raises:
        StoreError: no such sweep, or nothing measured yet.
        ConfigError: ``min_retention`` is out of its bounds.
    """
    config = store.known_config(sweep)
    search = config.get("search", {})  # those of earlier versions lack some of it
    bound = search.get("min_retention") or MIN_RETENTION
    trials = store.trials(sweep, View(columns=TRIAL_COLUMNS)) if trials is None else trials
    own, ranked = Objectives.of(config), None
    near, where = trials, {}
    names = search.get("objectives") or own.names
    if len(trials) > LARGE and set(names) == set(own.names) and not own.goal.is_ranked:
        near = nearest_trials(store, sweep, trials, own)
        where["trial_id"] = near["trial_id"].to_pylist()
    evals = store.evals(sweep, View(columns=EVAL_COLUMNS, where=where, dictionary=True))
    if own.goal.is_ranked:
        ranked = store.rankings(sweep, View(columns=RANKING_COLUMNS, dictionary=True))
    front = read_front(
        sweep, near, evals, own, rankings=ranked, words=Words.of(config),
        min_retention=bound if min_retention is None else min_retention,
    )  # fmt: skip
    totals = _totals(trials)
    front = replace(front, **totals, left_out=totals["completed"] - front.completed)
    if set(names) == set(own.names):
        return front
    return replace(front, searched=searched_front(front, evals, names))


def front_of_trial(store: ResultStore, sweep: str, trial_id: str) -> Front:
    """What one trial offers by itself, without the other seeds of its settings, beside the untouched model.

    Raises:
        StoreError: no such sweep, or the untouched model has not been measured.
    """
    config = store.known_config(sweep)
    where, own = {"trial_id": [REFERENCE, trial_id]}, Objectives.of(config)

    def alone(rows: pa.Table) -> pa.Table:
        """Without the mark of a confirming trial, which would have it stand beside what it confirms."""
        ids = pc.replace_substring_regex(rows["trial_id"].cast(pa.string()), f"^{CONFIRM}", "")
        return rows.set_column(rows.column_names.index("trial_id"), "trial_id", ids)

    trials = alone(store.trials(sweep, View(where=where)))
    evals = alone(store.evals(sweep, View(columns=EVAL_COLUMNS, where=where)))
    ranked = None
    if own.goal.is_ranked:
        ranked = alone(store.rankings(sweep, View(columns=RANKING_COLUMNS, where=where)))
    return read_front(sweep, trials, evals, own, rankings=ranked, words=Words.of(config))


def read_front(
    sweep: str,
    trials: pa.Table,
    evals: pa.Table,
    objectives: Objectives,
    *,
    rankings: pa.Table | None = None,
    words: Words | None = None,
    min_retention: float = MIN_RETENTION,
) -> Front:
    """The front of one sweep, from its rows; also while the sweep still runs.

    Args:
        rankings: the columns of `RANKING_COLUMNS`, where the goal follows from them.
        words: how the numbers are called; None: plainly.

    Raises:
        StoreError: the untouched model has not been measured yet.
        ConfigError: ``min_retention`` is out of its bounds, or the rows lack a set of the objectives.
    """
    if not 0 < min_retention <= 1:
        raise ConfigError(
            f"min_retention is {min_retention}; it must be above 0 and at most 1, which is all that the "
            "untouched model can do"
        )
    searched, confirming = _searched_and_confirming(trials)
    counts = read_counts(sweep, searched, evals, objectives, rankings)
    few = evals.filter(is_in(evals["trial_id"], confirming["trial_id"].to_pylist()))
    fresh = read_counts(sweep, confirming, few, objectives, rankings)
    validation, test = counts.split("validation"), counts.split("test")
    noise, repeated, seed_sd = _noise(counts)
    methods = _methods(counts)
    families = families_of(methods, np.array(counts.variant_P) == AVERAGED)
    families = {name: family for name, family in families.items() if family.sum() > 1 or name == UNTOUCHED}
    everything, others = np.ones(len(methods), dtype=np.bool_), methods != METHODS.index(PREFERENCE)
    evidence = Evidence.of(validation, noise, [everything, others, *families.values()])

    on_front = pareto_mask(evidence.measured_PM)
    chance = evidence.chance(min_retention)
    feasible = evidence.measured_PM[:, 1] >= min_retention
    again = _confirmed(fresh)
    points = _points(counts, evidence, noise, test, methods, on_front, feasible, chance, again)
    volumes = {mask.tobytes(): evidence.volumes(mask) for mask in (everything, others)}
    total = volumes[everything.tobytes()]
    gain, gain_interval = total.above(volumes[others.tobytes()])
    chosen = best_of(evidence.measured_PM, on_front, chance)
    turn = knee_of(evidence.measured_PM, on_front)
    comparisons = []
    for name, family in families.items():
        own_front = np.zeros_like(family)
        own_front[family] = pareto_mask(evidence.measured_PM[family])
        best = best_of(evidence.measured_PM, own_front, chance)
        # Without baselines all tuned points are of one method.
        own_volumes = volumes.get(family.tobytes()) or evidence.volumes(family)
        comparisons.append(
            Comparison(
                method=name,
                best=points[best],
                front=_by_retention((points[i] for i in np.flatnonzero(own_front)), objectives.goal),
                hypervolume=own_volumes.measured,
                hypervolume_interval=own_volumes.interval,
            )
        )
    return Front(
        sweep=sweep,
        objectives=objectives,
        words=words or Words.of({"objectives": objectives.to_json()}),
        points=_by_retention(points, objectives.goal),
        hypervolume=total.measured,
        hypervolume_interval=total.interval,
        **_totals(trials),
        min_retention=min_retention,
        recommended=points[chosen],
        alike=_by_retention((points[i] for i in evidence.alike(chosen)), objectives.goal),
        knee=None if turn is None else points[turn],
        comparisons=comparisons,
        gain=gain,
        gain_interval=gain_interval,
        repeated=repeated,
        seed_sd=seed_sd,
        curve=_curve(
            counts, noise, chosen or int(np.where(on_front, evidence.measured_PM[:, 0], -1).argmax())
        ),
    )


def _totals(trials: pa.Table) -> dict[str, Any]:
    """How many trials of the search ended in which way, and what all trials took."""
    trials = trials.select(["trial_id", "status", "device_s"])
    searched, _ = _searched_and_confirming(trials.filter(pc.invert(is_in(trials["trial_id"], [REFERENCE]))))
    endings = {"completed": "completed", "failed": "failed", "stopped": STOPPED}
    return {
        **{
            name: pc.sum(is_in(searched["status"], [status])).as_py() or 0 for name, status in endings.items()
        },
        "device_s": pc.sum(trials["device_s"]).as_py() or 0.0,
    }


def _noise(counts: CountTable) -> tuple[Noise, int, Bounds]:
    """How numbers may be off, how many settings were repeated, and how far their seeds lie apart."""
    spreads = {v: [seed_spread(r[:, m] for r in same) for m in (0, 1)] for v, same in counts.repeated.items()}
    every = [same for of_variant in counts.repeated.values() for same in of_variant]
    pooled = [seed_spread(r[:, m] for r in every)[0] for m in (0, 1)]
    sd_PM = np.array([[sd for sd, _ in spreads[v]] if v in spreads else pooled for v in counts.variant_P])
    sd_PM[counts.owner_P == 0] = 0  # it was not trained
    # The last weights and the untouched model lie on no curve.
    lonely = np.array([position(v) is None for v in counts.variant_P])
    curve_P = np.where(lonely, -1 - np.arange(len(lonely)), counts.owner_P)
    noise = Noise(
        curve_P=curve_P,
        correlation=counts.correlation,
        owner_P=counts.owner_P,
        sd_PM=sd_PM / np.sqrt(counts.seeds_P)[:, None],
        dof=max((dof for spread in spreads.values() for _, dof in spread), default=0),
    )
    own = counts.repeated.get(AVERAGED, [])
    shown = seed_spread(counts.objectives.goal.value(r[:, 0]) for r in own), seed_spread(r[:, 1] for r in own)
    repeated = max(map(len, counts.repeated.values()), default=0)
    return noise, repeated, (shown[0][0], shown[1][0])


def _methods(counts: CountTable) -> NDArray[np.int64]:
    """Which of `METHODS` made each point."""
    tuned_K = np.array([s.settings.get("loss") == TUNING_LOSS for s in counts.settings], dtype=np.bool_)
    return methods_of(tuned_K[counts.owner_P], np.array(["=" in v for v in counts.variant_P]))


def _points(
    counts: CountTable,
    evidence: Evidence,
    noise: Noise,
    test: SplitCounts,
    methods: NDArray[np.int64],
    on_front: Mask,
    feasible: Mask,
    chance: Array,
    confirmed: Mapping[tuple[str, str], Mapping[str, Measured]],
) -> list[Point]:
    """All points, in the order of the counts."""
    goal, goals = counts.objectives.goal, counts.split("validation").goals().tolist()
    tested = numbers_of(counts, "test", test, interval_of(test, noise))
    owners = [counts.settings[owner] for owner in counts.owner_P]
    again = [confirmed.get((o.trial_id, v), {}) for o, v in zip(owners, counts.variant_P, strict=True)]
    values, lows, highs = (a.tolist() for a in (evidence.measured_PM, evidence.low_PM, evidence.high_PM))
    probability, groups = evidence.probability().tolist(), groups_of(evidence, on_front).tolist()
    return [
        Point(
            trial_id=owners[i].trial_id,
            trial_ids=owners[i].trial_ids,
            variant=counts.variant_P[i],
            method=METHODS[methods[i]],
            settings=owners[i].settings,
            device_s=owners[i].device_s,
            goal=goals[i],
            goal_interval=_in_unit(goal, lows[i][0], highs[i][0]),
            retention=values[i][1],
            retention_interval=(lows[i][1], highs[i][1]),
            on_front=bool(on_front[i]),
            feasible=bool(feasible[i]),
            probability=probability[i],
            chance=None if np.isnan(chance[i]) else float(chance[i]),
            group=groups[i],
            test={n: x for n, (x, _, _) in tested[i].items()},
            test_intervals={n: (a, b) for n, (_, a, b) in tested[i].items()},
            confirmed={n: x for n, (x, _, _) in again[i].items()},
            confirmed_intervals={n: (a, b) for n, (_, a, b) in again[i].items()},
        )
        for i in range(len(owners))
    ]


def _curve(counts: CountTable, noise: Noise, chosen: int) -> list[tuple[str, dict[str, Measured]]]:
    """What the points on the curve of one setting reach on validation pictures, in its order."""
    own = np.flatnonzero(counts.owner_P == counts.owner_P[chosen])
    points = np.array([0, *(i for i in own if i and position(counts.variant_P[i]) is not None)])
    split = counts.split("validation")[points]
    limits = interval_of(split, replace(noise, sd_PM=noise.sd_PM[points]))
    found = zip(points, numbers_of(counts, "validation", split, limits, points), strict=True)
    curve = [(counts.variant_P[i], numbers) for i, numbers in found]
    return sorted(curve, key=lambda step: position(step[0]) or 0.0)


def _in_unit(goal: Goal, low: float, high: float) -> Bounds:
    """The limits of a gain as limits of the goal."""
    ends = float(goal.value(low)), float(goal.value(high))
    return min(ends), max(ends)


def _searched_and_confirming(trials: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The trials of the search, and those that confirm; both with the untouched model."""
    confirming = pc.starts_with(trials["trial_id"], CONFIRM)
    untouched = is_in(trials["trial_id"], [REFERENCE])
    return trials.filter(pc.invert(confirming)), trials.filter(pc.or_(confirming, untouched))


def _confirmed(counts: CountTable) -> dict[tuple[str, str], dict[str, Measured]]:
    """What the confirming trials measured on test pictures, by the trial they confirm and the variant."""
    test = counts.split("test")
    low, high = (np.stack(limits, axis=1) for limits in zip(*test.intervals(), strict=True))
    ids = [counts.settings[o].trial_id for o in counts.owner_P]
    found = zip(ids, counts.variant_P, numbers_of(counts, "test", test, (low, high)), strict=True)
    return {(i.removeprefix(CONFIRM), v): numbers for i, v, numbers in found if i != REFERENCE}


def _by_retention(points: Iterable[Point], goal: Goal) -> list[Point]:
    return sorted(points, key=lambda p: (p.trial_id != REFERENCE, -p.retention, -goal.gain(p.goal)))
