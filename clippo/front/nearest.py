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
from clippo.front.counts import CONFIRM, REFERENCE, SETTINGS, coded, position, split_of
from clippo.front.evidence import distances
from clippo.front.uncertainty import Array
from clippo.results import ResultStore, View

LARGE = 5_000
"""Trials of a sweep that a front takes whole."""
NEAREST = 2_000
"""Trials of a larger sweep that it takes: preference optimisation's and baselines', that many of each."""
TUNING_LOSS = "cross_entropy"
COLUMNS = ("trial_id", "variant", "eval_set", "epoch")


def nearest_trials(
    store: ResultStore,
    sweep: str,
    trials: pa.Table,
    objectives: Objectives,
) -> pa.Table:
    """The rows of those trials whose settings have a point closest to the front.

    Settings are as far off as the closest of their points, the means over their seeds on validation pictures;
    what is on the front is 0 off. Methods are ranked apart, so that each keeps its own front. The untouched
    model and confirming trials stay.
    """
    ids = trials["trial_id"].to_pylist()
    if REFERENCE not in ids:
        return trials
    settings = _settings(trials).dictionary_encode()
    setting_T = settings.indices.to_numpy()
    off_K = _distances(store, sweep, ids, setting_T, objectives)
    tuned = trials.filter(pc.equal(trials["loss"], TUNING_LOSS))
    tuned_K = pc.is_in(settings.dictionary, value_set=_settings(tuned)).to_numpy(zero_copy_only=False)
    near_K = np.zeros(len(off_K), dtype=np.bool_)
    for family in (tuned_K, ~tuned_K):
        members = np.flatnonzero(family & np.isfinite(off_K))
        near_K[members[np.argsort(off_K[members], kind="stable")[:NEAREST]]] = True
    return trials.filter(pc.or_(pa.array(near_K[setting_T]), _never_left_out(trials)))


def _distances(
    store: ResultStore, sweep: str, ids: Sequence[str], setting_T: NDArray[np.int32], objectives: Objectives
) -> NDArray[np.float64]:
    """How far off the front the closest point of each setting is, at the end: (K,), inf for none."""
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
    n_settings = int(setting_T.max()) + 1
    cells = n_settings * len(variants) * len(sets)
    cell = np.append(setting_T, 0)[trial]
    for size, code in ((len(variants), variant), (len(sets), which)):
        cell *= size
        cell += code
    cell[(trial < 0) | (epoch < last_epoch[trial])] = cells  # beyond the last one
    del trial, variant, which, epoch  # hundreds of megabytes
    # The sums over the seeds have the ratios that the means have.
    counts: list[Array] = [
        np.bincount(cell, evals[n].to_numpy(), cells + 1)[:cells].reshape(-1, len(sets)).view(np.float64)
        for n in counted
    ]
    correct_PS, total_PS = counts[:2]
    del evals, cell
    pa.default_memory_pool().release_unused()

    start = np.array([position(v) == 0 for v in variants])  # of a curve: the untouched model once more
    complete = np.flatnonzero((total_PS > 0).all(axis=1) & ~np.tile(start, n_settings))
    owner = complete // len(variants)
    untouched = owner == setting_T[ids.index(REFERENCE)]
    if not untouched.any() or not correct_PS[complete[untouched][0]].all():
        return np.zeros(n_settings)  # whoever reads the counts will say what is wrong
    complete = np.concatenate([complete[untouched], complete[~untouched]])  # the first one of SplitCounts
    kept = tuple(c[complete] for c in (correct_PS, total_PS, counts[-1]))
    split = split_of(kept, sets, "validation", objectives, {})
    off_K = np.full(n_settings, np.inf)
    np.minimum.at(off_K, complete // len(variants), distances(split.objectives()).min(axis=1))
    off_K[setting_T[ids.index(REFERENCE)]] = np.inf  # it takes no other's place
    return off_K


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
