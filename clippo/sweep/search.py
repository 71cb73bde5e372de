"""Optuna as a Ray Tune searcher for several objectives.

Ray's own OptunaSearch leaves a trial without a finite result RUNNING for ever, cannot take over finished
trials, and merges studies of one name. This one is a thin layer over Optuna's ask-and-tell; its study lives
in memory and is rebuilt from the result tables, which are the truth.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.search import Searcher

from clippo.config import SearchConfig
from clippo.sweep.space import baseline, distributions, draw, params_of
from clippo.train.loop import FAILURE

OBJECTIVES = ("robustness", "retention")
Score = Callable[[Mapping[str, Any]], "list[float] | None"]


class Search(Searcher):
    """Proposes settings until ``search.trials`` trials have been started.

    Args:
        score: the objectives of a trial's last report, None where it has no finite ones.
        trainable: what the policy trains; a transform has a setting more.
        finished: ``settings`` and ``values`` (None: failed) of trials that earlier runs finished.
        unfinished: ``trial_id``, ``attempt`` and ``settings`` of trials that were running when the driver
            died; they are proposed first, as their next attempt.
        baselines: trials that are only compared with; they come next, and the sampler does not know them.
        next_number: number of the first new trial.
        on_start: called with trial id, attempt and settings before a trial is handed to Ray.
    """

    def __init__(
        self, search: SearchConfig, score: Score, *, trainable: str = "image",
        finished: Sequence[Mapping[str, Any]] = (), unfinished: Sequence[Mapping[str, Any]] = (),
        baselines: Sequence[str] = (), next_number: int = 0,
        on_start: Callable[[str, int, dict[str, Any]], None] = lambda trial_id, attempt, settings: None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self._score, self._trainable = search, score, trainable
        self.study = optuna.create_study(
            directions=["maximize"] * len(OBJECTIVES), sampler=_sampler(search, next_number)
        )
        for trial in finished:
            self._add(trial["settings"], trial["values"])
        self._unfinished, self._baselines = list(unfinished), list(baselines)
        self._next_number = next_number
        self._on_start = on_start
        self._asked: dict[str, optuna.Trial] = {}  # baselines are not among them

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # or FINISHED
        """The next trial's id, attempt and settings; ``trial_id`` is Ray's own, which no resume keeps."""
        if self._unfinished:
            again = self._unfinished.pop(0)
            name, attempt, settings = again["trial_id"], again["attempt"] + 1, dict(again["settings"])
            if name.isdigit():
                self.study.enqueue_trial(params_of(settings))
                self._asked[trial_id] = self.study.ask()
                draw(self._asked[trial_id], self.config, self._trainable)
        elif self._baselines:
            name, attempt = self._baselines.pop(0), 0
            settings = baseline(name, self.config, self._trainable) | {"seed": self.config.seed}
        elif self._next_number < self.config.trials:
            self._asked[trial_id] = self.study.ask()
            settings = draw(self._asked[trial_id], self.config, self._trainable) | {"seed": self.config.seed}
            name, attempt = f"{self._next_number:05d}", 0
            self._next_number += 1
        else:
            return Searcher.FINISHED
        self._on_start(name, attempt, settings)
        return {"trial_id": name, "attempt": attempt, "settings": settings}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells Optuna the objectives, or FAIL where there are none."""
        trial = self._asked.pop(trial_id, None)
        if trial is None:
            return
        values = None if error else self._score(result or {})
        if values is None:
            trial.set_user_attr(FAILURE, str((result or {}).get(FAILURE, "no finite objectives")))
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def save(self, checkpoint_path: str) -> None:
        # Ray asks for it; a resume reads the result tables and not this.
        Path(checkpoint_path).write_bytes(pickle.dumps(self.study.trials))

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its result tables")

    def _add(self, settings: Mapping[str, Any], values: Sequence[float] | None) -> None:
        params = params_of(settings)
        space = distributions(self.config, settings["loss"], self._trainable)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        self.study.add_trial(
            optuna.trial.create_trial(state=state, params=params, distributions=space, values=values)
        )


def _sampler(search: SearchConfig, next_number: int) -> BaseSampler:
    seed = search.seed + next_number  # or a resumed sweep would draw again what it drew before
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Multivariate sampling over a conditional space (group) has been "experimental" for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            seed=seed,
            n_startup_trials=max(4, search.trials // 4),
            multivariate=True,
            group=True,
            constant_liar=search.concurrency > 1,
        )
