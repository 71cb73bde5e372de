"""The counts of a sweep as arrays: which operating points there are and what was counted on each of them.

Rows become columns here, since a sweep of 5,000 trials has 60,000 points and a million evaluations.

Shapes: P points, S evaluation sets, C curves, A steps of a curve, M objectives, L rankings, R rows (a trial's
variant of its weights).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clippo.errors import ConfigError, StoreError
from clippo.evaluate.objectives import Objectives
from clippo.evaluate.rankings import RankingTable
from clippo.front.split import Ranked, SplitCounts, split_of
from clippo.front.uncertainty import Array, curve_correlation
from clippo.results.arrow import numbers

REFERENCE = "reference"
AVERAGED = "averaged"
STOPPED, STOPPED_AFTER = "stopped_early", "stopped_after"
"""Status of a trial that was stopped, and the setting that says after which epoch."""
CONFIRM = "confirm-"
"""Before the id of the trial whose settings were trained once more, after the search."""
EVAL_COLUMNS = (
    "trial_id", "attempt", "epoch", "eval_set", "variant", "n_correct", "n_total", "n_fooled",
)  # fmt: skip
RANKING_COLUMNS = (
    "trial_id", "attempt", "epoch", "eval_set", "variant", "k", "pictures", "groups", "group_names",
    "majority",
)  # fmt: skip
SETTINGS = ("loss", "beta", "kl_weight", "learning_rate", "orthogonality", "epochs", "seed")
"""The settings that have a column of their own; others are in params_json."""
TRIAL_COLUMNS = (
    "sweep", "trial_id", "attempt", "status", "checkpoint_uri", "device_s", "params_json", *SETTINGS,
)  # fmt: skip
OWN_CLASSES = ("seen", "held_out")
"""Evaluation sets of the sweep's own pictures; other names are those of published sets."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What was run, once or with several seeds.

    Attributes:
        trial_id: of the first trial that ran it; its checkpoint is the one that is exported.
        trial_ids: of all its trials, one for each seed.
        device_s: what one of them took on average.
    """

    trial_id: str
    trial_ids: list[str]
    settings: dict[str, Any]
    device_s: float


@dataclass(frozen=True, kw_only=True)
class CountTable:
    """The operating points of a sweep; the first is the untouched model.

    Attributes:
        settings: what was run; the first entry is the untouched model.
        owner_P: the setting of each point.
        variant_P: its weights: ``averaged``, ``last``, ``alpha=0.3``, ``t=1.5``.
        seeds_P: seeds that its counts are the mean of.
        sets: names of all evaluation sets, for instance ``test/clean/seen``.
        correct_PS, total_PS, fooled_PS: NaN where a point was not measured on a set.
        rankings: by set, where pictures were ranked.
        repeated: for each variant, the (seeds, M) objectives of every setting that has several seeds, on
            validation pictures.
        correlation: how much of their noise neighbours on a curve share.
    """

    settings: list[Setting]
    owner_P: NDArray[np.int64]
    variant_P: list[str]
    seeds_P: NDArray[np.int64]
    sets: list[str]
    correct_PS: Array
    total_PS: Array
    fooled_PS: Array
    rankings: dict[str, Ranked]
    objectives: Objectives
    repeated: dict[str, list[Array]]
    correlation: float

    def split(self, name: str) -> SplitCounts:
        """What the objectives of one split are made of."""
        counts = (self.correct_PS, self.total_PS, self.fooled_PS)
        return split_of(counts, self.sets, name, self.objectives, self.rankings)

    def numbers(self, split: str) -> dict[str, tuple[Array, Array]]:
        """``(n_correct, n_total)`` of each kind of set; of attacked ones also what was fooled; else NaN.

        Seen and held-out classes together, where a kind belongs to the objectives only those sets that do,
        since curves are measured on no others. Published sets, and those that are only reported, by name, for
        instance ``robust_accuracy/rta-100``.
        """
        by_kind: dict[str, list[int]] = defaultdict(list)
        wanted, reported = set(self.objectives.sets), set(self.objectives.reported)
        kinds = {name.split("/")[0] for name in wanted}
        for i, name in enumerate(self.sets):
            part, _, rest = name.partition("/")
            kind, _, which = rest.partition("/")
            if part == split and (rest in wanted | reported or kind not in kinds or which not in OWN_CLASSES):
                by_kind[kind if which in OWN_CLASSES and rest not in reported else rest].append(i)
        numbers = {}
        for kind, columns in sorted(by_kind.items()):
            total = self.total_PS[:, columns].sum(axis=1)
            name = f"{kind}_accuracy"
            if kind.split("/")[0] == "attacked":
                which = kind.removeprefix("attacked")
                name = f"robust_accuracy{which}"
                numbers[f"attack_success_rate{which}"] = self.fooled_PS[:, columns].sum(axis=1), total
            numbers[name] = self.correct_PS[:, columns].sum(axis=1), total
        return numbers


def read_counts(
    sweep: str,
    trials: pa.Table,
    evals: pa.Table,
    objectives: Objectives,
    rankings: pa.Table | None = None,
) -> CountTable:
    """The counts of the last epoch of each trial that left weights; those of one setting are one, their mean.

    Points that lack a set of the objectives are left out, and so are ``alpha=0`` (the untouched model) and
    ``alpha=1`` (the averaged weights).

    Raises:
        StoreError: the untouched model has not been measured yet.
        ConfigError: it lacks a set of the objectives, or has nothing right in a retention set.
    """
    settings, setting_of = _settings(trials)
    rows = zip(*(trials[n].to_pylist() for n in ("trial_id", "attempt")), strict=True)
    attempts = {trial_id: attempt for trial_id, attempt in rows if trial_id in setting_of}
    ids = sorted(attempts, key=lambda trial_id: (setting_of[trial_id], trial_id))  # the untouched model first
    if not ids or ids[0] != REFERENCE:
        raise _nothing_measured(sweep)

    trial, _ = coded(evals["trial_id"], ids)
    variant, variants = coded(evals["variant"])
    which, sets = coded(evals["eval_set"])
    epoch, attempt = numbers(evals["epoch"]), numbers(evals["attempt"])
    # A trial may have ended since the trials were read.
    kept = (trial >= 0) & (attempt == np.array([attempts[i] for i in ids])[trial])
    last_epoch = np.full(len(ids), -1)
    np.maximum.at(last_epoch, trial[kept], epoch[kept])
    kept &= epoch == last_epoch[trial]
    counts = [numbers(evals[n])[kept].astype(np.float64) for n in ("n_correct", "n_total", "n_fooled")]
    trial, variant, which = trial[kept], variant[kept], which[kept]

    # One row for each trial and variant, then the mean over the trials of a setting.
    keys, row = np.unique(trial * len(variants) + variant, return_inverse=True)
    table = np.full((3, len(keys), len(sets)), np.nan)
    table[:, row, which] = counts
    trial_R, variant_R = keys // max(len(variants), 1), keys % max(len(variants), 1)
    setting_R = np.array([setting_of[i] for i in ids])[trial_R]
    if not (setting_R == 0).any():
        raise _nothing_measured(sweep)
    _check_reference(table[:, setting_R == 0][:, 0], sets, objectives)
    needed = [sets.index(f"validation/{s}") for s in objectives.sets]
    complete_R = ~np.isnan(table[1][:, needed]).any(axis=1)
    correlation = _correlation(table, setting_R, variant_R, trial_R, variants, needed)
    keep = np.flatnonzero(complete_R & ~_repeats(trial_R, variant_R, setting_R, variants))
    table, trial_R, variant_R, setting_R = table[:, keep], trial_R[keep], variant_R[keep], setting_R[keep]

    points, point = np.unique(setting_R * len(variants) + variant_R, return_inverse=True)
    seeds_P = np.bincount(point, minlength=len(points))
    mean = np.zeros((3, len(points), len(sets)))
    for sums, counted in zip(mean, table, strict=True):
        np.add.at(sums, point, counted)
    mean /= seeds_P[:, None]
    found = {}
    if rankings is not None and len(rankings):
        own, _ = coded(rankings["trial_id"], ids)
        used, _ = coded(rankings["variant"], variants)
        last = (own >= 0) & (used >= 0) & (rankings["epoch"].to_numpy() == last_epoch[own])
        last &= rankings["attempt"].to_numpy() == np.array([attempts[i] for i in ids])[own]
        row = _row_of(keys[keep], own * len(variants) + used)
        last &= row >= 0
        found = _ranked(rankings.filter(pa.array(last)), row[last], len(keep))
    ranked_points = {n: replace(r, point_L=point[r.point_L], points=len(points)) for n, r in found.items()}
    split = split_of(tuple(table), sets, "validation", objectives, found)
    return CountTable(
        settings=settings,
        owner_P=points // len(variants),
        variant_P=[variants[v] for v in points % len(variants)],
        seeds_P=seeds_P,
        sets=sets,
        correct_PS=mean[0],
        total_PS=mean[1],
        fooled_PS=mean[2],
        rankings=ranked_points,
        objectives=objectives,
        repeated=_repeated(split, point, seeds_P, variant_R, variants),
        correlation=correlation,
    )


def _nothing_measured(sweep: str) -> StoreError:
    return StoreError(
        f"sweep {sweep!r} has no measurement of the untouched model yet; wait for it or rerun it"
    )


def _ranked(rankings: pa.Table, row_L: NDArray[np.int64], rows: int) -> dict[str, Ranked]:
    """The rankings of each set, of so many rows that they belong to."""
    which, names = coded(rankings["eval_set"])
    found = {}
    for s, name in enumerate(names):
        own = np.flatnonzero(which == s)
        some = rankings.take(pa.array(own))
        table = RankingTable(
            _padded(some["pictures"], 0).astype(np.int32),
            _padded(some["groups"], -1).astype(np.int8),
            some["k"].to_numpy(),
            pc.list_value_length(some["group_names"]).to_numpy(),
            pc.fill_null(some["majority"], -1).to_numpy().astype(np.int64),
        )
        found[name] = Ranked(table=table, point_L=row_L[own], points=rows)
    return found


def _padded(lists: pa.ChunkedArray, filling: int) -> NDArray[Any]:
    """Lists of numbers as rows of equal length."""
    sizes = pc.list_value_length(lists).to_numpy()
    padded = np.full((len(lists), int(sizes.max(initial=0))), filling)
    padded[np.arange(padded.shape[1]) < sizes[:, None]] = pc.list_flatten(lists).to_numpy()
    return padded


def _row_of(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each wanted key is among the sorted keys; -1: nowhere."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def coded(column: pa.ChunkedArray, names: Sequence[str] | None = None) -> tuple[NDArray[np.int32], list[str]]:
    """A text column as numbers: which of ``names`` each entry is (-1: none), or of its own sorted texts."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no chunks
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    texts = whole.dictionary.to_pylist()
    names = sorted(texts) if names is None else list(names)
    number = {name: i for i, name in enumerate(names)}
    codes = np.array([number.get(text, -1) for text in texts], dtype=np.int32)
    return codes[numbers(whole.indices)] if len(codes) else codes, names


