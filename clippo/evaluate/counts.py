"""Counting predictions, and adding the counts of all ranks.

B batch, C classes
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def count_predictions(logits_BC: Tensor, labels_B: Tensor, attack_labels_B: Tensor) -> Tensor:
    """int64 (correct, total, fooled) of one batch; labels are columns of the logits, -1 is no class.

    >>> count_predictions(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), torch.tensor([1, 1]))
    tensor([1, 2, 1])
    """
    predicted = logits_BC.argmax(1)
    correct, fooled = (predicted == labels_B).sum(), (predicted == attack_labels_B).sum()
    return torch.stack([correct, torch.tensor(len(labels_B), device=correct.device), fooled])


def between(logits_BC: Tensor, labels_B: Tensor, attack_labels_B: Tensor) -> Tensor:
    """The logits with minus infinity everywhere but at the two labels of each row.

    >>> between(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]), torch.tensor([1]))
    tensor([[1., 2., -inf]])
    """
    columns = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    kept = (columns == labels_B[:, None]) | (columns == attack_labels_B[:, None])
    return logits_BC.masked_fill(~kept, -torch.inf)


def is_attacked(eval_set: str) -> bool:
    """Whether a class is written on the pictures of a set, so that some may be read as it.

    >>> is_attacked("test/attacked/scam"), is_attacked("test/clean/scam")
    (True, False)
    """
    return "attacked" in eval_set.split("/")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all processes of the group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
