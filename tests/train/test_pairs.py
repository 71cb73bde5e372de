"""Preference pairs: two cells of the table of pictures by captions, whatever a task makes of that."""

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clippo.errors import ConfigError
from clippo.model import ClipModel, policy_of
from clippo.prepared import PreparedSet
from clippo.tasks import TASKS, TypographicTask
from clippo.tasks.base import PairTable, TrainRows
from clippo.train import batches
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.step import Batch, Frozen, class_logps, preference_step

CPU = torch.device("cpu")
NEAR = np.array([0, 3, 4])  # the captions that the KL term of some pairs is over


class Mixed(TypographicTask):
    """Pairs of every kind: of captions, of pictures, and both after another."""

    pair_kinds = ("captions", "pictures", "both")

    @staticmethod
    def pairs(kind: str, train: Mapping[str, TrainRows]) -> PairTable:
        clean, attacked = train["train/clean"], train["train/attacked"]
        ones, n = np.ones(len(clean), dtype=np.int64), len(clean)
        # The same picture in all three places; a clean over an attacked picture for one caption.
        captions = (clean.numbers, 0 * ones, clean.numbers, ones, clean.numbers)
        pictures = (clean.numbers, 2 * ones, attacked.numbers[::-1], 2 * ones, clean.numbers)
        chosen = {"captions": [captions], "pictures": [pictures], "both": [captions, pictures]}[kind]
        columns = [np.concatenate(c) for c in zip(*chosen, strict=True)]
        names = ("picture_w", "caption_w", "picture_l", "caption_l", "clean")
        assert attacked.first == n
        near = NEAR if kind == "both" else None
        return PairTable(captions=clean.candidates, **dict(zip(names, columns, strict=True)), near=near)


@pytest.fixture
def mixed(small_set: PreparedSet, monkeypatch: pytest.MonkeyPatch) -> PreparedSet:
    monkeypatch.setitem(TASKS, "mixed", Mixed)
    return dataclasses.replace(small_set, task="mixed")