def _settings(trials: pa.Table) -> tuple[list[Setting], dict[str, int]]:
    """The settings that were run, and which one each trial ran that left weights."""
    names = [n for n in SETTINGS if n in trials.column_names]
    wanted = ["trial_id", "status", "checkpoint_uri", "device_s", "params_json", *names]
    columns = trials.select(wanted).to_pydict()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    # The reference first, then in the order in which a sweep numbers its trials.
    rows.sort(key=lambda r: (r["trial_id"] != REFERENCE, len(r["trial_id"]), r["trial_id"]))
    members: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        # Earlier versions kept no weights of trials that were stopped.
        if row["status"] == "completed" or (row["status"] == STOPPED and row["checkpoint_uri"]):
            row["settings"] = {n: row[n] for n in names if row[n] is not None} | json.loads(
                row["params_json"] or "{}"
            )
            what = {n: v for n, v in row["settings"].items() if n != "seed"}
            key = REFERENCE if row["trial_id"] == REFERENCE else json.dumps(what, sort_keys=True)
            members[key].append(row)
    settings: list[Setting] = []
    setting_of: dict[str, int] = {}
    for same in members.values():
        setting_of.update({row["trial_id"]: len(settings) for row in same})
        settings.append(
            Setting(
                trial_id=same[0]["trial_id"],
                trial_ids=[row["trial_id"] for row in same],
                settings=same[0]["settings"],
                device_s=sum(row["device_s"] or 0.0 for row in same) / len(same),
            )
        )
    return settings, setting_of


