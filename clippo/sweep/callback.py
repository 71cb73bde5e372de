"""What happens when a trial reports or ends: its rows are kept, the budget and the progress view are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from clippo.evaluate import Counts
from clippo.front.front import describe
from clippo.sweep.progress import ProgressView
from clippo.sweep.rows import TrialRows, device_s
from clippo.sweep.scheduler import Decision
from clippo.sweep.search import Numbers, Score
from clippo.train.loop import FAILURE, UNFINISHED
from clippo.train.ray_train import LOST

OnEnd = Callable[[str, float, "Numbers | None", list[Counts]], None]


DIED = "its process died again and again; see the logs of Ray; if for want of memory, set train.micro_batch"


class SweepCallback(tune.Callback):
    """Keeps the rows of every trial that ends, and tells the others.

    Args:
        on_end: called with id, device time [s], numbers (None: failed) and last counts of each trial that has
            ended, when its rows are kept.

    Attributes:
        unfinished: why trials could not go on, by our id, where that was no fault of theirs. They have no
            rows, so that they go on when the sweep is resumed.
    """

    def __init__(
        self, rows: TrialRows, score: Score, view: ProgressView,
        on_end: OnEnd = lambda trial_id, device_s, numbers, counts: None,
    ) -> None:  # fmt: skip
        self._rows, self._score, self._view, self._on_end = rows, score, view, on_end
        self._reports: dict[str, dict[int, dict[str, Any]]] = {}
        self._decisions: dict[str, dict[int, Decision]] = {}  # by our id and epoch
        self._began: dict[str, float] = {}
        self._restarts: dict[str, int] = {}
        self._lost: dict[str, int] = {}  # since the last restart
        self.unfinished: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore them; a sweep is resumed from its tables instead

    def decided(self, trial_id: str, epoch: int, decision: Decision) -> None:
        """What a rung made of a trial; it becomes part of the metrics of that epoch."""
        if decision.rung is not None or decision.stop:
            self._decisions.setdefault(trial_id, {})[epoch] = decision

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.trial_id in self._began:
            self._restarts[trial.trial_id] += 1 + self._lost.pop(trial.trial_id, 0)
            return
        self._began[trial.trial_id] = time.time()
        self._reports[trial.trial_id], self._restarts[trial.trial_id] = {}, 0
        self._view.started()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._lost[trial.trial_id] = result.get(LOST, self._lost.get(trial.trial_id, 0))
        if "evals" in result:  # a restarted trial reports again what it had reported
            kept = {k: result[k] for k in ("epoch", "step", "metrics", "busy_s", "precision", "evals")}
            self._reports[trial.trial_id][result["epoch"]] = kept

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        if UNFINISHED in result:
            self.unfinished[trial.config["trial_id"]] = result[UNFINISHED]
            return
        numbers = self._score(result)
        failure = None if numbers is not None else str(result.get(FAILURE, "it ended without a report"))
        self._finish(trial, failure, numbers)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._finish(trial, DIED, None)

    def _finish(self, trial: Trial, failure: str | None, numbers: Numbers | None) -> None:
        config, key = trial.config, trial.trial_id
        if key not in self._began:  # it could not even be started
            self.on_trial_start(0, [], trial)
        name: str = config["trial_id"]
        decisions = self._decisions.get(name, {})
        reports = [
            report | {"metrics": report["metrics"] | _as_metrics(decisions.get(epoch))}
            for epoch, report in sorted(self._reports[key].items())
        ]
        last = decisions.get(reports[-1]["epoch"]) if reports else None
        stopped = failure is None and last is not None and last.stop
        self._rows.write(
            name, config["attempt"], config["settings"], reports, began=self._began[key], failure=failure,
            stopped=stopped, preemptions=config["attempt"] + self._restarts[key] + self._lost.get(key, 0),
        )  # fmt: skip
        stop = f"stopped after epoch {reports[-1]['epoch']}" if stopped else ""
        self._view.finished(name, describe(config["settings"]), numbers, failure or "", stop)
        spent = device_s(reports[-1], self._rows.config) if reports else 0.0
        self._on_end(name, spent, numbers, [Counts.of(e) for e in reports[-1]["evals"]] if reports else [])


def _as_metrics(decision: Decision | None) -> Mapping[str, float]:
    """Why a trial was stopped, or not, in numbers."""
    if decision is None:
        return {}
    return {
        "rung_stop": float(decision.stop),
        "rung_rank": float(decision.rank),
        "rung_place": float(decision.place),
        "rung_trials": float(decision.of),
    }