def one_batch(pairs: Pairs) -> tuple[Batch, torch.Tensor]:
    """All pairs in one batch, and their order."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return next(epoch_batches(pairs, len(pairs), 0, 0, 0, 1, CPU)), order


@pytest.mark.parametrize(("kind", "blocks"), [("captions", 1), ("pictures", 2), ("both", 2)])
def test_a_batch_holds_each_picture_once_where_all_pairs_share_it(
    kind: str, blocks: int, mixed: PreparedSet, frozen: Frozen
) -> None:
    pairs = Pairs.of(mixed, frozen, kind)
    batch, order = one_batch(pairs)
    assert len(batch.inputs) == blocks * len(pairs)
    table = mixed.pairs(kind)
    rows = [data.rows for data in mixed.train.values()]
    everything = torch.cat([r.inputs(range(len(r))) for r in rows])
    held = batch.inputs.chunk(blocks)
    for place, column in zip(batch.layout, (table.clean, table.picture_w, table.picture_l), strict=True):
        assert torch.equal(held[place], everything[torch.from_numpy(column)[order]])


@pytest.mark.parametrize("kind", ["captions", "pictures", "both"])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_loss_is_that_of_the_cells(
    kind: str, loss: str, mixed: PreparedSet, frozen: Frozen, clip: ClipModel
) -> None:
    pairs, table = Pairs.of(mixed, frozen, kind), mixed.pairs(kind)
    batch, _ = one_batch(pairs)
    policy = policy_of(clip, "last:2").eval()
    torch.manual_seed(0)
    with torch.no_grad():  # a policy that has left the reference
        for weights in policy.trainable_weights().values():
            weights += 0.1 * weights.std(correction=0) * torch.randn(weights.shape)
        text_CD = frozen.text_CD[list(table.captions)]
        found = preference_step(
            policy.embed(batch.inputs), text_CD, batch, frozen.logit_scale, loss=loss, beta=0.3, kl_weight=2.0
        )

        def cells(embeddings_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            raw = frozen.logit_scale * embeddings_ND @ text_CD.T
            normalised = F.log_softmax(raw, dim=-1)
            columns = zip(table.picture_w, table.caption_w, table.picture_l, table.caption_l, strict=True)
            both = [
                [(raw if w != l else normalised)[cell] for cell in ((w, cw), (l, cl))]
                for w, cw, l, cl in columns  # noqa: E741
            ]
            chosen, rejected = torch.tensor(both).T
            return chosen, rejected, normalised[torch.from_numpy(table.clean)]

        rows = [data.rows for data in mixed.train.values()]
        ours = cells(torch.cat([policy.embed(r.inputs(range(len(r)))) for r in rows]))
        theirs = cells(torch.cat([r.reference for r in rows]))
    if kind == "both":
        ours, theirs = (
            (*side[:2], side[2][:, NEAR] - side[2][:, NEAR].logsumexp(1, keepdim=True))
            for side in (ours, theirs)
        )
    kl = (theirs[2].exp() * (theirs[2] - ours[2])).sum(1).mean()
    gains = [mine - reference for mine, reference in zip(ours[:2], theirs[:2], strict=True)]
    if loss == "dpo":
        expected = -F.logsigmoid(0.3 * (gains[0] - gains[1])).mean()
    else:
        terms = torch.cat([-0.3 * (gains[0] - kl), -0.3 * (kl - gains[1])])
        expected = torch.sigmoid(terms).mean()
    assert found.preference.item() == pytest.approx(expected.item(), rel=5e-3)
    assert found.kl.item() == pytest.approx(kl.item(), rel=1e-3)
    assert kl > 1e-3


def test_micro_batches_and_ranks_split_all_blocks(mixed: PreparedSet, frozen: Frozen) -> None:
    pairs = Pairs.of(mixed, frozen, "both")
    whole, _ = one_batch(pairs)
    parts = whole.split(33)
    assert sum(p.share for p in parts) == pytest.approx(1)
    for place in range(2):
        blocks = [p.inputs.chunk(2)[place] for p in parts]
        assert torch.equal(torch.cat(blocks), whole.inputs.chunk(2)[place])
    assert whole.across is not None
    assert torch.equal(torch.cat([p.across for p in parts if p.across is not None]), whole.across)
    assert 0 < whole.across.sum() < len(whole.across)


@pytest.mark.parametrize("narrow", [False, True])
def test_rows_of_several_sets_come_in_the_order_asked(
    narrow: bool, small_set: PreparedSet, transform_set: PreparedSet
) -> None:
    prepared = transform_set if narrow else small_set
    assert prepared.train_inputs.in_memory is narrow
    rows = [data.rows for data in prepared.train.values()]
    everything = torch.cat([r.inputs(range(len(r))) for r in rows])
    order = torch.randperm(len(everything))[:50]
    assert torch.equal(prepared.train_inputs(order), everything[order])
    assert any((a < 160) != (b < 160) for a, b in pairwise(order.tolist()))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("fetched", [1, 40_000, 2**20])  # one batch, some columns and no inputs, all at once
def test_each_batch_has_what_belongs_to_its_pairs(
    narrow: bool, fetched: int, small_set: PreparedSet, transform_set: PreparedSet, frozen: Frozen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(batches, "FETCHED", fetched)
    pairs = Pairs.of(transform_set if narrow else small_set, frozen)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1_000_003 * 5 + 2))
    wholes = order.tensor_split(math.ceil(len(pairs) / 7))[3:]
    for rank in (0, 1):
        found = list(epoch_batches(pairs, 7, 5, 2, rank, 2, CPU, skipped=3))
        for batch, whole in zip(found, wholes, strict=True):
            mine = whole.tensor_split(2)[rank]
            assert batch.share == len(mine) / len(whole)
            for block, rows in zip(batch.inputs.chunk(2), pairs.blocks_KP[:, mine], strict=True):
                assert torch.equal(block, pairs.inputs(rows))
            assert torch.equal(batch.chosen, pairs.chosen_P[mine])
            assert torch.equal(batch.rejected, pairs.rejected_P[mine])
            clean = pairs.blocks_KP[pairs.layout.clean, mine]
            assert torch.equal(batch.reference_clean_logps, pairs.reference_clean_logps_NC[clean])
            assert torch.equal(batch.reference_chosen_logps, pairs.reference_chosen_P[mine])
            assert torch.equal(batch.reference_rejected_logps, pairs.reference_rejected_P[mine])


def test_typographic_pairs_are_labels_of_attacked_pictures(small_set: PreparedSet, frozen: Frozen) -> None:
    attacked, table = small_set.train["train/attacked"].rows, small_set.pairs()
    captions = torch.tensor(table.captions)
    assert torch.equal(captions[table.caption_w], attacked.labels)
    assert torch.equal(captions[table.caption_l], attacked.attack_labels)
    assert table.picture_w.tolist() == table.picture_l.tolist() == list(range(160, 320))
    assert table.clean.tolist() == list(range(160))
    pairs = Pairs.of(small_set, frozen)
    expected = class_logps(attacked.reference, frozen.text_CD[captions], frozen.logit_scale)
    assert torch.equal(pairs.reference_chosen_P, expected[range(160), table.caption_w])
    assert pairs.across_P is None


def test_pairs_that_a_task_does_not_have(small_set: PreparedSet) -> None:
    with pytest.raises(ConfigError, match="pairs are 'mirrored'; they must be one of: attacked"):
        small_set.pairs("mirrored")
