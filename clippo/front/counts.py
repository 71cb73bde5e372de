"""The counts of a sweep as arrays: which operating points there are and what was counted on each of them.

Rows become columns here, since a sweep of 5,000 trials has 60,000 points and a million evaluations.

Shapes: P points, S evaluation sets, C curves, A steps of a curve, M objectives.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clippo.errors import ConfigError, StoreError
from clippo.front.uncertainty import (
    Array,
    Interval,
    accuracy_at,
    curve_correlation,
    retention_interval,
    wilson_interval,
)

REFERENCE = "reference"
AVERAGED = "averaged"
CONFIRM = "confirm-"
"""Before the id of the trial whose settings were trained once more, after the search."""
EVAL_COLUMNS = (
    "trial_id", "attempt", "epoch", "eval_set", "variant", "n_correct", "n_total", "n_fooled",
)  # fmt: skip
SETTINGS = ("loss", "beta", "kl_weight", "learning_rate", "orthogonality", "epochs", "seed")
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
class SplitCounts:
    """What was counted on the sets that the objectives need, of one split; the first point is untouched.

    Attributes:
        correct_PS, total_PS: means over the seeds of a setting, so not always whole numbers.
        attacked: that many of the sets are attacked and make robustness; the others make retention.
    """

    correct_PS: Array
    total_PS: Array
    attacked: int

    def __getitem__(self, points: NDArray[Any]) -> SplitCounts:
        """Only some of the points, the untouched model always first among them."""
        return SplitCounts(
            correct_PS=self.correct_PS[points], total_PS=self.total_PS[points], attacked=self.attacked
        )

    def objectives(self, deviate: Array | None = None) -> Array:
        """Robustness and retention (..., P, M), as measured or at deviates (..., P, S).

        They are those of `clippo.evaluate.objectives`, for all points at once.
        """
        weights = self.total_PS[:, : self.attacked]
        if deviate is None:
            accuracy = self.correct_PS / self.total_PS
            right = self.correct_PS[:, : self.attacked]  # not accuracy * weights, or equal sums would differ
        else:
            accuracy = accuracy_at(self.correct_PS, self.total_PS, deviate)
            right = accuracy[..., : self.attacked] * weights
        robustness = right.sum(axis=-1) / weights.sum(axis=-1)
        kept = accuracy[..., self.attacked :]
        retention = np.minimum(kept / kept[..., :1, :], 1).mean(axis=-1)
        retention[..., 0] = 1  # it keeps all that it has, whatever that is
        return np.stack((robustness, retention), axis=-1)

    def intervals(self, confidence: float = 0.9) -> tuple[Interval, Interval]:
        """The intervals of robustness and of retention, from the counts."""
        attacked, kept = slice(self.attacked), slice(self.attacked, None)
        low, high = retention_interval(
            self.correct_PS[:, kept], self.total_PS[:, kept],
            self.correct_PS[:1, kept], self.total_PS[:1, kept], confidence,
        )  # fmt: skip
        low[0] = high[0] = 1
        correct, total = self.correct_PS[:, attacked], self.total_PS[:, attacked]
        return wilson_interval(correct.sum(axis=-1), total.sum(axis=-1), confidence), (low, high)


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
    robustness_sets: Sequence[str]
    retention_sets: Sequence[str]
    repeated: dict[str, list[Array]]
    correlation: float

    def split(self, name: str) -> SplitCounts:
        """What the objectives of one split are made of."""
        return _split(
            self.correct_PS, self.total_PS, self.sets, name, self.robustness_sets, self.retention_sets
        )

    def numbers(self, split: str) -> dict[str, tuple[Array, Array]]:
        """``(n_correct, n_total)`` of each kind of set; of attacked ones also what was fooled; else NaN.

        Seen and held-out classes together, where a kind belongs to the objectives only those sets that do,
        since curves are measured on no others. Published sets by name, for instance ``attacked/rta-100``.
        """
        by_kind: dict[str, list[int]] = defaultdict(list)
        wanted = {*self.robustness_sets, *self.retention_sets}
        kinds = {name.split("/")[0] for name in wanted}
        for i, name in enumerate(self.sets):
            part, _, rest = name.partition("/")
            kind, _, which = rest.partition("/")
            if part == split and (rest in wanted or kind not in kinds or which not in OWN_CLASSES):
                by_kind[kind if which in OWN_CLASSES else rest].append(i)
        numbers = {}
        for kind, columns in sorted(by_kind.items()):
            total = self.total_PS[:, columns].sum(axis=1)
            numbers[f"{kind}_accuracy"] = self.correct_PS[:, columns].sum(axis=1), total
            if kind.startswith("attacked"):
                which = kind.removeprefix("attacked")
                numbers[f"attack_success_rate{which}"] = self.fooled_PS[:, columns].sum(axis=1), total
        return numbers


def read_counts(
    sweep: str,
    trials: pa.Table,
    evals: pa.Table,
    *,
    robustness_sets: Sequence[str],
    retention_sets: Sequence[str],
) -> CountTable:
    """The counts of the last epoch of every completed trial; trials that differ in the seed alone are one.

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
    epoch, attempt = evals["epoch"].to_numpy(), evals["attempt"].to_numpy()
    # A trial may have ended since the trials were read.
    kept = (trial >= 0) & (attempt == np.array([attempts[i] for i in ids])[trial])
    last_epoch = np.full(len(ids), -1)
    np.maximum.at(last_epoch, trial[kept], epoch[kept])
    kept &= epoch == last_epoch[trial]
    counts = [evals[n].to_numpy()[kept].astype(np.float64) for n in ("n_correct", "n_total", "n_fooled")]
    trial, variant, which = trial[kept], variant[kept], which[kept]

    # One row for each trial and variant, then the mean over the trials of a setting.
    keys, row = np.unique(trial * len(variants) + variant, return_inverse=True)
    table = np.full((3, len(keys), len(sets)), np.nan)
    table[:, row, which] = counts
    trial_R, variant_R = keys // max(len(variants), 1), keys % max(len(variants), 1)
    setting_R = np.array([setting_of[i] for i in ids])[trial_R]
    if not (setting_R == 0).any():
        raise _nothing_measured(sweep)
    _check_reference(table[:, setting_R == 0][:, 0], sets, robustness_sets, retention_sets)
    needed = [sets.index(f"validation/{s}") for s in (*robustness_sets, *retention_sets)]
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
    split = _split(table[0], table[1], sets, "validation", robustness_sets, retention_sets)
    return CountTable(
        settings=settings,
        owner_P=points // len(variants),
        variant_P=[variants[v] for v in points % len(variants)],
        seeds_P=seeds_P,
        sets=sets,
        correct_PS=mean[0],
        total_PS=mean[1],
        fooled_PS=mean[2],
        robustness_sets=robustness_sets,
        retention_sets=retention_sets,
        repeated=_repeated(split, point, seeds_P, variant_R, variants),
        correlation=correlation,
    )


