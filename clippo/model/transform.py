"""A linear transformation of both embeddings, whose strength can be turned after training.

A square matrix W, the identity at the start, is applied to image and text embeddings alike (Afzali et al.,
arXiv 2411.08923). With ``W = U S V^T`` the power t of its singular values, ``W_t = U S^t V^T``, turns the
learned preference up and down: t = 0 gives the untouched model, t = 1 the trained one, t < 0 its opposite.

B batch, C classes, D embedding
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clippo.model.averaging import Weights
from clippo.model.towers import ClipModel, Policy

MATRIX = "transform"


class TransformPolicy(Policy):
    """The whole image tower frozen, and a trained matrix (D, D) behind both towers."""

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self._visual = [clip.model.visual]  # in a list, or its weights would be this module's
        self._normalized = clip.normalized
        width = clip.text_features([""]).shape[1]
        self.matrix = nn.Parameter(torch.eye(width))

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformPolicy:
        """A copy with a matrix of its own; the tower, which nothing changes, is shared."""
        twin = copy.copy(self)
        twin._parameters = {"matrix": nn.Parameter(self.matrix.detach().clone())}
        return twin

    def trainable_weights(self) -> dict[str, Tensor]:
        return {MATRIX: self.matrix}

    def curve(
        self, reference: Weights, tuned: Weights, alphas: Sequence[float], powers: Sequence[float]
    ) -> Iterator[tuple[str, Weights]]:
        for power in powers:
            yield f"t={power:g}", {MATRIX: powered(tuned[MATRIX], power)}

    @torch.no_grad()
    def frozen(self, pixels_BHWC: Tensor) -> Tensor:
        """The embeddings themselves, float32 (B, D), unit length."""
        embedding = cast(nn.Module, self._visual[0])(self._normalized(pixels_BHWC))
        if isinstance(embedding, tuple):  # CoCa's towers give their tokens, too
            embedding, _ = embedding
        return F.normalize(embedding.float(), dim=-1)

    def embed(self, x: Tensor) -> Tensor:
        return self._mapped(x)

    def text(self, text_CD: Tensor) -> Tensor:
        return self._mapped(text_CD)

    def penalty(self) -> Tensor:
        """The Frobenius norm of I - W W^T."""
        identity = torch.eye(len(self.matrix), device=self.matrix.device)
        return torch.linalg.matrix_norm(identity - self.matrix @ self.matrix.T)

    def _mapped(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # it is little work, and bfloat16 has three digits
            return F.normalize(x @ self.matrix.T, dim=-1)


@torch.no_grad()
def powered(matrix: Tensor, t: float) -> Tensor:
    """``V S^t V^T``, whose cosines are those of ``U S^t V^T``: U turns both sides alike and cancels.

    >>> powered(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), 2.0)
    tensor([[1., 0.],
            [0., 4.]])
    """
    if t == 0:
        return torch.eye(len(matrix), device=matrix.device)
    if t == 1:
        return matrix.clone()
    _, s, vh = torch.linalg.svd(matrix.double())
    return ((vh.T * s.pow(t)) @ vh).to(matrix)
