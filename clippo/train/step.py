"""One step: from a batch of pairs to the loss.

B pairs of the batch, C classes that tuning tells apart, D embedding
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clippo.evaluate.counts import sum_over_ranks
from clippo.losses import kl_reference_to_policy, preference_loss


@dataclass(frozen=True)
class Batch:
    """Pairs, each a clean picture and its attacked twin, as the policy takes them.

    Attributes:
        inputs: clean pictures first, then the attacked ones: (2 B, ...).
        chosen, rejected: columns of the true and the written class, int64 (B,).
        reference_clean, reference_attacked: the reference's unit-length embeddings, float32 (B, D).
        share: this rank's share of the pairs of the global batch, in (0, 1].
    """

    inputs: Tensor
    chosen: Tensor
    rejected: Tensor
    reference_clean: Tensor
    reference_attacked: Tensor
    share: float


@dataclass(frozen=True)
class StepLoss:
    """The three numbers of a step, over this rank's pairs; ``total`` is what is minimised."""

    total: Tensor
    preference: Tensor
    kl: Tensor


def class_logps(
    embeddings_BD: Tensor, text_CD: Tensor, logit_scale: float, logit_bias: float = 0.0
) -> Tensor:
    """log pi(y | image) = log_softmax_y(s cos(image, text_y)), float32 (B, C)."""
    return F.log_softmax(logit_scale * embeddings_BD @ text_CD.T + logit_bias, dim=-1)


def preference_step(
    policy: nn.Module, batch: Batch, text_CD: Tensor, logit_scale: float, *,
    loss: str, beta: float, kl_weight: float, **loss_settings: float,
) -> StepLoss:  # fmt: skip
    """preference loss on the attacked pictures + kl_weight * KL(reference || policy) on the clean ones.

    Afzali et al., arXiv 2411.08923, equation 8. KTO's baseline is the detached KL of the whole global batch,
    so it is averaged over the ranks.
    """
    pairs = len(batch.chosen)
    clean_BC, attacked_BC = class_logps(policy(batch.inputs), text_CD, logit_scale).split(pairs)
    with torch.no_grad():
        reference_clean_BC = class_logps(batch.reference_clean, text_CD, logit_scale)
        reference_attacked_BC = class_logps(batch.reference_attacked, text_CD, logit_scale)

    kl = kl_reference_to_policy(clean_BC, reference_clean_BC)
    kl_baseline = sum_over_ranks(kl.detach() * batch.share)
    chosen, rejected = batch.chosen[:, None], batch.rejected[:, None]
    preference = preference_loss(
        loss,
        attacked_BC.gather(1, chosen)[:, 0],
        attacked_BC.gather(1, rejected)[:, 0],
        reference_attacked_BC.gather(1, chosen)[:, 0],
        reference_attacked_BC.gather(1, rejected)[:, 0],
        beta=beta,
        kl_baseline=kl_baseline,
        **loss_settings,
    )
    return StepLoss(preference + kl_weight * kl, preference.detach(), kl.detach())
