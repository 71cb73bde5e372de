"""Optuna as a Ray Tune searcher for several objectives.

Ray's own OptunaSearch leaves a trial without a finite result RUNNING for ever, tells trials that were stopped
early COMPLETE, cannot take over finished trials, and merges studies of one name. This one is a thin layer
over Optuna's ask-and-tell; its study lives in memory and is rebuilt from the result tables, which are the
truth.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import optuna
from optuna import samplers
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher

from clippo.config import SearchConfig
from clippo.evaluate.objectives import Objectives
from clippo.sweep.space import distributions, draw, params_of
from clippo.train.loop import FAILURE, UNFINISHED

GP_SETTINGS = 100
"""With so many finished settings a Gaussian process takes 0.7 s to propose the next, TPE 0.006 s; with 1,000
it takes 5 s, TPE 0.02 s (``benchmarks.search.driver``) [count]."""

KNOWN = -1  # in place of a trial's number: one of another sweep

Numbers = Mapping[str, float]
"""What a trial reached, by name: the objectives, and retention."""

Score = Callable[[Mapping[str, Any]], "Numbers | None"]
"""The numbers of a trial's last report, None where it has none that are finite."""


@dataclass(frozen=True)
class Proposal:
    """A trial to start."""

    trial_id: str
    attempt: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        numbers: what it reached, at an early epoch if it was stopped; None if it failed.
        stopped: whether the scheduler stopped it early.
        reason: why it failed.
    """

    numbers: Numbers | None
    stopped: bool = False
    reason: str = "no finite objectives"


@dataclass
class _Setting:
    """Settings that were drawn, and the trials that run them with one seed each."""

    settings: dict[str, Any]
    members: set[int]
    trial: optuna.Trial | None = None  # None: the earlier trials are enough, Optuna need not be asked
    outcomes: dict[int, Outcome] = field(default_factory=dict)


@dataclass(frozen=True)
class _Verdict:
    """What became of a setting.

    Attributes:
        values: what it reached; also of PRUNED, which has no values of its own.
    """

    state: TrialState
    values: list[float] | None
    attributes: dict[str, Any]
    constraints: dict[str, float]

    @property
    def learned(self) -> TrialState:
        """As what the sampler sees it."""
        return TrialState.COMPLETE if self.state == TrialState.PRUNED else self.state


class Search(Searcher):
    """Proposes settings until ``search.trials`` trials have been started.

    Trial ``n`` runs settings number ``n // replicates`` with the seed ``search.seed + n % replicates``.

    ``study`` has the settings that have ended, those that were stopped early PRUNED. The sampler lives in
    another study, where these count as completed with what they had reached: that they are no better than
    others is what it shall learn, and of PRUNED trials of several objectives it learns nothing.

    Args:
        score: what Optuna is told of a trial.
        objectives: the task's own, which say what is minimised.
        trainable: what the policy trains; a transform has a setting more.
        finished: settings and outcome of this sweep's trials that earlier runs finished, by number.
        unfinished: trials that were running when the driver died; they are proposed first, as their next
            attempt.
        others: trials that are only compared with; they come next, and the sampler does not know them.
        known: settings and outcome of trials of other sweeps; those outside of the ranges are left out.
        exhausted: why no more trials are to be started, None while they are.
        was_stopped: whether the scheduler stopped a trial, by Ray's id.
        on_start: called with trial id, attempt and settings before a trial is handed to Ray.
        context: what else a trial is handed, by its id.
        on_told: called with each trial that Optuna has been told.
    """

    def __init__(
        self, search: SearchConfig, score: Score, objectives: Objectives, *, trainable: str = "image",
        finished: Mapping[int, tuple[Mapping[str, Any], Outcome]] | None = None,
        unfinished: Sequence[Proposal] = (), others: Sequence[Proposal] = (),
        known: Sequence[tuple[Mapping[str, Any], Outcome]] = (),
        exhausted: Callable[[], str | None] = lambda: None,
        was_stopped: Callable[[str], bool] = lambda trial_id: False,
        on_start: Callable[[str, int, dict[str, Any]], None] = lambda trial_id, attempt, settings: None,
        context: Callable[[str], dict[str, Any]] = lambda trial_id: {},
        on_told: Callable[[optuna.trial.FrozenTrial], None] = lambda trial: None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self._score, self._trainable = search, score, trainable
        self._exhausted, self._was_stopped = exhausted, was_stopped
        self._on_start, self._context, self._on_told = on_start, context, on_told
        finished = finished or {}
        again = [Proposal(p.trial_id, p.attempt + 1, dict(p.settings)) for p in unfinished]
        begun = {n: dict(settings) for n, (settings, _) in finished.items()}
        begun |= {int(p.trial_id): p.settings for p in again if p.trial_id.isdigit()}
        self._next_number = max(begun, default=-1) + 1
        self._trials = max(search.trials, self._next_number)  # a resume may ask for fewer than were begun
        self.ended: str | None = None  # why, where it was not for want of trials
        directions = objectives.directions(search.objectives)
        self.study = optuna.create_study(directions=directions)
        self._asked = optuna.create_study(directions=directions, sampler=_sampler(search, self._next_number))
        for settings, outcome in known:
            self._add(_Setting(dict(settings), {KNOWN}, outcomes={KNOWN: outcome}))
        self._settings: dict[int, _Setting] = {}
        self._running: dict[str, int] = {}  # Ray's id to our number
        for number in sorted({n // search.replicates for n in begun}):
            members = self._members(number)
            settings = next(s for n, s in begun.items() if n in members)
            setting = _Setting({k: v for k, v in settings.items() if k != "seed"}, members)
            setting.outcomes = {n: finished[n][1] for n in members & finished.keys()}
            if setting.outcomes.keys() == members:
                self._add(setting)
            else:
                self._ask(setting)
                again += [self._proposal(n, setting) for n in sorted(members - begun.keys())]
                self._next_number = max(self._next_number, *(n + 1 for n in members))
            self._settings[number] = setting
        self._queue = [*again, *others]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher to restore it; a sweep is resumed from its tables instead

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # or FINISHED
        """The next trial's id, attempt and settings; ``trial_id`` is Ray's own, which no resume keeps."""
        if self._queue:
            proposal = self._queue.pop(0)
        elif self._next_number < self.config.trials:
            number, replicate = divmod(self._next_number, self.config.replicates)
            if replicate == 0:
                if (reason := self._exhausted()) is not None:
                    self.ended = reason
                    return Searcher.FINISHED
                self._settings[number] = _Setting({}, self._members(number))
                self._ask(self._settings[number])
            proposal = self._proposal(self._next_number, self._settings[number])
            self._next_number += 1
        else:
            return Searcher.FINISHED
        if proposal.trial_id.isdigit():
            self._running[trial_id] = int(proposal.trial_id)
        self._on_start(proposal.trial_id, proposal.attempt, proposal.settings)
        return {
            "trial_id": proposal.trial_id,
            "attempt": proposal.attempt,
            "settings": proposal.settings,
            **self._context(proposal.trial_id),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells Optuna what a setting reached, once all of its trials have ended."""
        number = self._running.pop(trial_id, None)
        if number is None or UNFINISHED in (result or {}):
            return
        numbers = None if error else self._score(result or {})
        # Where its process dies, Ray has no result; the rows say more.
        reason = str((result or {}).get(FAILURE, "its process died" if error else "no finite objectives"))
        setting = self._settings[number // self.config.replicates]
        setting.outcomes[number] = Outcome(numbers, self._was_stopped(trial_id), reason)
        if setting.outcomes.keys() == setting.members:
            self._tell(setting)

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing, which Tune takes: a sweep is resumed from its result tables."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its result tables")

    def _members(self, number: int) -> set[int]:
        """The trials of one setting."""
        first = number * self.config.replicates
        return set(range(first, min(first + self.config.replicates, self._trials)))

    def _proposal(self, number: int, setting: _Setting) -> Proposal:
        seed = self.config.seed + number % self.config.replicates
        return Proposal(f"{number:05d}", 0, setting.settings | {"seed": seed})

    def _ask(self, setting: _Setting) -> None:
        """Opens a trial of the study, for the settings if there are some."""
        if setting.settings:
            self._asked.enqueue_trial(params_of(setting.settings))
        setting.trial = self._asked.ask()
        drawn = draw(setting.trial, self.config, self._trainable)
        setting.settings = setting.settings or drawn

    def _tell(self, setting: _Setting) -> None:
        verdict = self._verdict(setting)
        assert setting.trial is not None
        for name, value in verdict.attributes.items():
            setting.trial.set_user_attr(name, value)
        for name, constraint in verdict.constraints.items():
            setting.trial.set_constraint(name, constraint)
        learned = self._asked.tell(setting.trial, verdict.values, state=verdict.learned)
        self._keep(learned, verdict)

    def _add(self, setting: _Setting) -> None:
        """Puts earlier trials into the study."""
        if isinstance(self._asked.sampler, samplers.BaseGASampler):
            # Its generations are counted when a trial is asked for.
            self._ask(setting)
            self._tell(setting)
            return
        verdict = self._verdict(setting)
        trial = create_trial(
            state=verdict.learned, values=verdict.values, params=params_of(setting.settings),
            distributions=distributions(self.config, setting.settings["loss"], self._trainable),
            user_attrs=verdict.attributes, constraints=verdict.constraints,
        )  # fmt: skip
        self._asked.add_trial(trial)
        self._keep(trial, verdict)

    def _keep(self, learned: FrozenTrial, verdict: _Verdict) -> None:
        """Puts a trial that the sampler has learned from into the study."""
        trial = learned
        if verdict.state == TrialState.PRUNED:
            trial = create_trial(
                state=verdict.state, params=learned.params, distributions=learned.distributions,
                user_attrs=verdict.attributes, constraints=verdict.constraints,
            )  # fmt: skip
        self.study.add_trial(trial)
        self._on_told(trial)

    def _verdict(self, setting: _Setting) -> _Verdict:
        """What the trials that ran a setting make of it."""
        ended = [setting.outcomes[n] for n in sorted(setting.outcomes)]
        known = setting.outcomes.keys() == {KNOWN}
        attributes: dict[str, Any] = {"warm_start": True} if known else {"trials": sorted(setting.outcomes)}
        reached = [o for o in ended if o.numbers is not None]
        whole = [o for o in reached if not o.stopped]
        state = TrialState.COMPLETE if whole else TrialState.PRUNED
        numbers = [o.numbers for o in whole or reached if o.numbers is not None]
        if not numbers:
            attributes[FAILURE] = "; ".join(dict.fromkeys(o.reason for o in ended))
            return _Verdict(TrialState.FAIL, None, attributes, {})
        found = {name: [n[name] for n in numbers] for name in numbers[0]}
        means = {name: fmean(values) for name, values in found.items()}
        if not whole:
            attributes["partial"] = [dict(n) for n in numbers]
        elif len(whole) > 1:
            attributes["sd"] = {name: stdev(values) for name, values in found.items()}
        bound = self.config.min_retention
        constraints = {"min_retention": bound - means["retention"]} if bound else {}
        return _Verdict(state, [means[o] for o in self.config.objectives], attributes, constraints)


