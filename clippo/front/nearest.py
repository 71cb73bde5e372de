"""Of a very large sweep, the trials that may matter to its front: reading all points would take minutes.

Shapes: T trials, K settings, V variants of the weights, P points, S evaluation sets, M objectives, C what was
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clippo.evaluate.objectives import Objectives
from clippo.front.counts import AVERAGED, CONFIRM, REFERENCE, SETTINGS, STOPPED, position
from clippo.front.evidence import MOST_DRAWN, distances
from clippo.front.methods import TUNING_LOSS, families_of, methods_of
from clippo.front.split import split_of
from clippo.front.uncertainty import Array
from clippo.results import ResultStore, View
from clippo.results.arrow import booleans, flags, is_in, numbers, texts

LARGE = 5_000
"""Trials of a sweep that a front takes whole."""
NEAREST = MOST_DRAWN
"""Settings of a larger sweep that it takes of each method: as many as there are points drawn of one."""
OTHER = 0.1  # what the objective in which a point is farther off counts beside the closer one
COLUMNS = ("trial_id", "variant", "eval_set", "epoch")


def nearest_trials(store: ResultStore, sweep: str, trials: pa.Table, objectives: Objectives) -> pa.Table:
    """The rows of those trials whose settings have a point on or closest to the front of their method.

    Settings are as close as the closest of their points, the means over their seeds on validation pictures.
    The untouched model and confirming trials stay.
    """
    ids = trials["trial_id"].to_pylist()
    if REFERENCE not in ids:
        return trials
    settings = _settings(trials).dictionary_encode()
    setting_T = numbers(settings.indices)
    tuned_K = np.zeros(len(settings.dictionary), dtype=np.bool_)
    tuned_K[setting_T[flags(is_in(trials["loss"], [TUNING_LOSS]))]] = True
    offered_T = np.where(_offers(trials), setting_T, -1)
    counted = ["n_correct", "n_total"] + ["n_fooled"] * (objectives.goal.measure == "fooled")
    sets = _sets(objectives)
    wanted = View(columns=(*COLUMNS, *counted), where={"eval_set": sets}, dictionary=True)
    counts = store.through_evals(sweep, wanted, partial(_counted, ids=ids, sets=sets, columns=counted))
    points = _measured(counts, offered_T, len(tuned_K), ids.index(REFERENCE), objectives)
    near_K = (
        np.ones(len(tuned_K), dtype=np.bool_) if points is None else _nearest(*points, list(counts), tuned_K)
    )
    return trials.filter(pc.or_(booleans(near_K[setting_T]), _never_left_out(trials)))


def _counted(
    portions: Iterable[pa.Table], ids: Sequence[str], sets: Sequence[str], columns: Sequence[str]
) -> dict[str, NDArray[np.int32]]:
    """What was counted after the last epoch of each trial, by variant: (C, S, T), 0 where nothing was."""
    trial_of, set_of = _Coder(ids), _Coder(sets)
    counts: dict[str, NDArray[np.int32]] = {}
    for portion in portions:
        batches = portion.to_batches()  # each small enough for the caches
        trials = [trial_of(batch["trial_id"]) for batch in batches]
        last_epoch = np.zeros(len(ids) + 1, dtype=np.int64)  # the last one is of trials that ended since
        for batch, trial in zip(batches, trials, strict=True):
            epoch = numbers(batch["epoch"])
            while (later := epoch > last_epoch[trial]).any():  # a trial may be in it several times
                last_epoch[trial[later]] = epoch[later]
        for batch, trial in zip(batches, trials, strict=True):
            variant = batch["variant"]
            is_last = numbers(batch["epoch"]) == last_epoch[trial]
            cell = set_of(batch["eval_set"]) * len(last_epoch) + trial
            values = [numbers(batch[name]) for name in columns]
            for code, name in enumerate(variant.dictionary.to_pylist()):
                rows = np.flatnonzero(is_last & (numbers(variant.indices) == code))
                if name not in counts:
                    counts[name] = np.zeros((len(columns), len(sets) * len(last_epoch)), dtype=np.int32)
                for of_column, value in zip(counts[name], values, strict=True):
                    of_column[cell[rows]] = value[rows]
    shape = len(columns), len(sets), len(ids) + 1
    return {name: counts[name].reshape(shape)[..., : len(ids)] for name in sorted(counts)}


def _measured(
    counts: Mapping[str, NDArray[np.int32]], setting_T: NDArray[np.int32], settings: int, reference: int,
    objectives: Objectives,
) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]] | None:  # fmt: skip
    """The objectives of all points (P, M), the untouched model first, their settings and variants (P,).

    None where the untouched model lacks something: whoever reads the counts will say what.

    Args:
        setting_T: of each trial; -1 of those that offer no point.
        settings: how many there are.
        reference: the trial that is the untouched model.
    """
    # At the start of a curve it is the untouched model again.
    offered = [(v, of_v) for v, (name, of_v) in enumerate(counts.items()) if position(name) != 0]
    own = [(v, of_v) for v, of_v in offered if (of_v[1, :, reference] > 0).all()]
    if not own or not own[0][1][0, len(objectives.goal.sets) :, reference].all():
        return None
    first_CS1 = own[0][1][:, :, reference, None]
    measured: list[Array] = []
    owners, which = [np.array([setting_T[reference]], dtype=np.int64)], [np.array([own[0][0]])]
    for v, of_v in offered:  # all at once would be hundreds of megabytes
        # Sums over the seeds have the ratios that means have.
        sums = [[np.bincount(setting_T + 1, of, settings + 1)[1:] for of in sets] for sets in of_v]
        sums_CSK = np.array(sums)
        complete_K = (sums_CSK[1] > 0).all(axis=0)
        complete_K[setting_T[reference]] = False
        counts_CSP = np.concatenate([first_CS1, sums_CSK[..., complete_K]], axis=2)
        correct_PS, total_PS, fooled_PS = (counts_CSP[i].T for i in (0, 1, -1))
        split = split_of((correct_PS, total_PS, fooled_PS), _sets(objectives), "validation", objectives, {})
        found = split.objectives()
        measured += [found[1:]] if measured else [found]
        owners.append(np.flatnonzero(complete_K))
        which.append(np.full(len(owners[-1]), v))
    return np.concatenate(measured), np.concatenate(owners), np.concatenate(which)


def _nearest(
    measured_PM: Array, owner_P: NDArray[np.int64], variant_P: NDArray[np.int64], variants: Sequence[str],
    tuned_K: NDArray[np.bool_],
) -> NDArray[np.bool_]:  # fmt: skip
    """Which settings are near, (K,)."""
    curve_P = np.array(["=" in v for v in variants])[variant_P]
    averaged_P = np.array([v == AVERAGED for v in variants])[variant_P]
    near_K = np.zeros(len(tuned_K), dtype=np.bool_)
    for family_P in families_of(methods_of(tuned_K[owner_P], curve_P), averaged_P).values():
        off_K = np.full(len(tuned_K), np.inf)
        np.minimum.at(off_K, owner_P[family_P], _off(measured_PM[family_P]))
        off_K[owner_P[0]] = np.inf  # the untouched model takes no other's place
        closest = np.argsort(off_K, kind="stable")[:NEAREST]
        near_K[closest[np.isfinite(off_K[closest])]] = True
    return near_K


def _sets(objectives: Objectives) -> list[str]:
    return [f"validation/{s}" for s in objectives.sets]


class _Coder:
    """Makes numbers of texts: which of some names each one is; as many as there are names for any other."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._number = {name: i for i, name in enumerate(names)}
        self._dictionary, self._codes = texts([]), np.zeros(0, dtype=np.int64)

    def __call__(self, column: pa.DictionaryArray) -> NDArray[np.int64]:
        if not column.dictionary.equals(self._dictionary):  # neighbouring batches have the same
            self._dictionary = column.dictionary
            found = [self._number.get(text, len(self.names)) for text in column.dictionary.to_pylist()]
            self._codes = np.array(found, dtype=np.int64)
        return self._codes[numbers(column.indices)]


