"""Image towers as chains of stages: all that is known here of the architectures of open_clip and timm.

B batch, C channels, D width of a token, H height, N tokens, W width of a picture
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

TIMM_EMBEDDING = (
    "trunk.patch_embed", "trunk.cls_token", "trunk.reg_token", "trunk.pos_embed", "trunk.norm_pre",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One link of an image tower, with the parameters that it alone uses.

    Not a module, so that parameters keep their names in open_clip's state dict.
    """

    apply: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


def tower_stages(visual: nn.Module) -> list[Stage]:
    """The image tower as a chain: the embedding, the blocks, and the pooling joined with the last block.

    A tower whose inside is not known is a chain of one stage, which is trained whole or not at all.
    """
    if isinstance(visual, ModifiedResNet):
        layers = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        links = [Stage(partial(_layer, layer), list(layer.parameters())) for layer in layers]
        stem = partial(_stem, visual)
        return _chain(visual, stem, links, partial(_pooled_resnet, visual), ("conv", "bn"))
    if isinstance(visual, VisionTransformer):
        links = [
            Stage(partial(_block, visual, b), list(b.parameters())) for b in visual.transformer.resblocks
        ]
        last = visual.transformer.resblocks[-1]
        if visual.pool_type == "tok" and visual.attn_pool is None and type(last) is ResidualAttentionBlock:
            links[-1] = Stage(partial(_block_of_class_token, visual, last), list(last.parameters()))
        names = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
        return _chain(visual, visual._embeds, links, partial(_pooled, visual), names)
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, TimmVisionTransformer):
        links = [Stage(b, list(b.parameters())) for b in visual.trunk.blocks]
        pool = partial(_pooled_timm, visual)
        return _chain(visual, partial(_embeds_timm, visual), links, pool, TIMM_EMBEDDING)
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, ConvNeXt):
        links = [Stage(b, list(b.parameters())) for b in visual.trunk.stages]
        return _chain(visual, visual.trunk.stem, links, partial(_pooled_convnext, visual), ("trunk.stem",))
    return [Stage(visual, list(visual.parameters()))]


def _chain(
    visual: nn.Module, embed: Callable[[Tensor], Tensor], blocks: list[Stage],
    pool: Callable[[Tensor], Tensor], embedding_names: tuple[str, ...],
) -> list[Stage]:  # fmt: skip
    in_blocks = {id(p) for block in blocks for p in block.parameters}
    rest = [(n, p) for n, p in visual.named_parameters() if id(p) not in in_blocks]
    embedding = Stage(embed, [p for n, p in rest if n.startswith(embedding_names)])
    *others, last = blocks
    pooling = [p for n, p in rest if not n.startswith(embedding_names)]
    return [embedding, *others, Stage(lambda x: pool(last.apply(x)), last.parameters + pooling)]


def _block(visual: VisionTransformer, block: nn.Module, x: Tensor) -> Tensor:
    if visual.transformer.batch_first:
        return cast(Tensor, block(x))
    return cast(Tensor, block(x.transpose(0, 1)).transpose(0, 1))


def _block_of_class_token(visual: VisionTransformer, block: ResidualAttentionBlock, x_BND: Tensor) -> Tensor:
    """The last block for the one token that is pooled; the others are only attended to."""
    h = block.ln_1(x_BND)
    query = h[:, :1]
    if not visual.transformer.batch_first:
        query, h = query.transpose(0, 1), h.transpose(0, 1)
    attended = block.attention(query, h, h)
    x_B1D = x_BND[:, :1] + block.ls_1(
        attended if visual.transformer.batch_first else attended.transpose(0, 1)
    )
    return cast(Tensor, x_B1D + block.ls_2(block.mlp(block.ln_2(x_B1D))))


def _pooled(visual: VisionTransformer, x: Tensor) -> Tensor:
    pooled: Tensor = visual._pool(x)[0]
    return pooled if visual.proj is None else pooled @ visual.proj


def _stem(visual: ModifiedResNet, x: Tensor) -> Tensor:
    for conv, norm in (
        (visual.conv1, visual.bn1), (visual.conv2, visual.bn2), (visual.conv3, visual.bn3)
    ):  # fmt: skip
        x = _rectified(_normed(conv, norm, x))
    return cast(Tensor, visual.avgpool(x))


def _layer(layer: nn.Sequential, x: Tensor) -> Tensor:
    """open_clip's Bottleneck blocks with `_normed` convolutions."""
    for block in cast("list[Bottleneck]", layer):
        h = _rectified(_normed(block.conv1, block.bn1, x))
        h = _rectified(_normed(block.conv2, block.bn2, h))
        h = _normed(block.conv3, block.bn3, block.avgpool(h))
        if (shortcut := block.downsample) is not None:
            pool, conv, norm = shortcut
            x = _normed(conv, norm, pool(x))
        x = _rectified(h.add_(x))
    return x


def _normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A convolution and its batch norm, whose statistics are frozen, as one convolution.

    What the norm does to every activation it does to the weights, which are fewer; gradients go through.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert not norm.training
    assert conv.bias is None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def _rectified(x: Tensor) -> Tensor:
    """ReLU, in place.

    What is below zero is so as an integer of the same bits, too, and where nothing is derived a CPU compares
    integers four times as fast as bfloat16. A NaN may become 0.
    """
    if x.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return x.relu_()
    x.view(torch.int16).clamp_(min=0)
    return x


def _pooled_resnet(visual: ModifiedResNet, x_BCHW: Tensor) -> Tensor:
    """open_clip's AttentionPool2d for its one query that is used, the mean.

    The result is the same. With one query, keys and values need not be projected for every position: the
    query goes through the key's weights instead, and the attended mean through the value's. For a ResNet's
    last block that is most of the work.
    """
    pool: Any = visual.attnpool
    x_BND = x_BCHW.flatten(2).transpose(1, 2)
    x_BND = torch.cat([x_BND.mean(1, keepdim=True), x_BND], 1) + pool.positional_embedding.to(x_BND.dtype)
    heads, width = pool.num_heads, x_BND.shape[-1]
    query = pool.q_proj(x_BND[:, 0]).unflatten(-1, (heads, -1))
    key = torch.einsum("bhd,hdc->bhc", query, pool.k_proj.weight.unflatten(0, (heads, -1)))
    scores = torch.einsum("bhc,bnc->bhn", key, x_BND)
    # The key's bias shifts all scores of a head alike; it is here so that it has its (zero) gradient.
    scores = scores + (query * pool.k_proj.bias.unflatten(0, (heads, -1))).sum(-1, keepdim=True)
    attention = (scores.float() * (width // heads) ** -0.5).softmax(-1).to(x_BND.dtype)
    mean = torch.einsum("bhn,bnc->bhc", attention, x_BND)
    value = torch.einsum("bhc,hdc->bhd", mean, pool.v_proj.weight.unflatten(0, (heads, -1))).flatten(1)
    return cast(Tensor, pool.c_proj(value + pool.v_proj.bias))


def _embeds_timm(visual: TimmModel, x: Tensor) -> Tensor:
    trunk = visual.trunk
    return cast(Tensor, trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x)))))


def _pooled_timm(visual: TimmModel, x: Tensor) -> Tensor:
    return cast(Tensor, visual.head(visual.trunk.forward_head(visual.trunk.norm(x))))


def _pooled_convnext(visual: TimmModel, x: Tensor) -> Tensor:
    return cast(Tensor, visual.head(visual.trunk.forward_head(visual.trunk.norm_pre(x))))