def slowness(search: SearchConfig, known: int = 0) -> str | None:
    """What is said of a sampler that keeps the driver waiting, None where it does not.

    Args:
        known: trials of earlier sweeps that it learns from.
    """
    settings = search.trials // search.replicates + known
    if search.sampler != "gp" or settings <= GP_SETTINGS:
        return None
    return (
        f"{settings} settings are many for the sampler gp: beyond {GP_SETTINGS} each takes it 0.7 s, beyond "
        "1,000 five; --sampler tpe, the default, takes 0.02 s (docs/SCALE.md)"
    )


def _sampler(search: SearchConfig, next_number: int) -> samplers.BaseSampler:
    seed = search.seed + next_number  # or a resumed sweep would draw again what it drew before
    settings = max(1, search.trials // search.replicates)
    # Twelve random ones are enough in long sweeps, too; that is what was compared (`benchmarks.search`).
    few = min(max(4, settings // 4), 12)
    population = min(50, max(4, settings // 4))
    with warnings.catch_warnings():
        # Multivariate sampling over a conditional space (group), QMC and GP are "experimental" for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if search.sampler == "qmc":
            return samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        if search.sampler == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=few, warn_independent_sampling=False)
        if search.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=population)
        if search.sampler == "nsga3":
            return samplers.NSGAIIISampler(seed=seed, population_size=population)
        return samplers.TPESampler(
            seed=seed,
            n_startup_trials=few,
            multivariate=True,
            group=True,
            constant_liar=search.concurrency > 1,
        )
