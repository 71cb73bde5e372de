"""The pairs of a prepared set, in batches that the ranks share.

B pairs of the batch, C classes that tuning tells apart, M attacked pictures, N clean ones
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clippo.prepared import PreparedSet
from clippo.train.step import Batch, Frozen, class_logps, pick


@dataclass(frozen=True)
class Pairs:
    """The pairs of a prepared set with what the reference makes of them, computed once and not per step.

    ``N`` clean pictures, ``M`` attacked ones, ``C`` seen classes; labels are columns among the seen classes.
    """

    prepared: PreparedSet
    chosen_M: Tensor
    rejected_M: Tensor
    reference_clean_logps_NC: Tensor
    reference_chosen_logps_M: Tensor
    reference_rejected_logps_M: Tensor

    @classmethod
    def of(cls, prepared: PreparedSet, frozen: Frozen) -> Pairs:
        text_CD = frozen.text_CD[list(prepared.seen)]
        columns = torch.full((len(prepared.classes),), -1)
        columns[list(prepared.seen)] = torch.arange(len(prepared.seen))
        chosen, rejected = columns[prepared.attacked.labels], columns[prepared.attacked.attack_labels]
        attacked_MC = class_logps(prepared.attacked.reference, text_CD, frozen.logit_scale)
        clean_NC = class_logps(prepared.clean.reference, text_CD, frozen.logit_scale)
        return cls(
            prepared, chosen, rejected, clean_NC, pick(attacked_MC, chosen), pick(attacked_MC, rejected)
        )


def epoch_batches(
    pairs: Pairs, batch_size: int, seed: int, epoch: int, rank: int, world: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's part of each global batch of an epoch; each pair comes once, in an order the seed sets.

    Batches differ by at most one pair, so none is dropped and none is tiny.
    """
    n, prepared = len(pairs.chosen_M), pairs.prepared
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    for whole in order.tensor_split(math.ceil(n / batch_size)):
        mine = whole.tensor_split(world)[rank]
        picture = mine // prepared.copies
        inputs = torch.cat([prepared.clean.inputs(picture.tolist()), prepared.attacked.inputs(mine.tolist())])
        yield Batch(
            inputs=inputs.to(device),
            chosen=pairs.chosen_M[mine].to(device),
            rejected=pairs.rejected_M[mine].to(device),
            reference_clean_logps=pairs.reference_clean_logps_NC[picture].to(device),
            reference_chosen_logps=pairs.reference_chosen_logps_M[mine].to(device),
            reference_rejected_logps=pairs.reference_rejected_logps_M[mine].to(device),
            share=len(mine) / len(whole),
        )
