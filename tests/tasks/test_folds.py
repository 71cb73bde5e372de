"""What may be cross-validated, and how the seen concepts are dealt."""

from dataclasses import replace

import pytest

from clippo.errors import ConfigError
from clippo.sweep.checks import check_settings
from clippo.tasks import GenderTask
from sweeps.gender_sweep import PEOPLE, gender_sweep, tower_sweep


def test_towers_are_not_cross_validated() -> None:
    check_settings(gender_sweep())
    tower = tower_sweep()
    check_settings(tower)
    with pytest.raises(ConfigError, match=r"data\.folds is 3 with model\.trainable 'last:2'"):
        check_settings(replace(tower, data=replace(tower.data, folds=3)))


def test_each_fold_has_concepts_of_each_majority() -> None:
    task = GenderTask(PEOPLE)
    majority = task.people.found.majority
    assert [len({majority[c] for c in fold}) for fold in task.folds] == [2, 2, 2]
    assert sorted(c for fold in task.folds for c in fold) == list(task.seen)
    with pytest.raises(ConfigError, match=r"data\.folds is 12, and a fold would lack"):
        _ = GenderTask(replace(PEOPLE, folds=12)).folds
