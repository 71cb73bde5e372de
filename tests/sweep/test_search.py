"""The searcher alone: what it proposes and what Optuna is told."""

import math
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import optuna
import pytest
from optuna import samplers
from optuna.trial import TrialState
from ray.tune.search import Searcher

import clippo.config
from clippo.errors import ConfigError
from clippo.sweep.budget import Budget, ran_for
from clippo.sweep.mirror import Mirror
from clippo.sweep.search import GP_SETTINGS, Outcome, Proposal, Search, _sampler, slowness
from clippo.sweep.space import fits, params_of, settings_of
from clippo.train.loop import FAILURE
from tests.front.sweeps import OBJECTIVES

SAMPLERS = get_args(get_type_hints(clippo.config.SearchConfig)["sampler"])
SearchConfig = partial(clippo.config.SearchConfig, objectives=OBJECTIVES.names)
ONE_AT_A_TIME = SearchConfig(concurrency=1, trials=12, seed=5)


def score(report: Any) -> dict[str, float] | None:
    numbers = {"robustness": report.get("robustness"), "retention": report.get("retention")}
    return None if any(v is None or not math.isfinite(v) for v in numbers.values()) else numbers


def reached(settings: dict[str, Any]) -> dict[str, float]:
    """A trial's numbers: smooth in its settings, with a trade-off."""
    kept = 1 / (1 + 1e3 * settings["learning_rate"] / settings["kl_weight"])
    return {"robustness": 1 - kept**2 + 1e-3 * settings.get("seed", 0), "retention": kept}


def drive(search: Search, n: int) -> list[dict[str, Any]]:
    proposed = []
    for i in range(n):
        config = search.suggest(f"ray{i}")
        assert isinstance(config, dict)
        proposed.append(config)
        search.on_trial_complete(f"ray{i}", reached(config["settings"]))
    return proposed


def finished_of(proposed: list[dict[str, Any]]) -> dict[int, tuple[dict[str, Any], Outcome]]:
    return {int(p["trial_id"]): (p["settings"], Outcome(reached(p["settings"]))) for p in proposed}


def test_the_samplers_are_what_they_are_called() -> None:
    kinds = {
        "tpe": samplers.TPESampler, "nsga2": samplers.NSGAIISampler, "nsga3": samplers.NSGAIIISampler,
        "gp": samplers.GPSampler, "qmc": samplers.QMCSampler, "random": samplers.RandomSampler,
    }  # fmt: skip
    assert set(SAMPLERS) == set(kinds)
    for name, kind in kinds.items():
        assert type(_sampler(SearchConfig(sampler=cast("Any", name)), 0)) is kind
    assert SearchConfig().sampler == "tpe"
    assert SearchConfig().confirm == 1, "by default the best is trained once more"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_seed_one_sequence(sampler: Any) -> None:
    config = SearchConfig(concurrency=1, trials=10, seed=5, sampler=sampler)
    first = drive(Search(config, score, OBJECTIVES), 10)
    assert drive(Search(config, score, OBJECTIVES), 10) == first
    other = SearchConfig(concurrency=1, trials=10, seed=6, sampler=sampler)
    assert drive(Search(other, score, OBJECTIVES), 4) != first[:4]
    assert len({str(p["settings"]) for p in first}) > 8, "it does not stay where it began"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_sampler_knows_what_was_found_and_draws_something_new(sampler: Any) -> None:
    config = SearchConfig(concurrency=1, trials=12, seed=5, sampler=sampler)
    whole = Search(config, score, OBJECTIVES)
    before = drive(whole, 8)
    search = Search(config, score, OBJECTIVES, finished=finished_of(before))
    known = [(t.state, t.params, t.values) for t in search.study.trials]
    assert known == [(t.state, t.params, t.values) for t in whole.study.trials]
    after = drive(search, 4)
    assert [p["trial_id"] for p in after] == ["00008", "00009", "00010", "00011"]
    assert len({str(p["settings"]) for p in [*before, *after]}) > 8
    assert all(t.state == TrialState.COMPLETE for t in search.study.trials)


