"""The searcher alone: what it proposes and what Optuna is told."""

import math
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from clippo.config import SearchConfig
from clippo.errors import ConfigError
from clippo.sweep.search import Search
from clippo.sweep.space import params_of, settings_of
from clippo.train.loop import FAILURE

ONE_AT_A_TIME = SearchConfig(concurrency=1, trials=12, seed=5)


def score(report: Any) -> list[float] | None:
    values = [report.get("robustness"), report.get("retention")]
    return None if any(v is None or not math.isfinite(v) for v in values) else values


def drive(search: Search, n: int) -> list[dict[str, Any]]:
    proposed = []
    for i in range(n):
        config = search.suggest(f"ray{i}")
        assert isinstance(config, dict)
        proposed.append(config)
        settings = config["settings"]
        values = {"robustness": settings["learning_rate"] * 1e3, "retention": -settings["kl_weight"]}
        search.on_trial_complete(f"ray{i}", values)
    return proposed


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_seed_one_sequence(sampler: Any) -> None:
    config = SearchConfig(concurrency=1, trials=12, seed=5, sampler=sampler)
    assert drive(Search(config, score), 12) == drive(Search(config, score), 12)
    assert drive(Search(config, score), 4) != drive(Search(SearchConfig(concurrency=1, seed=6), score), 4)


def test_each_loss_has_its_own_range_of_beta() -> None:
    config = SearchConfig(
        concurrency=1, trials=60, losses=("dpo", "ipo", "cross_entropy"), beta_ipo=(0.3, 0.4)
    )
    for proposal in drive(Search(config, score), 60):
        settings = proposal["settings"]
        if settings["loss"] == "cross_entropy":
            assert settings["beta"] is None
        else:
            low, high = config.beta_ipo if settings["loss"] == "ipo" else config.beta_dpo
            assert low <= settings["beta"] <= high


def test_it_ends_after_its_trials() -> None:
    search = Search(ONE_AT_A_TIME, score)
    drive(search, 12)
    assert search.suggest("one more") == Searcher.FINISHED


@pytest.mark.parametrize(
    "report",
    [{}, {"robustness": 1.0}, {"robustness": math.nan, "retention": 1.0}, {FAILURE: "the loss became nan"}],
)
def test_a_trial_without_finite_objectives_is_told_fail(report: dict[str, Any]) -> None:
    search = Search(ONE_AT_A_TIME, score)
    search.suggest("ray0")
    search.on_trial_complete("ray0", report)
    assert [t.state for t in search.study.trials] == [TrialState.FAIL]
    assert search.study.trials[0].user_attrs[FAILURE] == report.get(FAILURE, "no finite objectives")


def test_finished_trials_come_back_and_unfinished_ones_go_first() -> None:
    before = drive(Search(ONE_AT_A_TIME, score), 6)
    started: list[tuple[str, int]] = []
    search = Search(
        ONE_AT_A_TIME,
        score,
        finished=[{"settings": p["settings"], "values": [0.5, 0.9]} for p in before[:4]]
        + [{"settings": before[4]["settings"], "values": None}],
        unfinished=[{"trial_id": "00005", "attempt": 0, "settings": before[5]["settings"]}],
        next_number=6,
        on_start=lambda trial_id, attempt, settings: started.append((trial_id, attempt)),
    )
    assert [t.state for t in search.study.trials] == [TrialState.COMPLETE] * 4 + [TrialState.FAIL]
    again = search.suggest("ray0")
    assert again == {"trial_id": "00005", "attempt": 1, "settings": before[5]["settings"]}
    fresh = search.suggest("ray1")
    assert isinstance(fresh, dict)
    assert fresh["trial_id"] == "00006"
    assert started == [("00005", 1), ("00006", 0)]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_resumed_sweep_does_not_draw_the_same_again(sampler: Any) -> None:
    config = SearchConfig(concurrency=1, trials=12, seed=5, sampler=sampler)
    before = drive(Search(config, score), 3)
    finished = [{"settings": p["settings"], "values": [0.5, 0.9]} for p in before]
    after = drive(Search(config, score, finished=finished, next_number=3), 3)
    rates = {p["settings"]["learning_rate"] for p in [*before, *after]}
    assert len(rates) == 6


def test_settings_and_parameters_are_two_spellings_of_one_thing() -> None:
    params = {"loss": "kto", "beta_kto": 0.3, "kl_weight": 2.0, "learning_rate": 1e-4, "epochs": 2}
    assert params_of(settings_of(params)) == params


def test_an_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cross_entropy, dpo, ipo, kto"):
        Search(SearchConfig(losses=("ppo",)), score).suggest("ray0")
