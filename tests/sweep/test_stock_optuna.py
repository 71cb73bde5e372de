"""Ray Tune's own OptunaSearch and ours, side by side: what goes wrong with several objectives there.

Each test shows the defect on the stock searcher first. Where Ray mends one, its test says so by failing.
"""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import tune
from ray.tune.search.optuna import OptunaSearch

import clippo.config
from clippo.sweep.mirror import Mirror
from clippo.sweep.search import Outcome, Proposal, Search
from clippo.train.loop import FAILURE
from tests.front.sweeps import OBJECTIVES

NAMES = list(OBJECTIVES.names)
SearchConfig = partial(clippo.config.SearchConfig, objectives=OBJECTIVES.names)
CONFIG = SearchConfig(trials=4, concurrency=1, sampler="random")
LOW, HIGH = {"robustness": 0.4, "retention": 0.8}, {"robustness": 0.6, "retention": 0.9}


def stock_search(storage: BaseStorage | None = None, **more: Any) -> OptunaSearch:
    sampler = optuna.samplers.RandomSampler(seed=0)
    space = {"x": FloatDistribution(0, 1)}
    return OptunaSearch(space, metric=NAMES, mode=["max", "max"], sampler=sampler, storage=storage, **more)


def stock_study(storage: BaseStorage) -> optuna.Study:
    return optuna.load_study(study_name="optuna", storage=storage)  # the name that stock has given it


def score(report: Any) -> dict[str, float] | None:
    numbers = {name: report.get(name, math.nan) for name in NAMES}
    return numbers if all(map(math.isfinite, numbers.values())) else None


def states(study: optuna.Study) -> list[TrialState]:
    return [t.state for t in study.trials]


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"robustness": 0.5}, "no finite objectives"),
        ({"robustness": 0.5, "retention": math.nan}, "no finite objectives"),
        ({FAILURE: "the loss became nan"}, "the loss became nan"),
    ],
)
def test_a_trial_without_all_objectives_fails_and_does_not_run_for_ever(
    report: dict[str, Any], reason: str
) -> None:
    storage = InMemoryStorage()
    stock, ours = stock_search(storage), Search(CONFIG, score, OBJECTIVES)
    for search in (stock, ours):
        search.suggest("ray0")
        search.on_trial_complete("ray0", report)
    assert states(stock_study(storage)) == [TrialState.RUNNING]
    assert states(ours.study) == [TrialState.FAIL]
    assert ours.study.trials[0].user_attrs[FAILURE] == reason


def test_a_trial_that_was_stopped_early_is_no_point_of_the_front() -> None:
    """At its first epoch a trial may look better than others do after their last."""
    storage = InMemoryStorage()
    stock, ours = stock_search(storage), Search(CONFIG, score, OBJECTIVES, was_stopped={"early"}.__contains__)
    for search in (stock, ours):
        for ray_id, values in {"early": HIGH, "whole": LOW}.items():
            search.suggest(ray_id)
            search.on_trial_complete(ray_id, values)
    assert states(stock_study(storage)) == [TrialState.COMPLETE, TrialState.COMPLETE]
    assert [t.values for t in stock_study(storage).best_trials] == [[0.6, 0.9]]
    assert states(ours.study) == [TrialState.PRUNED, TrialState.COMPLETE]
    assert [t.values for t in ours.study.best_trials] == [[0.4, 0.8]]
    assert ours.study.trials[0].user_attrs["partial"] == [HIGH]


def test_finished_trials_of_earlier_sweeps_can_be_taken_over() -> None:
    with pytest.raises(TypeError, match="real number, not list"):
        stock_search(points_to_evaluate=[{"x": 0.5}], evaluated_rewards=[[0.6, 0.9]])
    settings = Search(CONFIG, score, OBJECTIVES).suggest("ray0")["settings"]  # type: ignore[index]
    ours = Search(CONFIG, score, OBJECTIVES, known=[(settings, Outcome(HIGH)), (settings, Outcome(None))])
    assert states(ours.study) == [TrialState.COMPLETE, TrialState.FAIL]
    assert ours.study.trials[0].values == [0.6, 0.9]
    assert ours.study.trials[0].params["learning_rate"] == settings["learning_rate"]