def test_each_loss_has_its_own_range_of_beta() -> None:
    config = SearchConfig(
        concurrency=1, trials=60, losses=("dpo", "ipo", "cross_entropy"), beta_ipo=(0.3, 0.4)
    )
    for proposal in drive(Search(config, score, OBJECTIVES), 60):
        settings = proposal["settings"]
        if settings["loss"] == "cross_entropy":
            assert settings["beta"] is None
        else:
            low, high = config.beta_ipo if settings["loss"] == "ipo" else config.beta_dpo
            assert low <= settings["beta"] <= high


def test_of_the_searcher_tune_keeps_nothing(tmp_path: Path) -> None:
    search = Search(SearchConfig(trials=2), score, OBJECTIVES)
    drive(search, 1)
    search.save_to_dir(str(tmp_path), "session")
    assert not list(tmp_path.iterdir())


def test_it_ends_after_its_trials() -> None:
    search = Search(ONE_AT_A_TIME, score, OBJECTIVES)
    drive(search, 12)
    assert search.suggest("one more") == Searcher.FINISHED


@pytest.mark.parametrize(
    "report",
    [{}, {"robustness": 1.0}, {"robustness": math.nan, "retention": 1.0}, {FAILURE: "the loss became nan"}],
)
def test_a_trial_without_finite_objectives_is_told_fail(report: dict[str, Any]) -> None:
    search = Search(ONE_AT_A_TIME, score, OBJECTIVES)
    search.suggest("ray0")
    search.on_trial_complete("ray0", report)
    assert [t.state for t in search.study.trials] == [TrialState.FAIL]
    assert search.study.trials[0].user_attrs[FAILURE] == report.get(FAILURE, "no finite objectives")