def _off(measured_PM: Array) -> Array:
    """How far each point is off the front, 0 on it alone: (P,).

    By the objective in which it is closer. Many points can be as good as any in one of them, as where
    retention is at its cap; the other one then decides between them.
    """
    one_P, other_P = distances(measured_PM).T
    off_P: Array = np.minimum(one_P, other_P) + OTHER * np.maximum(one_P, other_P)
    return off_P


def _offers(trials: pa.Table) -> NDArray[np.bool_]:
    """Which trials offer points to the front of the search."""
    status = trials["status"]
    left_weights = pc.and_(is_in(status, [STOPPED]), pc.is_valid(trials["checkpoint_uri"]))
    offers = pc.or_(is_in(status, ["completed"]), left_weights)
    return flags(pc.and_(offers, pc.invert(pc.starts_with(trials["trial_id"], CONFIRM))))


def _settings(trials: pa.Table) -> pa.Array:
    """What each trial ran but for its seed; a confirming trial is no seed of what it confirms."""
    names = [n for n in (*SETTINGS, "params_json") if n in trials.column_names and n != "seed"]
    parts = [trials[n].cast(pa.string()) for n in names] + [_never_left_out(trials).cast(pa.string())]
    joined = pc.binary_join_element_wise(
        *parts, texts(["|"])[0], null_handling="replace", null_replacement=""
    )
    return joined.combine_chunks()


def _never_left_out(trials: pa.Table) -> pa.ChunkedArray:
    """The untouched model and confirming trials: (T,)."""
    ids = trials["trial_id"]
    return pc.or_(is_in(ids, [REFERENCE]), pc.starts_with(ids, CONFIRM))
