"""What evaluation counts."""

import dataclasses

import pytest

from clippo.config import TrainConfig
from clippo.model import ClipModel, policy_of
from clippo.prepared import PreparedSet
from clippo.train import evaluate_reference, measure
from clippo.train.step import Frozen


def test_a_clean_twin_is_judged_against_the_word_and_never_fooled(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen
) -> None:
    (attacked,) = (s for s in small_set.evaluation if s.name == "test/attacked/seen")
    pairwise = dataclasses.replace(attacked, pairwise=True)
    twins = dataclasses.replace(pairwise, name="test/clean/seen")
    prepared = dataclasses.replace(small_set, evaluation=(pairwise, twins))
    config = TrainConfig(precision="fp32")
    word, clean = evaluate_reference(policy_of(clip, "last:2"), prepared, frozen, config)
    assert 0 < word.n_fooled == word.n_total - word.n_correct, "one of the two, always"
    assert (clean.n_correct, clean.n_fooled) == (word.n_correct, 0)


def test_a_set_is_counted_alike_in_one_batch_and_in_many(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = policy_of(clip, "last:2"), TrainConfig(precision="fp32")
    expected = evaluate_reference(policy, small_set, frozen, config)
    rows = small_set.evaluation[0].rows
    assert 7 < len(rows) < measure.EVAL_BYTES // rows.inputs.bytes_of_one, "one batch"
    monkeypatch.setattr(measure, "EVAL_BYTES", 7 * rows.inputs.bytes_of_one)
    assert evaluate_reference(policy, small_set, frozen, config) == expected
