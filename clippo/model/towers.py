"""open_clip models as a frozen part and a policy.

An image tower is a chain of stages. A policy has one cut in that chain: what lies before it is frozen and is
computed once per sweep, what lies behind it is trained. ``image`` cuts before the first stage, ``last:K``
before the last K blocks (the pooling that follows them is always trained).

B batch, C classes, D embedding, H height, W width
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from clippo import demo
from clippo.errors import ConfigError, ModelError


@dataclass(frozen=True)
class ClipModel:
    """A pretrained model, frozen; the reference of a sweep.

    Attributes:
        image_size: (H, W) of the pixels that the image tower takes.
        logit_scale: the model's exp(logit_scale).
    """

    name: str
    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    image_size: tuple[int, int]
    logit_scale: float
    _pixels: Compose
    _mean: Tensor
    _std: Tensor

    def pixels(self, image: Image.Image) -> Image.Image:
        """The model's own resizing and cropping, without normalisation: what an attack is drawn on."""
        resized = self._pixels(image.convert("RGB"))
        assert isinstance(resized, Image.Image)
        return resized

    def normalized(self, pixels_BHWC: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) to the float input of the image tower, in channels-last memory."""
        pixels = pixels_BHWC.permute(0, 3, 1, 2).float()
        return (pixels - self._mean.to(pixels.device)) / self._std.to(pixels.device)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], batch_size: int = 512) -> Tensor:
        """Unit-length text embeddings, float32 (C, D), one per prompt."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(list(prompts))
        parts = [self.model.encode_text(t.to(device)).float() for t in tokens.split(batch_size)]  # type: ignore[operator]
        return F.normalize(torch.cat(parts), dim=-1)


class Policy(nn.Module):
    """A copy of the image tower, of which the part behind the cut is trained.

    ``forward`` takes what the frozen part gave (``frozen``) and returns unit-length embeddings (B, D).
    """

    def __init__(self, clip: ClipModel, trainable: str) -> None:
        super().__init__()
        self.visual = cast(nn.Module, copy.deepcopy(clip.model.visual))
        self._stages = tower_stages(self.visual)
        self.cut = cut_of(trainable, len(self._stages))
        self._normalized = clip.normalized
        self.requires_grad_(False)
        for stage in self._stages[self.cut :]:
            for parameter in stage.parameters:
                parameter.requires_grad_(True)

    def trainable_weights(self) -> dict[str, Tensor]:
        """The trained parameters by their names in the image tower's state dict."""
        return {n: p for n, p in self.visual.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Sets the trained parameters."""
        for name, parameter in self.trainable_weights().items():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def frozen(self, pixels_BHWC: Tensor) -> Tensor:
        """What enters the cut; with ``trainable="image"`` the pixels themselves, still uint8."""
        if self.cut == 0:
            return pixels_BHWC
        x = self._normalized(pixels_BHWC)
        for stage in self._stages[: self.cut]:
            x = stage.apply(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.cut == 0:
            x = self._normalized(x)
        for stage in self._stages[self.cut :]:
            x = stage.apply(x)
        return F.normalize(x.float(), dim=-1)


def load_clip(name: str, pretrained: str | None = None) -> ClipModel:
    """Loads an open_clip model, in float32 and evaluation mode.

    Raises:
        ModelError: an unknown model or tag (near matches are named), or weights that do not load.
    """
    demo.register()
    if name == demo.MODEL_NAME and pretrained is None:
        pretrained = str(demo.WEIGHTS)
    if ":" not in name and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
        raise ModelError(f"open_clip has no model {name!r}; near matches: {', '.join(near) or 'none'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Some published weights want another activation than the architecture's name says.
            published = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
            model = open_clip.create_model(
                name, pretrained=pretrained, precision="fp32", weights_only=True,
                force_quick_gelu=bool(published.get("quick_gelu", False)),
            )  # fmt: skip
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises whatever its loaders raise
        tags = open_clip.list_pretrained_tags_by_model(name) if ":" not in name else []
        known = f"; tags of {name}: {', '.join(tags)}" if tags else ""
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"cannot load {name!r} with pretrained={pretrained!r}: {first}{known}") from error
    model.eval().requires_grad_(False)
    model.visual.to(memory_format=torch.channels_last)
    preprocess: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
    size = preprocess["size"]
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    # The last two steps are ToTensor and Normalize; an attack is drawn on the pixels before them.
    pixels = Compose(transform.transforms[:-2])
    return ClipModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        logit_scale=float(model.logit_scale.exp()),
        _pixels=pixels,
        _mean=torch.tensor(preprocess["mean"]).view(3, 1, 1) * 255,
        _std=torch.tensor(preprocess["std"]).view(3, 1, 1) * 255,
    )


@dataclass(frozen=True)
class Stage:
    """One link of an image tower, with the parameters that it alone uses.

    Not a module, so that parameters keep their names in open_clip's state dict.
    """

    apply: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


def tower_stages(visual: nn.Module) -> list[Stage]:
    """The image tower as a chain: the embedding, the blocks, and the pooling joined with the last block.

    Raises:
        ModelError: a tower that is neither a ViT nor a ModifiedResNet.
    """
    if isinstance(visual, ModifiedResNet):
        embed: Callable[[Tensor], Tensor] = visual.stem
        pool: Callable[[Tensor], Tensor] = visual.attnpool
        blocks = [
            Stage(b, list(b.parameters()))
            for b in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        ]
        embedding_names: tuple[str, ...] = ("conv", "bn")
    elif isinstance(visual, VisionTransformer):
        embed, pool = visual._embeds, partial(_pooled, visual)
        blocks = [
            Stage(partial(_block, visual, b), list(b.parameters())) for b in visual.transformer.resblocks
        ]
        embedding_names = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
    else:
        raise ModelError(
            f"image towers of type {type(visual).__name__} cannot be cut; use a ViT or a ResNet model"
        )
    in_blocks = {id(p) for block in blocks for p in block.parameters}
    rest = [(n, p) for n, p in visual.named_parameters() if id(p) not in in_blocks]
    embedding = Stage(embed, [p for n, p in rest if n.startswith(embedding_names)])
    last = blocks.pop()
    pooling = [p for n, p in rest if not n.startswith(embedding_names)]
    end = Stage(lambda x: pool(last.apply(x)), last.parameters + pooling)
    return [embedding, *blocks, end]


def cut_of(trainable: str, n_stages: int) -> int:
    """The number of frozen stages.

    >>> cut_of("image", 5), cut_of("last:3", 5)
    (0, 2)
    """
    if trainable == "image":
        return 0
    kind, _, number = trainable.partition(":")
    blocks = n_stages - 1
    if kind == "last" and number.isdigit() and 1 <= int(number) <= blocks:
        return n_stages - int(number)
    raise ConfigError(
        f"model.trainable is {trainable!r}; it must be image or last:K with K from 1 to {blocks}"
    )


def _block(visual: VisionTransformer, block: nn.Module, x: Tensor) -> Tensor:
    if visual.transformer.batch_first:
        return cast(Tensor, block(x))
    return cast(Tensor, block(x.transpose(0, 1)).transpose(0, 1))


def _pooled(visual: VisionTransformer, x: Tensor) -> Tensor:
    pooled: Tensor = visual._pool(x)[0]
    return pooled if visual.proj is None else pooled @ visual.proj
