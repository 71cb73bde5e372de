"""One step: from a batch of pairs to the loss.

B pairs of the batch, C classes that tuning tells apart, D embedding
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from clippo.evaluate.counts import sum_over_ranks
from clippo.losses import kl_reference_to_policy, preference_loss


@dataclass(frozen=True)
class Batch:
    """Pairs, each a clean picture and its attacked twin, as the policy takes them.

    Attributes:
        inputs: clean pictures first, then the attacked ones: (2 B, ...).
        chosen, rejected: columns of the true and the written class, int64 (B,).
        reference_clean_logps: the reference's log-probabilities on the clean pictures, float32 (B, C).
        reference_chosen_logps, reference_rejected_logps: its own on the attacked ones, float32 (B,).
        share: this rank's share of the pairs of the global batch, in (0, 1].
    """

    inputs: Tensor
    chosen: Tensor
    rejected: Tensor
    reference_clean_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    share: float


@dataclass(frozen=True)
class StepLoss:
    """The three numbers of a step, over this rank's pairs; ``total`` is what is minimised."""

    total: Tensor
    preference: Tensor
    kl: Tensor


def class_logps(embeddings_BD: Tensor, text_CD: Tensor, logit_scale: float) -> Tensor:
    """log pi(y | image) = log_softmax_y(s cos(image, text_y)), float32 (B, C)."""
    return F.log_softmax(logit_scale * embeddings_BD @ text_CD.T, dim=-1)


def pick(logps_BC: Tensor, columns_B: Tensor) -> Tensor:
    """One log-probability of each row: (B,)."""
    return logps_BC.gather(1, columns_B[:, None])[:, 0]


def preference_step(
    embeddings: Tensor, batch: Batch, text_CD: Tensor, logit_scale: float, *,
    loss: str, beta: float, kl_weight: float, **loss_settings: float,
) -> StepLoss:  # fmt: skip
    """preference loss on the attacked pictures + kl_weight * KL(reference || policy) on the clean ones.

    Afzali et al., arXiv 2411.08923, equation 8. KTO's baseline is the detached KL of the whole global batch,
    so it is averaged over the ranks.

    Args:
        embeddings: the policy's of ``batch.inputs``, unit length, float32 (2 B, D). Call this outside of
            autocast: a margin is a small difference of large numbers, and bfloat16 has three digits.
    """
    clean_BC, attacked_BC = class_logps(embeddings, text_CD, logit_scale).split(len(batch.chosen))
    kl = kl_reference_to_policy(clean_BC, batch.reference_clean_logps)
    kl_baseline = sum_over_ranks(kl.detach() * batch.share)
    preference = preference_loss(
        loss,
        pick(attacked_BC, batch.chosen),
        pick(attacked_BC, batch.rejected),
        batch.reference_chosen_logps,
        batch.reference_rejected_logps,
        beta=beta,
        kl_baseline=kl_baseline,
        **loss_settings,
    )
    return StepLoss(preference + kl_weight * kl, preference.detach(), kl.detach())
