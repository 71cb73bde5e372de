"""Finished trials of earlier sweeps, for a sampler to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clippo.config import SweepConfig
from clippo.errors import ConfigError
from clippo.front.counts import REFERENCE
from clippo.results import ResultStore
from clippo.sweep.rows import Scorer, finished_trials
from clippo.sweep.search import Outcome
from clippo.sweep.space import fits


def known_trials(config: SweepConfig) -> tuple[list[tuple[Mapping[str, Any], Outcome]], int]:
    """Settings and outcomes of the trials of ``search.warm_start``, measured by this sweep's objectives.

    Returns:
        the trials that this search could have drawn, and the number of those that it could not.

    Raises:
        ConfigError: no such sweep, one of another task, one that trained a transform where this one trains
            a tower or the reverse, or one without the sets of the objectives.
        StoreError: a store that cannot be read.
    """
    scorer, own = Scorer(config), (ResultStore(config.results).uri, config.name)
    known: list[tuple[Mapping[str, Any], Outcome]] = []
    left_out = 0
    for store, sweep in (found for spec in config.search.warm_start for found in _sweeps(spec)):
        if (store.uri, sweep) == own:
            continue  # a resumed sweep knows its own trials
        theirs = store.config(sweep) or {}
        if theirs.get("task", config.task) != config.task:
            raise ConfigError(
                f"search.warm_start has sweep {sweep!r}, whose task is {theirs['task']!r}; it must be "
                f"{config.task!r}"
            )
        trained = theirs.get("model", {}).get("trainable", config.model.trainable)
        if trained != config.model.trainable and "transform" in (trained, config.model.trainable):
            raise ConfigError(
                f"search.warm_start has sweep {sweep!r}, which trained {trained!r}, and this one trains "
                f"{config.model.trainable!r}; their learning rates have nothing to do with each other"
            )
        trials = finished_trials(store, sweep)
        reference = trials[REFERENCE].counts if REFERENCE in trials else []
        for trial_id, trial in trials.items():
            if not trial_id.isdigit() or not reference:
                continue
            if not fits(trial.settings, config.search, config.model.trainable):
                left_out += 1
                continue
            known.append((trial.settings, scorer.outcome(trial, reference)))
    return known, left_out


def _sweeps(spec: str) -> list[tuple[ResultStore, str]]:
    """The sweeps of ``STORE`` or ``STORE/SWEEP``."""
    parent, slash, last = spec.rstrip("/").rpartition("/")
    if slash and parent and not parent.endswith(("/", ":")):
        above = ResultStore(parent)
        if last in above.sweeps():
            return [(above, last)]
    store = ResultStore(spec)
    names = store.sweeps()
    if not names:
        raise ConfigError(
            f"search.warm_start has {spec!r}, where there is no sweep; give STORE or STORE/SWEEP"
        )
    return [(store, name) for name in names]
