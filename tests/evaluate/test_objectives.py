"""Objectives by name."""

import dataclasses
import json
import math

import numpy as np
import pytest

from clippo.config import SearchConfig, SweepConfig
from clippo.errors import ConfigError
from clippo.evaluate import Counts
from clippo.evaluate.objectives import MEASURES, Goal, Objectives, is_maximised, share_of
from clippo.evaluate.rankings import Ranking
from clippo.evaluate.words import Words
from clippo.sweep.rows import Scorer


def counts(correct: int, fooled: int = 0) -> list[Counts]:
    names = ("attacked/seen", "attacked/held_out", "clean/seen", "clean/held_out", "reading/held_out")
    return [
        Counts(
            eval_set=f"validation/{n}", variant="averaged", n_correct=correct, n_total=100, n_fooled=fooled
        )
        for n in names
    ]


def test_any_measured_share_and_the_cost_can_be_objectives() -> None:
    names = ("accuracy:reading/held_out", "attack_success_rate:attacked/seen", "device_s")
    scorer = Scorer(SweepConfig(search=SearchConfig(objectives=names)))
    numbers = scorer.numbers(counts(40, 30), counts(50), device_s=12.5)
    assert numbers == {
        "robustness": 0.4, "retention": pytest.approx(0.8), "device_s": 12.5,
        "accuracy:reading/held_out": 0.4, "attack_success_rate:attacked/seen": 0.3,
    }  # fmt: skip
    assert [is_maximised(n) for n in names] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("accuracy:clean/unseen", "no evaluation set 'clean/unseen'; the sets are: validation/attacked"),
        (
            "accuracy",
            "must be one of: robustness, retention, device_s, accuracy:SET, attack_success_rate:SET",
        ),
        ("speed:clean/seen", "must be one of"),
    ],
)
def test_an_objective_that_is_none(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        share_of(name, counts(40), split="validation", names=("robustness", "retention"))


@pytest.mark.parametrize("name", MEASURES)
def test_a_gain_is_1_at_best_and_rises_with_what_is_better(name: str) -> None:
    measure = MEASURES[name]
    values = np.linspace(0, 1, 11)
    gains = measure.gain(values)
    assert measure.value(gains) == pytest.approx(values)
    assert (np.diff(gains) > 0).all() == measure.is_maximised
    assert measure.gain(1.0 if measure.is_maximised else 0.0) == 1.0
    assert gains.min() >= 0


def ranking(groups: list[int], k: int) -> Ranking:
    return Ranking(
        query="a", k=k, pictures=tuple(range(len(groups))), groups=tuple(groups), group_names=("m", "f"),
        pool=(4, 4),
    )  # fmt: skip


def test_goals_of_every_measure() -> None:
    measured = [
        Counts(eval_set=f"test/{n}", variant="last", n_correct=c, n_total=10, n_fooled=f, rankings=r)
        for n, c, f, r in (
            ("a", 5, 1, (ranking([0, 0, 1, 1], 2), ranking([0, 1, 1, 1], 2))), ("b", 8, 3, ()),
            ("c", 5, 1, (ranking([1, 0, 1, 1], 2),)),
        )
    ]  # fmt: skip

    def value(measure: str, *sets: str) -> float:
        own = Objectives(goal=Goal(name="it", measure=measure, sets=sets), retention_sets=("b",))
        return own.values(measured, measured, split="test")["it"]

    assert value("right", "a", "b") == 13 / 20
    assert value("fooled", "a", "b") == 4 / 20
    # One group has all of the first top 2, both have half of the second; of several sets the worst counts.
    assert value("max_skew", "a") == pytest.approx((math.log(2) + 0) / 2) == value("max_skew", "a", "c")
    assert value("max_skew", "c") == 0
    with pytest.raises(ConfigError, match="no pictures of 'test/b' are ranked; leave it out of goal_sets"):
        value("max_skew", "a", "b")


def test_counts_are_plain_and_back() -> None:
    made = Counts(
        eval_set="a", variant="b", n_correct=1, n_total=2, n_fooled=0, rankings=(ranking([0, 1], 1),)
    )
    assert Counts.of(dataclasses.asdict(made)) == made


def test_objectives_of_stored_configurations() -> None:
    goal = Goal(name="skew", measure="max_skew", sets=("a",))
    own = Objectives(goal=goal, retention_sets=("b", "c"))
    kept = json.loads(json.dumps({"objectives": own.to_json()}))
    assert Objectives.of(kept) == own
    old = {"robustness_sets": ["attacked/seen"], "retention_sets": ["clean/seen"], "task": "typographic"}
    first = Objectives.of(old)
    assert first.names == ("robustness", "retention")
    assert (first.goal.measure, first.sets) == ("right", ("attacked/seen", "clean/seen"))
    assert Words.of(old).goal == "robustness"
    words = Words(task="t", goal="g", axis="x", heading="h", short="s", columns=(("a", "b", "c"),))
    assert Words.of(json.loads(json.dumps({"words": words.to_json()}))) == words
