"""Runs trials through Ray Tune, until the search has no more."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError
from ray.tune.schedulers import TrialScheduler

from clippo.config import SweepConfig
from clippo.errors import ResourceError, StoreError
from clippo.sweep.callback import SweepCallback
from clippo.sweep.cluster import leftovers_freed, trial_resources
from clippo.sweep.metrics import SweepMetrics
from clippo.sweep.search import Search
from clippo.sweep.tracking import Tracking


def run_trials(
    config: SweepConfig, trainable: Any, search: Search, callback: SweepCallback,
    watchers: Sequence[Tracking | SweepMetrics], scheduler: TrialScheduler | None = None,
) -> None:  # fmt: skip
    """Runs trials until the search has no more.

    Args:
        trainable: ``tune_trial`` with its parameters.
        watchers: told of every trial; closed in the end.

    Raises:
        StoreError: the store was away from a trial for too long.
        ResourceError: Ray killed a trial for memory.
    """
    with tempfile.TemporaryDirectory(prefix="clippo-tune-") as tune_state:
        tuner = tune.Tuner(
            tune.with_resources(trainable, trial_resources(config)),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=-1,  # until the searcher says that it has finished
                max_concurrent_trials=config.search.concurrency,
                # With workers, Ray 2.60 hands a stopped driver, which still waits for them, to the next
                # trial, and makes that an error.
                reuse_actors=config.max_workers == 0,
            ),
            run_config=tune.RunConfig(
                name=config.name,
                storage_path=tune_state,
                verbose=1 if config.verbose else 0,
                failure_config=tune.FailureConfig(max_failures=3),
                callbacks=[callback, *watchers],
            ),
        )
        try:
            with leftovers_freed() if config.max_workers else contextlib.nullcontext():
                tuner.fit()
        except RuntimeError as error:
            # Tune takes it for a fault of its own (Ray 2.60).
            if isinstance(error.__cause__, OutOfMemoryError):
                raise ResourceError(
                    "Ray killed a trial, as its machine was about to run out of memory; lower "
                    "search.concurrency, set or lower train.micro_batch, or use a larger machine; what "
                    "has ended is kept, and the sweep goes on with the same command"
                ) from None
            raise
        finally:
            for watcher in watchers:
                watcher.close()
    refuse_unfinished(callback)  # of the last trials


def refuse_unfinished(callback: SweepCallback) -> None:
    """Ends the sweep once the store was away from a trial for too long.

    Raises:
        StoreError: it was.
    """
    for trial_id, said in callback.unfinished.items():
        raise StoreError(
            f"trial {trial_id} could not go on: {said}; what has ended is kept, and the same command goes on "
            "with the rest"
        )