def test_two_sweeps_in_one_storage_are_two_studies(tmp_path: Path) -> None:
    shared = journal(tmp_path / "stock.log")
    for _ in range(2):
        stock = stock_search(shared)
        stock.suggest("ray0")
        stock.on_trial_complete("ray0", HIGH)
    assert {s.study_name: s.n_trials for s in optuna.get_all_study_summaries(shared)} == {"optuna": 2}

    for name in ("first", "second"):
        ours = Search(CONFIG, score, OBJECTIVES, on_told=mirror(name, tmp_path).told)
        ours.suggest("ray0")
        ours.on_trial_complete("ray0", HIGH)
    mirrored = optuna.get_all_study_summaries(journal(tmp_path / "ours.log"))
    assert {s.study_name: s.n_trials for s in mirrored} == {"first": 1, "second": 1}


def test_after_the_driver_was_killed_no_trial_is_left_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage is ahead of the searcher's last snapshot: one trial has ended since, one was asked for."""
    # A Ray that an earlier test started has made its loggers quiet and its own.
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="ray")
    stock = stock_search(journal(tmp_path / "stock.log"))
    stock.suggest("ray0")
    stock.save(str(tmp_path / "snapshot"))
    stock.on_trial_complete("ray0", HIGH)
    stock.suggest("ray1")
    restored = stock_search(journal(tmp_path / "stock.log"))
    restored.restore(str(tmp_path / "snapshot"))
    restored.on_trial_complete("ray0", HIGH)  # Tune runs again what its snapshot has as running
    assert "Cannot tell a COMPLETE trial" in caplog.text, "what was found is refused, which Ray only logs"
    caplog.clear()
    assert states(stock_study(journal(tmp_path / "stock.log"))) == [TrialState.COMPLETE, TrialState.RUNNING]

    ours = Search(CONFIG, score, OBJECTIVES, on_told=mirror("sweep", tmp_path).told)
    first, second = (ours.suggest(ray_id) for ray_id in ("ray0", "ray1"))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    ours.on_trial_complete("ray0", HIGH)
    # What the result tables then say: the first has finished, the second was started.
    resumed = Search(
        CONFIG,
        score,
        OBJECTIVES,
        finished={0: (first["settings"], Outcome(HIGH))},
        unfinished=[Proposal("00001", 0, second["settings"])],
        on_told=mirror("sweep", tmp_path).told,
    )
    assert resumed.suggest("ray2") == second | {"attempt": 1}
    resumed.on_trial_complete("ray2", LOW)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    mirrored = optuna.load_study(study_name="sweep", storage=journal(tmp_path / "ours.log"))
    for study in (resumed.study, mirrored):
        assert states(study) == [TrialState.COMPLETE, TrialState.COMPLETE]
        assert [t.values for t in study.trials] == [[0.6, 0.9], [0.4, 0.8]]


def test_several_objectives_are_not_for_tune_to_know(own_ray: None, tmp_path: Path) -> None:
    """Tune itself takes one metric. Stock has its own way to name several; ours is handed a function."""

    def trial(config: dict[str, Any]) -> None:
        tune.report(HIGH)

    run_config = tune.RunConfig(name="lists", storage_path=str(tmp_path), verbose=0)
    refused = tune.TuneConfig(metric=NAMES, mode=["max", "max"], search_alg=stock_search())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`mode` parameter .* must be one of \['min', 'max'\]"):
        tune.Tuner(trial, tune_config=refused, run_config=run_config).fit()

    ours = Search(SearchConfig(trials=1), score, OBJECTIVES)
    taken = tune.TuneConfig(search_alg=ours, num_samples=-1, max_concurrent_trials=1)
    tune.Tuner(trial, tune_config=taken, run_config=run_config).fit()
    assert [t.values for t in ours.study.trials] == [[0.6, 0.9]]


def journal(file: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(file)))


def mirror(name: str, folder: Path) -> Mirror:
    """Our study of this name, copied to a storage that is shared."""
    config = SearchConfig(mirror=f"journal:{folder / 'ours.log'}")
    return Mirror(config, OBJECTIVES, name, results=f"results of {name}", report=pytest.fail)