def _check_reference(counts: Array, sets: list[str], objectives: Objectives) -> None:
    for split in ("validation", "test"):
        for name in objectives.sets:
            full = f"{split}/{name}"
            if full not in sets or np.isnan(counts[1, sets.index(full)]):
                measured = [s for s, n in zip(sets, counts[1], strict=True) if not np.isnan(n)]
                raise ConfigError(
                    f"there is no evaluation set {name!r} among the {split} sets; "
                    f"the sets are: {', '.join(sorted(measured))}"
                )
            if name in objectives.retention_sets and counts[0, sets.index(full)] == 0:
                raise ConfigError(
                    f"the untouched model has nothing right in {full!r}; leave it out of retention_sets"
                )


def position(variant: str) -> float | None:
    """Where on its trial's curve a variant lies: alpha or t; None off the curve.

    >>> position("alpha=0.5"), position("averaged"), position("last")
    (0.5, 1.0, None)
    """
    if variant == AVERAGED:
        return 1.0
    kind, _, value = variant.partition("=")
    return float(value) if kind in ("alpha", "t") and value else None


def _repeats(
    trial_R: NDArray[Any], variant_R: NDArray[Any], setting_R: NDArray[Any], variants: list[str]
) -> NDArray[np.bool_]:
    """Which rows say again what the untouched model's or the averaged weights' say."""
    places = [None if v == AVERAGED else position(v) for v in variants]
    start = np.array([p == 0 for p in places])
    end = np.array([p == 1 for p in places])
    is_averaged = np.array([v == AVERAGED for v in variants])
    has_averaged = np.isin(trial_R, trial_R[is_averaged[variant_R]])
    return (setting_R > 0) & (start[variant_R] | (end[variant_R] & has_averaged))