def test_a_trial_that_was_stopped_is_told_pruned_with_what_it_reached() -> None:
    search = Search(ONE_AT_A_TIME, score, OBJECTIVES, was_stopped={"ray1"}.__contains__)
    drive(search, 2)
    whole, stopped = search.study.trials
    assert (whole.state, stopped.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert stopped.values is None
    assert stopped.user_attrs["partial"][0].keys() == {"robustness", "retention"}
    assert search.study.best_trials == [whole]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_stopped_trial_had_reached_teaches_the_sampler(sampler: Any) -> None:
    config = SearchConfig(concurrency=1, trials=12, seed=5, sampler=sampler, min_retention=0.5)
    stopped = Search(config, score, OBJECTIVES, was_stopped=lambda trial_id: True)
    whole = Search(config, score, OBJECTIVES)
    proposed = drive(stopped, 8)
    assert proposed == drive(whole, 8), "the sampler sees the same values"
    assert {t.state for t in stopped.study.trials} == {TrialState.PRUNED}
    again = finished_of(proposed)
    told = {n: (s, Outcome(o.numbers, stopped=True)) for n, (s, o) in again.items()}
    resumed = Search(config, score, OBJECTIVES, finished=told)
    attributes = [(t.state, t.params, t.user_attrs, t.constraints) for t in stopped.study.trials]
    assert [(t.state, t.params, t.user_attrs, t.constraints) for t in resumed.study.trials] == attributes
    assert drive(resumed, 4) == drive(Search(config, score, OBJECTIVES, finished=again), 4)


def test_finished_trials_come_back_and_unfinished_ones_go_first() -> None:
    before = drive(Search(ONE_AT_A_TIME, score, OBJECTIVES), 6)
    started: list[tuple[str, int]] = []
    finished = finished_of(before[:4]) | {4: (before[4]["settings"], Outcome(None, reason="diverged"))}
    search = Search(
        ONE_AT_A_TIME,
        score,
        OBJECTIVES,
        finished=finished,
        unfinished=[Proposal("00005", 0, before[5]["settings"])],
        others=[Proposal("cross_entropy", 0, {"loss": "cross_entropy"})],
        on_start=lambda trial_id, attempt, settings: started.append((trial_id, attempt)),
    )
    states = [t.state for t in search.study.trials]
    assert states == [TrialState.COMPLETE] * 4 + [TrialState.FAIL], "what runs has not ended"
    again = search.suggest("ray0")
    assert again == {"trial_id": "00005", "attempt": 1, "settings": before[5]["settings"]}
    assert search.suggest("ray1") == {
        "trial_id": "cross_entropy",
        "attempt": 0,
        "settings": {"loss": "cross_entropy"},
    }
    fresh = search.suggest("ray2")
    assert isinstance(fresh, dict)
    assert started == [("00005", 1), ("cross_entropy", 0), ("00006", 0)]
    search.on_trial_complete("ray0", reached(before[5]["settings"]))
    search.on_trial_complete("ray1", {})
    [ended] = search.study.trials[5:]
    assert (ended.params, ended.state) == (params_of(before[5]["settings"]), TrialState.COMPLETE)


# ---- replicates


REPLICATED = SearchConfig(concurrency=1, trials=6, replicates=3, seed=5)


def test_replicates_share_their_settings_and_optuna_is_told_their_mean() -> None:
    search = Search(REPLICATED, score, OBJECTIVES)
    proposed = drive(search, 6)
    assert [p["settings"]["seed"] for p in proposed] == [5, 6, 7, 5, 6, 7]
    plain = [{k: v for k, v in p["settings"].items() if k != "seed"} for p in proposed]
    assert plain[0] == plain[1] == plain[2] != plain[3]
    assert search.suggest("one more") == Searcher.FINISHED
    assert len(search.study.trials) == 2
    first = search.study.trials[0]
    assert first.values == pytest.approx(list(reached(proposed[1]["settings"]).values()))
    assert first.user_attrs["sd"] == pytest.approx({"robustness": 1e-3, "retention": 0.0})
    assert first.user_attrs["trials"] == [0, 1, 2]


def test_a_failed_replicate_does_not_sink_its_settings() -> None:
    search = Search(REPLICATED, score, OBJECTIVES, was_stopped={"ray1"}.__contains__)
    configs = [search.suggest(f"ray{i}") for i in range(3)]
    search.on_trial_complete("ray0", {FAILURE: "out of memory"})
    search.on_trial_complete("ray1", reached(configs[1]["settings"]))  # type: ignore[index]
    assert search.study.trials == [], "it has not ended"
    numbers = reached(configs[2]["settings"])  # type: ignore[index]
    search.on_trial_complete("ray2", numbers)
    assert search.study.trials[0].values == list(numbers.values())


def test_a_resume_completes_the_replicates_that_were_begun() -> None:
    before = drive(Search(REPLICATED, score, OBJECTIVES), 4)
    search = Search(
        REPLICATED,
        score,
        OBJECTIVES,
        finished=finished_of([before[0], before[1]]),
        unfinished=[Proposal("00003", 0, before[3]["settings"])],
    )
    assert search.study.trials == []
    proposed = drive(search, 4)
    assert sorted((p["trial_id"], p["attempt"]) for p in proposed) == [
        ("00002", 0), ("00003", 1), ("00004", 0), ("00005", 0),
    ]  # fmt: skip
    assert {p["settings"]["seed"] for p in proposed if p["trial_id"] != "00003"} == {6, 7}
    assert search.suggest("one more") == Searcher.FINISHED
    assert [t.state for t in search.study.trials] == [TrialState.COMPLETE] * 2
    assert search.study.trials[0].params == params_of(before[0]["settings"])


def test_fewer_trials_than_were_begun_still_end_with_whole_settings() -> None:
    before = drive(Search(REPLICATED, score, OBJECTIVES), 4)
    fewer = SearchConfig(concurrency=1, trials=4, replicates=3, seed=5)
    running = [Proposal(f"0000{n}", 0, before[3]["settings"] | {"seed": 5 + n % 3}) for n in (4, 5)]
    search = Search(fewer, score, OBJECTIVES, finished=finished_of(before), unfinished=running)
    drive(search, 2)
    assert search.suggest("one more") == Searcher.FINISHED
    assert [t.state for t in search.study.trials] == [TrialState.COMPLETE] * 2
    assert search.study.trials[1].user_attrs["trials"] == [3, 4, 5]


def test_replicates_are_not_stopped_one_by_one() -> None:
    with pytest.raises(ConfigError, match="1 with stopping"):
        SearchConfig(stopping="no_better", replicates=2)


# ---- objectives, constraint, budget


def test_objectives_that_are_minimised_and_three_of_them() -> None:
    config = SearchConfig(
        trials=4, concurrency=1, objectives=("robustness", "attack_success_rate:attacked/seen", "device_s")
    )
    directions = [d.name for d in Search(config, score, OBJECTIVES).study.directions]
    assert directions == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]


@pytest.mark.parametrize("objectives", [("robustness",), ("a", "b", "c", "d"), ("retention", "retention")])
def test_two_or_three_objectives(objectives: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="two or three different ones"):
        SearchConfig(objectives=objectives)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "gp"])
