"""Of a very large sweep, the trials that may matter to its front: reading all points would take minutes.

Shapes: T trials, V variants, S evaluation sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clippo.front.counts import CONFIRM, REFERENCE, SETTINGS, SplitCounts, coded
from clippo.front.evidence import distances
from clippo.results import ResultStore, View

LARGE = 5_000
"""Trials of a sweep that a front takes whole."""
NEAREST = 2_000
"""Trials of a larger sweep that it takes: preference optimisation's and baselines', that many of each."""
TUNING_LOSS = "cross_entropy"
COLUMNS = ("trial_id", "variant", "eval_set", "epoch", "n_correct", "n_total")


def nearest_trials(
    store: ResultStore,
    sweep: str,
    trials: pa.Table,
    *,
    robustness_sets: Sequence[str],
    retention_sets: Sequence[str],
) -> pa.Table:
    """The rows of those trials that have a point closest to the front, with all seeds of their settings.

    A trial is as far off as the closest of its points, on validation pictures; what is on the front is 0 off.
    Methods are ranked apart, so that each keeps its own front. The untouched model and confirming trials
    stay.
    """
    sets = [f"validation/{s}" for s in (*robustness_sets, *retention_sets)]
    ids = trials["trial_id"].to_pylist()
    if REFERENCE not in ids:
        return trials
    off_T = _distances(store, sweep, ids, sets, attacked=len(robustness_sets))
    tuned_T = pc.equal(trials["loss"], TUNING_LOSS).fill_null(False).to_numpy()
    near_T = np.zeros(len(ids), dtype=np.bool_)
    for family in (tuned_T, ~tuned_T):
        members = np.flatnonzero(family & np.isfinite(off_T))
        near_T[members[np.argsort(off_T[members], kind="stable")[:NEAREST]]] = True
    setting = _settings(trials)
    near = pc.is_in(setting, value_set=setting.filter(pa.array(near_T)))
    always = pc.or_(pc.equal(trials["trial_id"], REFERENCE), pc.starts_with(trials["trial_id"], CONFIRM))
    return trials.filter(pc.or_(near, always))


def _distances(
    store: ResultStore, sweep: str, ids: Sequence[str], sets: Sequence[str], *, attacked: int
) -> NDArray[np.float64]:
    """How far off the front the closest point of each trial is, after its last epoch: (T,), inf for none."""
    view = View(columns=COLUMNS, where={"eval_set": sets}, dictionary=True)
    evals = store.evals(sweep, view)
    trial, _ = coded(evals["trial_id"], ids)
    variant, variants = coded(evals["variant"])
    which, _ = coded(evals["eval_set"], sets)
    epoch = evals["epoch"].to_numpy()
    last_epoch = np.full(len(ids), -1)
    np.maximum.at(last_epoch, trial[trial >= 0], epoch[trial >= 0])
    kept = (trial >= 0) & (epoch == last_epoch[trial])
    cell = ((trial * len(variants) + variant) * len(sets) + which)[kept]
    counts = np.full((2, len(ids) * len(variants) * len(sets)), np.nan)
    for row, name in zip(counts, ("n_correct", "n_total"), strict=True):
        row[cell] = evals[name].to_numpy()[kept]
    del evals, trial, variant, which, epoch, kept, cell  # hundreds of megabytes
    correct_PS, total_PS = counts.reshape(2, -1, len(sets))

    complete = np.flatnonzero(~np.isnan(total_PS).any(axis=1))
    owner = complete // len(variants)
    untouched = owner == ids.index(REFERENCE)
    complete = np.concatenate([complete[untouched], complete[~untouched]])  # it is the first of SplitCounts
    if not untouched.any() or not correct_PS[complete[0]].all():
        return np.zeros(len(ids))  # whoever reads the counts will say what is wrong
    split = SplitCounts(correct_PS=correct_PS[complete], total_PS=total_PS[complete], attacked=attacked)
    off_T = np.full(len(ids), np.inf)
    np.minimum.at(off_T, complete // len(variants), distances(split.objectives()).min(axis=1))
    return off_T


def _settings(trials: pa.Table) -> pa.Array:
    """What each trial ran but for its seed, as one text."""
    names = [n for n in (*SETTINGS, "params_json") if n in trials.column_names and n != "seed"]
    texts = [trials[n].cast(pa.string()) for n in names]
    joined = pc.binary_join_element_wise(*texts, "|", null_handling="replace", null_replacement="")
    return joined.combine_chunks()