def _correlation(
    table: Array,
    setting_R: NDArray[Any],
    variant_R: NDArray[Any],
    trial_R: NDArray[Any],
    variants: list[str],
    needed: list[int],
) -> float:
    """`curve_correlation` of all curves on validation pictures, their steps evenly spaced."""
    places = {v: p for v, p in ((v, position(v)) for v in variants if v != AVERAGED) if p is not None}
    steps = sorted(set(places.values()))
    # Three steps say how smooth a curve is, if they are evenly spaced.
    middles = [
        i for i in range(1, len(steps) - 1) if np.isclose(steps[i] - steps[i - 1], steps[i + 1] - steps[i])
    ]
    step_of = np.array([steps.index(places[v]) if v in places else -1 for v in variants])
    on_curve = (step_of[variant_R] >= 0) & (setting_R > 0)
    if not middles or not on_curve.any():
        return 0.0
    trials, curve = np.unique(trial_R[on_curve], return_inverse=True)
    counts_CAS = np.full((2, len(trials), len(steps), len(needed)), np.nan)
    counts_CAS[:, curve, step_of[variant_R[on_curve]]] = table[:2][:, on_curve][:, :, needed]
    return curve_correlation(*np.concatenate([counts_CAS[:, :, i - 1 : i + 2] for i in middles], axis=1))


def _repeated(
    split: SplitCounts,
    point: NDArray[Any],
    seeds_P: NDArray[Any],
    variant_R: NDArray[Any],
    variants: list[str],
) -> dict[str, list[Array]]:
    """By variant, the objectives of the trials of each setting that was run with several seeds."""
    repeated: dict[str, list[Array]] = defaultdict(list)
    if (seeds_P > 1).any():
        objectives = split.objectives()
        for p in np.flatnonzero(seeds_P > 1):
            same = np.flatnonzero(point == p)
            repeated[variants[variant_R[same[0]]]].append(objectives[same])
    return dict(repeated)
