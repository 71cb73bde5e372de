"""What earlier runs of a sweep have begun, spent and left to do."""

from __future__ import annotations

from collections.abc import Mapping

from clippo.config import SweepConfig
from clippo.evaluate.objectives import Objectives
from clippo.front.counts import CONFIRM, REFERENCE
from clippo.front.points import front_of
from clippo.results import ResultStore
from clippo.sweep import confirm
from clippo.sweep.budget import Budget, ran_for
from clippo.sweep.rows import FinishedTrial, Scorer
from clippo.sweep.search import Numbers, Outcome, Proposal


def in_search(trial_id: str) -> bool:
    return not trial_id.startswith(CONFIRM)


def started_trials(store: ResultStore, sweep: str) -> dict[str, Proposal]:
    """The last attempt of each trial that has begun, by its name."""
    return {s["trial_id"]: Proposal(s["trial_id"], s["attempt"], s["settings"]) for s in store.started(sweep)}


def budget_of(
    config: SweepConfig, objectives: Objectives, untouched: Numbers, finished: Mapping[str, FinishedTrial],
    outcomes: Mapping[str, Outcome],
) -> Budget:  # fmt: skip
    """The budget after the trials of earlier runs."""
    ran = ran_for((t.started_at, t.finished_at) for t in finished.values())
    budget = Budget(config.search, objectives, untouched, ran)
    for trial_id, trial in sorted(finished.items(), key=lambda item: item[1].finished_at):
        if trial_id != REFERENCE and in_search(trial_id):
            budget.spend(trial.device_s, outcomes[trial_id].numbers, searched=trial_id.isdigit())
    return budget


def is_finished(config: SweepConfig, store: ResultStore, finished: Mapping[str, FinishedTrial]) -> bool:
    """Whether nothing is left to run, nor to show: the pictures for the report are written last."""
    if not {REFERENCE, *config.search.baselines} <= finished.keys():
        return False
    if any(in_search(i) for i in started_trials(store, config.name).keys() - finished.keys()):
        return False
    scorer, reference = Scorer(config), finished[REFERENCE].counts
    outcomes = {i: scorer.outcome(t, reference) for i, t in finished.items()}
    untouched = scorer.numbers(reference, reference)
    budget = budget_of(config, scorer.objectives, untouched, finished, outcomes)
    numbered = sum(i.isdigit() for i in finished)
    half_run = numbered % config.search.replicates > 0
    if numbered < config.search.trials and (half_run or not budget.exhausted()):
        return False
    wanted = confirm.proposals(config, front_of(store, config.name))
    return {p.trial_id for p in wanted} <= finished.keys() and store.examples(config.name).num_rows > 0
