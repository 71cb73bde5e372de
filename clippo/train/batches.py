"""The pairs of a prepared set, in batches that the ranks share.

P pairs, M of some batches, B of a batch, K blocks of pictures, C captions that tuning tells apart,
N train rows
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clippo.errors import ConfigError
from clippo.prepared import Inputs, PreparedSet
from clippo.train.step import Batch, Frozen, Layout, among

SEVERAL = 64  # batches whose columns are fetched at once: the calls take longer than the copies
FETCHED = 2**23  # bytes that are fetched at once, if a batch has fewer


@dataclass(frozen=True)
class Pairs:
    """The pairs of a prepared set with what the reference makes of them, computed once and not per step.

    Attributes:
        captions: the classes whose captions are told apart.
        inputs: what the policy takes of the train rows.
        blocks_KP: train rows whose pictures a batch holds: the clean ones, those of the chosen cells and
            those of the rejected ones; what is the same row in every pair is there once, so K is 1 to 3.
        layout: which block has which.
        across_P: which pairs compare two pictures; None: none does.
        near: columns of the captions that the KL term is over; None: all.
    """

    inputs: Inputs
    captions: tuple[int, ...]
    blocks_KP: Tensor
    layout: Layout
    chosen_P: Tensor
    rejected_P: Tensor
    across_P: Tensor | None
    near: Tensor | None
    reference_clean_logps_NC: Tensor
    reference_chosen_P: Tensor
    reference_rejected_P: Tensor

    @classmethod
    def of(cls, prepared: PreparedSet, frozen: Frozen, kind: str = "", without: int | None = None) -> Pairs:
        """The pairs of a kind; '': the task's first; maybe without those of a fold."""
        table = prepared.pairs(kind, without)
        rows = [data.rows for data in prepared.train.values()]
        text_CD = frozen.text_CD[list(table.captions)]
        logits_NC = torch.cat([frozen.logit_scale * r.reference @ text_CD.T for r in rows])
        logps_NC = logits_NC.log_softmax(-1)
        columns = (table.clean, table.picture_w, table.picture_l)
        clean, chosen, rejected = (torch.from_numpy(column) for column in columns)
        blocks: list[Tensor] = []
        places = []
        for block in (clean, chosen, rejected):
            place = next((i for i, known in enumerate(blocks) if torch.equal(known, block)), len(blocks))
            blocks += [block] if place == len(blocks) else []
            places.append(place)
        chosen_P, rejected_P = (torch.from_numpy(c) for c in (table.caption_w, table.caption_l))
        across_P = chosen != rejected
        near = None if table.near is None else torch.from_numpy(table.near)
        cells = [logps_NC[chosen, chosen_P], logps_NC[rejected, rejected_P]]
        if across_P.any():
            raw = [logits_NC[chosen, chosen_P], logits_NC[rejected, rejected_P]]
            cells = [torch.where(across_P, r, cell) for r, cell in zip(raw, cells, strict=True)]
        del logits_NC  # the largest of what does not stay
        return cls(
            inputs=prepared.train_inputs,
            captions=table.captions,
            blocks_KP=torch.stack(blocks),
            layout=Layout(*places),
            chosen_P=chosen_P,
            rejected_P=rejected_P,
            across_P=across_P if across_P.any() else None,
            near=near,
            reference_clean_logps_NC=among(logps_NC[: int(clean.max()) + 1], near).clone(),
            reference_chosen_P=cells[0],
            reference_rejected_P=cells[1],
        )

    def __len__(self) -> int:
        return len(self.chosen_P)


def check_batches(pairs: int, batch_size: int, workers: int) -> None:
    """Refuses batches of which a worker would get nothing.

    Raises:
        ConfigError: with the arithmetic.
    """
    if pairs // math.ceil(pairs / batch_size) < workers:
        raise ConfigError(
            f"{pairs} pairs in batches of {batch_size} leave one of {workers} workers without a pair; "
            "raise train.batch_size or lower workers"
        )


def epoch_batches(
    pairs: Pairs, batch_size: int, seed: int, epoch: int, rank: int, world: int, device: torch.device,
    *, skipped: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's part of each global batch of an epoch; each pair comes once, in an order the seed sets.

    Batches differ by at most one pair, so none is dropped and none is tiny.

    Args:
        skipped: batches of the epoch that were trained on before an interruption.
    """
    n = len(pairs)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    wholes = order.tensor_split(math.ceil(n / batch_size))[skipped:]
    widest = pairs.reference_clean_logps_NC.shape[1] * 4 * batch_size  # bytes of a batch's widest column
    several = max(1, min(SEVERAL, FETCHED // widest))
    for start in range(0, len(wholes), several):
        some = [(whole, whole.tensor_split(world)[rank]) for whole in wholes[start : start + several]]
        sizes, mine = [len(part) for _, part in some], torch.cat([part for _, part in some])
        rows_KM = pairs.blocks_KP[:, mine]
        rows = [rows_KB.flatten() for rows_KB in rows_KM.split(sizes, dim=1)]
        inputs: Iterable[Tensor] = (pairs.inputs(r).to(device) for r in rows)
        if rows_KM.numel() * pairs.inputs.bytes_of_one <= FETCHED:
            inputs = pairs.inputs(torch.cat(rows)).to(device).split([len(r) for r in rows])
        across: Sequence[Tensor | None] = [None] * len(some)
        if pairs.across_P is not None:
            across = pairs.across_P[mine].to(device).split(sizes)
        columns = (
            pairs.chosen_P[mine], pairs.rejected_P[mine],
            pairs.reference_clean_logps_NC.index_select(0, rows_KM[pairs.layout.clean]),
            pairs.reference_chosen_P[mine], pairs.reference_rejected_P[mine],
        )  # fmt: skip
        for (whole, part), inputs_B, across_B, *others in zip(
            some, inputs, across, *(column.to(device).split(sizes) for column in columns), strict=True
        ):
            chosen, rejected, clean_logps, chosen_logps, rejected_logps = others
            yield Batch(
                inputs=inputs_B,
                layout=pairs.layout,
                chosen=chosen,
                rejected=rejected,
                across=across_B,
                near=pairs.near if pairs.near is None else pairs.near.to(device),
                reference_clean_logps=clean_logps,
                reference_chosen_logps=chosen_logps,
                reference_rejected_logps=rejected_logps,
                share=len(part) / len(whole),
            )
