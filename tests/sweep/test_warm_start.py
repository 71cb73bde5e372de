"""What a sampler is told of earlier sweeps, read from stores."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clippo.config import SearchConfig, SweepConfig
from clippo.errors import ConfigError
from clippo.evaluate import Objectives
from clippo.front.points import front_of
from clippo.results import ResultStore
from clippo.sweep.stored import is_resumed
from clippo.sweep.warm_start import known_trials
from clippo.tasks import objectives_of, resolved
from tests.front.sweeps import CONFIG, make_sweep

WIDE = SearchConfig(
    beta_dpo=(1e-3, 10.0),
    beta_ipo=(1e-3, 10.0),
    beta_kto=(1e-3, 10.0),
    kl_weight=(1e-3, 100.0),
    learning_rate=(1e-6, 1.0),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    """A store with a sweep of 20 trials, of which one failed, and one of 8."""
    made = ResultStore(tmp_path_factory.mktemp("earlier"))
    make_sweep(20).write(made, "first")
    make_sweep(8, seed=1).write(made, "second")
    return made


def config(*warm_start: str, search: SearchConfig = WIDE, results: str = "./results") -> SweepConfig:
    return SweepConfig(name="first", results=results, search=replace(search, warm_start=warm_start))


def test_a_sweep_is_known_by_what_its_trials_reached(store: ResultStore) -> None:
    known, left_out = known_trials(config(f"{store.uri}/first"))
    assert (len(known), left_out) == (20, 0), "baselines and the untouched model are no trials of a search"
    reached = {p.trial_id: p for p in front_of(store, "first").points if p.variant == "averaged"}
    for n, (settings, outcome) in enumerate(known):
        if n == 16:
            assert (outcome.numbers, outcome.reason[:8]) == (None, "the loss")
            continue
        point = reached[f"{n:05d}"]
        assert {k: settings[k] for k in point.settings} == point.settings
        assert outcome.numbers is not None
        found = (outcome.numbers["robustness"], outcome.numbers["retention"])
        assert found == pytest.approx((point.goal, point.retention))


def test_a_whole_store_but_never_the_own_sweep(store: ResultStore) -> None:
    assert len(known_trials(config(store.uri))[0]) == 28
    assert len(known_trials(config(store.uri, results=store.uri))[0]) == 8


def test_what_this_search_could_not_draw_is_left_out(store: ResultStore) -> None:
    narrow = replace(WIDE, kl_weight=(0.1, 1.0))
    known, left_out = known_trials(config(store.uri, search=narrow))
    assert 0 < len(known) < 28
    assert len(known) + left_out == 28
    assert all(settings["kl_weight"] <= 1 for settings, _ in known)


def test_what_cannot_teach_anything_is_refused(store: ResultStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="where there is no sweep; give STORE or STORE/SWEEP"):
        known_trials(config(str(tmp_path)))
    other = ResultStore(tmp_path)
    other.write_config("other", {**CONFIG, "task": "gender"})
    with pytest.raises(ConfigError, match="sweep 'other', whose task is 'gender'; it must be 'typographic'"):
        known_trials(config(f"{tmp_path}/other"))
    other.write_config("transform", {**CONFIG, "model": {"trainable": "transform"}})
    with pytest.raises(ConfigError, match="trained 'transform', and this one trains 'last:"):
        known_trials(config(f"{tmp_path}/transform"))


def first_version(config: SweepConfig) -> dict[str, Any]:
    """A configuration as the first version kept it, when there was one task."""
    kept = json.loads(json.dumps(dataclasses.asdict(resolved(config))))
    del kept["search"]["pairs"]
    return kept | {"robustness_sets": kept.pop("goal_sets")}


def test_a_sweep_of_the_first_version_is_the_same_sweep(tmp_path: Path) -> None:
    store, config = ResultStore(tmp_path), resolved(SweepConfig(name="old"))
    assert not is_resumed(store, config)
    store.write_config("old", first_version(config))
    assert is_resumed(store, config)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {}\nmy {}\n")
    in_place = dataclasses.replace(config, model=dataclasses.replace(config.model, prompt="a {}\nmy {}"))
    kept = first_version(config)
    store.write_config("prompted", {**kept, "model": {**kept["model"], "prompt": str(prompts)}})
    assert is_resumed(store, dataclasses.replace(in_place, name="prompted")), "its path was kept before"
    less_memory = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=8))
    assert is_resumed(store, less_memory), "what is said to do where memory is used up"
    other = dataclasses.replace(config, goal_sets=("attacked/seen",))
    with pytest.raises(ConfigError, match="with another goal_sets"):
        is_resumed(store, other)
    own = Objectives.of(store.config("old") or {})
    assert own == objectives_of(config)
