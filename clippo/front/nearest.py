"""Of a very large sweep, the trials that may matter to its front: reading all points would take minutes.

Shapes: T trials, K settings, P points, S evaluation sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clippo.evaluate.objectives import Objectives
from clippo.front.counts import AVERAGED, CONFIRM, REFERENCE, SETTINGS, STOPPED, coded, position, split_of
from clippo.front.evidence import distances
from clippo.front.pareto import pareto_mask
from clippo.front.uncertainty import Array
from clippo.results import ResultStore, View

LARGE = 5_000
"""Trials of a sweep that a front takes whole."""
NEAREST = 2_000
"""Settings of a larger sweep that it takes of each method."""
OTHER = 0.1  # what the objective in which a point is farther off counts beside the closer one
TUNING_LOSS = "cross_entropy"
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
    setting_T = settings.indices.to_numpy()
    tuned = _settings(trials.filter(pc.equal(trials["loss"], TUNING_LOSS)))
    tuned_K = pc.is_in(settings.dictionary, value_set=tuned).to_numpy(zero_copy_only=False)
    near_K = _nearest(store, sweep, ids, np.where(_offers(trials), setting_T, -1), tuned_K, objectives)
    return trials.filter(pc.or_(pa.array(near_K[setting_T]), _never_left_out(trials)))


def _nearest(
    store: ResultStore, sweep: str, ids: Sequence[str], setting_T: NDArray[np.int32],
    tuned_K: NDArray[np.bool_], objectives: Objectives,
) -> NDArray[np.bool_]:  # fmt: skip
    """Which settings are near, (K,); trials of setting -1 offer no point."""
    goal, sets = objectives.goal, [f"validation/{s}" for s in objectives.sets]
    counted = ["n_correct", "n_total"] + ["n_fooled"] * (goal.measure == "fooled")
    wanted = View(columns=(*COLUMNS, *counted), where={"eval_set": sets}, dictionary=True)
    evals = store.evals(sweep, wanted)
    trial, _ = coded(evals["trial_id"], ids)
    variant, variants = coded(evals["variant"])
    which, _ = coded(evals["eval_set"], sets)
    epoch = evals["epoch"].to_numpy()
    last_epoch = np.zeros(len(ids) + 1, dtype=epoch.dtype)  # the last one is of trials that ended since
    np.maximum.at(last_epoch, trial, epoch)
    n_settings, setting_T = len(tuned_K), np.append(setting_T, -1)
    cells = n_settings * len(variants) * len(sets)
    cell = setting_T[trial]
    for size, code in ((len(variants), variant), (len(sets), which)):
        cell *= size
        cell += code
    cell[(setting_T[trial] < 0) | (epoch < last_epoch[trial])] = cells  # beyond the last one
    del trial, variant, which, epoch  # hundreds of megabytes
    # The sums over the seeds have the ratios that the means have. (The view is for the type checker.)
    counts: list[Array] = [
        np.bincount(cell, evals[n].to_numpy(), cells + 1)[:cells].reshape(-1, len(sets)).view(np.float64)
        for n in counted
    ]
    correct_PS, total_PS = counts[:2]
    del evals, cell
    pa.default_memory_pool().release_unused()

    start_V = np.array([position(v) == 0 for v in variants], dtype=np.bool_)  # the untouched model again
    complete = np.flatnonzero((total_PS > 0).all(axis=1) & ~np.tile(start_V, n_settings))
    untouched = complete // len(variants) == setting_T[ids.index(REFERENCE)]
    if not untouched.any() or not correct_PS[complete[untouched][0], len(goal.sets) :].all():
        return np.ones(n_settings, dtype=np.bool_)  # whoever reads the counts will say what is wrong
    complete = np.concatenate([complete[untouched], complete[~untouched]])  # the first one of SplitCounts
    kept = tuple(c[complete] for c in (correct_PS, total_PS, counts[-1]))
    measured_PM = split_of(kept, sets, "validation", objectives, {}).objectives()
    owner_P, variant_P = complete // len(variants), complete % len(variants)
    near_K = np.zeros(n_settings, dtype=np.bool_)
    curve_P = np.array(["=" in v for v in variants])[variant_P]
    averaged_P = np.array([v == AVERAGED for v in variants])[variant_P]
    tuned_P = tuned_K[owner_P]
    # As in `clippo.front.points`: preferences, tuning, and interpolation, which ends at the averaged weights.
    for family_P in (~tuned_P, tuned_P & ~curve_P, tuned_P & (curve_P | averaged_P)):
        family_P[0] = True
        members = np.flatnonzero(family_P)
        off_K = np.full(n_settings, np.inf)
        np.minimum.at(off_K, owner_P[members], _off(measured_PM[members]))
        off_K[owner_P[0]] = np.inf  # the untouched model takes no other's place
        closest = np.argsort(off_K, kind="stable")[:NEAREST]
        near_K[closest[np.isfinite(off_K[closest])]] = True
    return near_K


def _off(measured_PM: Array) -> Array:
    """How far each point is off the front, -1 on it: (P,).

    By the objective in which it is closer. Many points can be as good as any in one of them, as where
    retention is at its cap; the other one then decides between them.
    """
    off_PM = distances(measured_PM)
    off_P = off_PM.min(axis=1) + OTHER * off_PM.max(axis=1)
    off_P[pareto_mask(measured_PM)] = -1
    return off_P


def _offers(trials: pa.Table) -> NDArray[np.bool_]:
    """Which trials offer points to the front of the search."""
    status = trials["status"]
    left_weights = pc.and_(pc.equal(status, STOPPED), pc.is_valid(trials["checkpoint_uri"]))
    offers = pc.or_(pc.equal(status, "completed"), left_weights)
    return pc.and_(offers, pc.invert(pc.starts_with(trials["trial_id"], CONFIRM))).to_numpy()


def _settings(trials: pa.Table) -> pa.Array:
    """What each trial ran but for its seed; a confirming trial is no seed of what it confirms."""
    names = [n for n in (*SETTINGS, "params_json") if n in trials.column_names and n != "seed"]
    texts = [trials[n].cast(pa.string()) for n in names] + [_never_left_out(trials).cast(pa.string())]
    joined = pc.binary_join_element_wise(*texts, "|", null_handling="replace", null_replacement="")
    return joined.combine_chunks() if joined.num_chunks else pa.array([], pa.string())


def _never_left_out(trials: pa.Table) -> pa.ChunkedArray:
    """The untouched model and confirming trials: (T,)."""
    ids = trials["trial_id"]
    return pc.or_(pc.equal(ids, REFERENCE), pc.starts_with(ids, CONFIRM))
