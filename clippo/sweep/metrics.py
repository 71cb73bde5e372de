"""Numbers of a running sweep for Prometheus, on the metrics port of Ray on the driver's node.

Ray puts ``ray_`` before the names; every number has the sweep's name as a tag.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.util.metrics import Counter, Gauge

from clippo.evaluate.objectives import COST, Objectives
from clippo.front import hypervolume
from clippo.front.counts import STOPPED, STOPPED_AFTER
from clippo.front.evidence import HV_REFERENCE_POINT
from clippo.sweep.search import Numbers, Score
from clippo.train.loop import UNFINISHED


class SweepMetrics(tune.Callback):
    """Counts what happens to trials.

    Args:
        sweep: its name.
        score: the numbers of a report.
        known: numbers of the untouched model and of the trials of earlier runs.
    """

    def __init__(self, sweep: str, score: Score, objectives: Objectives, known: Iterable[Numbers]) -> None:
        self._score, self._place = score, objectives.place
        self._points = list(map(self._place, known))
        self._running: set[str] = set()
        self._epochs: dict[str, int] = {}

        def of(kind: type, name: str, what: str, *tags: str) -> Any:
            made = kind(f"clippo_{name}", description=what, tag_keys=("sweep", *tags))
            made.set_default_tags({"sweep": sweep})
            return made

        self._ended = of(Counter, "trials_ended", "Trials that have ended, by status", "status")
        self._epochs_done = of(Counter, "epochs", "Epochs that trials have finished")
        self._device_s = of(Counter, "device_seconds", "Device time of trials that have ended [s]")
        self._now = of(Gauge, "trials_running", "Trials that run")
        self._volume = of(Gauge, "hypervolume", "Hypervolume of all trials' averaged weights on validation")
        self._volume.set(hypervolume(self._points, HV_REFERENCE_POINT))
        self._now.set(0)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore them; a sweep is resumed from its tables instead

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running.add(trial.trial_id)
        self._now.set(len(self._running))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        # A trial that goes on elsewhere reports again what it had reported.
        epoch, known = result.get("epoch", 0), self._epochs.get(trial.trial_id, 0)
        if epoch > known:
            self._epochs[trial.trial_id] = epoch
            self._epochs_done.inc(epoch - known)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        if UNFINISHED in result:
            self._leave(trial)
            return
        numbers = self._score(result)
        if numbers is None:
            self._finish(trial, "failed")
            return
        settings = trial.config["settings"]
        stopped = result["epoch"] < (settings.get(STOPPED_AFTER) or settings["epochs"])
        self._points.append(self._place(numbers))
        self._volume.set(hypervolume(self._points, HV_REFERENCE_POINT))
        if numbers.get(COST):  # Ray refuses to add nothing
            self._device_s.inc(numbers[COST])
        self._finish(trial, STOPPED if stopped else "completed")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._finish(trial, "failed")

    def close(self) -> None:
        """Nothing runs any more, also where the sweep was interrupted."""
        self._now.set(0)

    def _leave(self, trial: Trial) -> None:
        self._running.discard(trial.trial_id)
        self._now.set(len(self._running))

    def _finish(self, trial: Trial, status: str) -> None:
        self._leave(trial)
        self._ended.inc(1, tags={"status": status})
