"""Which settings are trained once more, and how."""

from dataclasses import replace

import pytest

from clippo.config import SearchConfig, SweepConfig
from clippo.front.counts import REFERENCE
from clippo.front.front import Front
from clippo.front.points import read_front
from clippo.sweep.confirm import proposals, to_confirm
from tests.front.sweeps import OBJECTIVES, make_sweep


@pytest.fixture(scope="module")
def front() -> Front:
    sweep = make_sweep(60)
    return read_front("made", sweep.trial_table, sweep.evals, OBJECTIVES, min_retention=0.97)


def test_the_recommended_settings_come_first_and_none_comes_twice(front: Front) -> None:
    assert front.recommended.trial_id != REFERENCE
    everything = [p.trial_id for p in to_confirm(front, 1000)]
    assert everything[0] == front.recommended.trial_id
    assert sorted(everything) == sorted({p.trial_id for p in front.front} - {REFERENCE})
    assert [[p.trial_id for p in to_confirm(front, n)] for n in range(4)] == [
        everything[:n] for n in range(4)
    ]
    end = max((p for p in front.front if p.trial_id != everything[0]), key=lambda p: p.goal)
    elsewhere = replace(front, knee=end)
    assert [p.trial_id for p in to_confirm(elsewhere, 2)] == [everything[0], end.trial_id]


def test_they_are_trained_with_a_seed_that_the_search_did_not_use(front: Front) -> None:
    config = SweepConfig(search=SearchConfig(seed=4, replicates=3, confirm=3))
    for proposal, point in zip(proposals(config, front), to_confirm(front, 3), strict=True):
        assert proposal.trial_id == f"confirm-{point.trial_id}"
        assert proposal.settings["seed"] == 7, "the search has used 4, 5 and 6"
        assert {k: v for k, v in proposal.settings.items() if k != "seed"} == {
            k: v for k, v in ({"beta": None} | point.settings).items() if k != "seed"
        }