def test_the_sampler_knows_the_least_retention(sampler: Any) -> None:
    trials = 30 if sampler == "gp" else 60  # it thinks longer, and needs fewer

    def kept(bound: float) -> list[float]:
        config = SearchConfig(
            concurrency=1, trials=trials, seed=1, sampler=sampler, min_retention=bound, losses=("dpo",)
        )
        search = Search(config, score, OBJECTIVES)
        proposed = drive(search, trials)
        for trial, proposal in zip(search.study.trials, proposed, strict=True):
            retention = reached(proposal["settings"])["retention"]
            assert trial.constraints == ({"min_retention": bound - retention} if bound else {})
        feasible = [t.values[1] >= bound for t in search.study.best_trials]
        assert all(feasible)
        return [reached(p["settings"])["retention"] for p in proposed[trials // 2 :]]

    bound = 0.97
    free, bounded = (sum(r >= bound for r in kept(b)) for b in (0.0, bound))
    assert bounded > free + 3, "more of the later trials keep to the bound"


def test_the_least_retention_holds_for_trials_that_come_back() -> None:
    config = SearchConfig(concurrency=1, trials=4, min_retention=0.9)
    before = drive(Search(config, score, OBJECTIVES), 3)
    again = Search(config, score, OBJECTIVES, finished=finished_of(before))
    assert [t.constraints for t in again.study.trials] == [
        {"min_retention": 0.9 - reached(p["settings"])["retention"]} for p in before
    ]


UNTOUCHED = {"robustness": 0.2, "retention": 1.0}


def test_device_hours_and_patience_run_out() -> None:
    budget = Budget(SearchConfig(device_hours=1.0), OBJECTIVES, UNTOUCHED)
    budget.spend(3000, None)
    assert budget.exhausted() is None
    budget.spend(700, {"robustness": 0.5, "retention": 0.9})
    assert budget.exhausted() == "1.03 of 1 device-hours are spent"

    patient = Budget(SearchConfig(patience=2), OBJECTIVES, UNTOUCHED)
    for numbers in ({"robustness": 0.5, "retention": 0.9}, {"robustness": 0.4, "retention": 0.9}):
        patient.spend(1, numbers)
    assert patient.exhausted() is None
    patient.spend(1, {"robustness": 0.6, "retention": 0.9})  # it grows again
    patient.spend(1, None)
    patient.spend(1, {"robustness": 0.6, "retention": 0.9})
    assert patient.exhausted() == "the hypervolume has not grown for 2 trials"
    patient = Budget(SearchConfig(patience=1), OBJECTIVES, UNTOUCHED)
    patient.spend(1, {"robustness": 0.9, "retention": 1.0}, searched=False)  # it is only compared with
    assert patient.exhausted() is None
    patient.spend(1, {"robustness": 0.5, "retention": 0.9})  # and does not hide what the search gains
    assert patient.exhausted() is None


def test_hours_go_on_in_a_resumed_sweep() -> None:
    config = SearchConfig(wall_hours=2.0)
    assert Budget(config, OBJECTIVES, UNTOUCHED, timedelta(hours=1.9)).exhausted() is None
    assert Budget(config, OBJECTIVES, UNTOUCHED, timedelta(hours=2)).exhausted() == "2 hours are over"
    noon = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
    minutes = [(0, 10), (2, 5), (11, 20), (300, 310), (305, 330)]  # beside each other, and after a pause
    trials = [(noon + timedelta(minutes=a), noon + timedelta(minutes=b)) for a, b in minutes]
    assert ran_for(trials[::-1]) == timedelta(minutes=50)
    assert ran_for([]) == timedelta()


def test_a_spent_budget_ends_the_search_but_not_in_the_middle_of_replicates() -> None:
    reasons: list[str | None] = [None]
    search = Search(REPLICATED, score, OBJECTIVES, exhausted=lambda: reasons[-1])
    drive(search, 1)
    reasons.append("enough")
    drive(search, 2)
    assert search.suggest("one more") == Searcher.FINISHED
    assert [t.state for t in search.study.trials] == [TrialState.COMPLETE]
    assert search.ended == "enough"


# ---- other sweeps, other programs


def test_trials_of_other_sweeps_teach_the_sampler() -> None:
    config = SearchConfig(concurrency=1, trials=12, seed=5)
    known = list(finished_of(drive(Search(config, score, OBJECTIVES), 12)).values())
    search = Search(config, score, OBJECTIVES, known=known)
    assert len(search.study.trials) == 12
    fresh = search.suggest("ray0")
    assert isinstance(fresh, dict)
    assert fresh["trial_id"] == "00000"
    assert fresh != Search(config, score, OBJECTIVES).suggest("ray0"), (
        "not the first random draw: there is enough to model"
    )


def test_settings_of_another_search_may_not_fit() -> None:
    config = SearchConfig(kl_weight=(0.1, 10.0), losses=("dpo", "ipo"))
    settings = {"loss": "dpo", "beta": 0.1, "kl_weight": 1.0, "learning_rate": 1e-4, "epochs": 2, "seed": 3}
    assert fits(settings, config, "image")
    assert not fits(settings | {"kl_weight": 30.0}, config, "image")
    assert not fits(settings | {"loss": "kto"}, config, "image")
    assert not fits(settings, config, "transform"), "it has no orthogonality"


@pytest.mark.parametrize("kind", ["sqlite:///{}", "journal:{}"])
def test_a_mirror_shows_what_the_study_knows(kind: str, tmp_path: Path) -> None:
    url = kind.format(tmp_path / "study")
    config = SearchConfig(concurrency=1, trials=4, mirror=url, min_retention=0.5)
    said: list[str] = []
    storage = (
        url
        if "sqlite" in url
        else optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "study"))
        )
    )

    def mirrored() -> list[Any]:
        shown = optuna.load_study(study_name="night", storage=storage)
        assert shown.metric_names == ["robustness", "retention"]
        return [(t.state, t.params, t.values, t.constraints) for t in shown.trials]

    search = Search(
        config, score, OBJECTIVES, on_told=Mirror(config, OBJECTIVES, "night", "results", said.append).told
    )
    before = drive(search, 3)
    assert mirrored() == [(t.state, t.params, t.values, t.constraints) for t in search.study.trials]
    # A resumed sweep tells all again, and nothing is there twice.
    again = Mirror(config, OBJECTIVES, "night", "results", said.append)
    search = Search(config, score, OBJECTIVES, finished=finished_of(before), on_told=again.told)
    drive(search, 1)
    assert mirrored() == [(t.state, t.params, t.values, t.constraints) for t in search.study.trials]
    with pytest.raises(ConfigError, match="another origin"):
        Mirror(config, OBJECTIVES, "night", "other results", said.append)
    assert not said


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("sqlite:////nowhere/at/all.db", "unable to open"),
        ("nonsense", "journal:FILE or a database URL"),
        ("postgresql://user:hunter2@localhost/db", "carries a password"),
        ("postgresql://localhost/db?password=hunter2", "carries a password"),
    ],
)
def test_a_mirror_that_cannot_be_used(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        Mirror(SearchConfig(mirror=url), OBJECTIVES, "night", "results", print)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_mirror_that_fails_later_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    config = SearchConfig(concurrency=1, trials=4, mirror=f"sqlite:///{tmp_path / 'study.db'}")
    search = Search(
        config, score, OBJECTIVES, on_told=Mirror(config, OBJECTIVES, "night", "results", said.append).told
    )
    drive(search, 1)
    optuna.delete_study(study_name="night", storage=config.mirror)
    drive(search, 3)
    assert len(said) == 1
    assert "no longer written" in said[0]


def test_settings_and_parameters_are_two_spellings_of_one_thing() -> None:
    params = {"loss": "kto", "beta_kto": 0.3, "kl_weight": 2.0, "learning_rate": 1e-4, "epochs": 2}
    assert params_of(settings_of(params)) == params


def test_an_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cross_entropy, dpo, ipo, kto"):
        Search(SearchConfig(losses=("ppo",)), score, OBJECTIVES).suggest("ray0")


def test_a_sampler_that_keeps_the_driver_waiting_is_told_of() -> None:
    gp = SearchConfig(sampler="gp", trials=GP_SETTINGS)
    assert slowness(gp) is None
    assert "101 settings are many for the sampler gp" in str(slowness(gp, known=1))
    assert slowness(SearchConfig(sampler="gp", trials=2 * GP_SETTINGS, replicates=2)) is None
    assert slowness(SearchConfig(trials=100 * GP_SETTINGS)) is None
