"""Objectives by name."""

import pytest

from clippo.config import SearchConfig, SweepConfig
from clippo.errors import ConfigError
from clippo.evaluate import Counts
from clippo.evaluate.objectives import is_maximised, share_of
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
        share_of(name, counts(40), split="validation")