def _nothing_measured(sweep: str) -> StoreError:
    return StoreError(
        f"sweep {sweep!r} has no measurement of the untouched model yet; wait for it or rerun it"
    )


def _split(
    correct: Array,
    total: Array,
    sets: list[str],
    name: str,
    robustness: Sequence[str],
    retention: Sequence[str],
) -> SplitCounts:
    columns = [sets.index(f"{name}/{s}") for s in (*robustness, *retention)]
    return SplitCounts(correct_PS=correct[:, columns], total_PS=total[:, columns], attacked=len(robustness))


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
    return codes[whole.indices.to_numpy(zero_copy_only=False)] if len(codes) else codes, names


def _settings(trials: pa.Table) -> tuple[list[Setting], dict[str, int]]:
    """The settings that were run, and which one each completed trial ran."""
    names = [n for n in SETTINGS if n in trials.column_names]
    columns = trials.select(["trial_id", "status", "device_s", "params_json", *names]).to_pydict()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    # The reference first, then in the order in which a sweep numbers its trials.
    rows.sort(key=lambda r: (r["trial_id"] != REFERENCE, len(r["trial_id"]), r["trial_id"]))
    members: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "completed":
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


def _check_reference(
    counts: Array, sets: list[str], robustness_sets: Sequence[str], retention_sets: Sequence[str]
) -> None:
    for split in ("validation", "test"):
        for name in (*robustness_sets, *retention_sets):
            full = f"{split}/{name}"
            if full not in sets or np.isnan(counts[1, sets.index(full)]):
                measured = [s for s, n in zip(sets, counts[1], strict=True) if not np.isnan(n)]
                raise ConfigError(
                    f"there is no evaluation set {name!r} among the {split} sets; "
                    f"the sets are: {', '.join(sorted(measured))}"
                )
            if name in retention_sets and counts[0, sets.index(full)] == 0:
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
    averaged = {int(t) for t, v in zip(trial_R, variant_R, strict=True) if variants[v] == AVERAGED}
    has_averaged = np.isin(trial_R, list(averaged))
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
