"""open_clip models as a frozen part and a policy.

An image tower is a chain of stages (``stages.py``). A policy has one cut in that chain: what lies before it
is frozen and is computed once per sweep, what lies behind it is trained. ``image`` cuts before the first
stage, ``last:K`` before the last K blocks (the pooling that follows them is always trained). ``transform``
cuts behind the last one and trains a linear map of what comes out (``transform.py``).

B batch, C classes, D embedding, H height, W width
"""

from __future__ import annotations

import copy
import difflib
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from clippo import demo
from clippo.errors import ConfigError, ModelError
from clippo.model.averaging import Weights, interpolate
from clippo.model.stages import tower_stages
from clippo.model.usage import published, wanted_by


@dataclass(frozen=True)
class Normalization:
    """uint8 (B, H, W, 3) to the float input of the image tower, in channels-last memory."""

    mean: Tensor
    std: Tensor

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        pixels = pixels_BHWC.permute(0, 3, 1, 2).float()
        return (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)


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
    normalized: Normalization
    _pixels: Compose

    def pixels(self, image: Image.Image) -> Image.Image:
        """The model's own resizing and cropping, without normalisation: what an attack is drawn on."""
        resized = self._pixels(image.convert("RGB"))
        assert isinstance(resized, Image.Image)
        return resized

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], batch_size: int = 512) -> Tensor:
        """Unit-length text embeddings, float32 (C, D), one per prompt."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(list(prompts))
        parts = [self.model.encode_text(t.to(device)).float() for t in tokens.split(batch_size)]  # type: ignore[operator]
        return F.normalize(torch.cat(parts), dim=-1)


class Policy(nn.Module):
    """What is trained, behind the cut, and the frozen part before it.

    ``forward`` takes what the frozen part gave and the text features, and returns both as unit-length
    embeddings, float32: (B, D) and (C, D).
    """

    def forward(self, x: Tensor, text_CD: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(x), self.text(text_CD)

    def frozen(self, pixels_BHWC: Tensor) -> Tensor:
        """What enters the cut, as it is stored."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """Unit-length image embeddings, float32 (B, D), of what the frozen part gave."""
        raise NotImplementedError

    def text(self, text_CD: Tensor) -> Tensor:
        """Unit-length text embeddings, float32 (C, D)."""
        return text_CD

    def penalty(self) -> Tensor:
        """What is added to the loss for the weights alone; a scalar."""
        return torch.zeros((), device=next(self.parameters()).device)

    def trainable_weights(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        raise NotImplementedError

    def curve(
        self, reference: Weights, tuned: Weights, alphas: Sequence[float], powers: Sequence[float]
    ) -> Iterator[tuple[str, Weights]]:
        """Weights between the reference's and the tuned policy's, and beyond, one variant after another."""
        raise NotImplementedError

    @torch.no_grad()
    def load_weights(self, weights: Weights) -> None:
        """Sets the trained parameters."""
        for name, parameter in self.trainable_weights().items():
            parameter.copy_(weights[name])


class TowerPolicy(Policy):
    """A copy of the image tower, of which the part behind the cut is trained."""

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
        # Names of open_clip's state dict.
        self._trained = {n: p for n, p in self.visual.named_parameters() if p.requires_grad}

    def trainable_weights(self) -> dict[str, Tensor]:
        return dict(self._trained)

    def curve(
        self, reference: Weights, tuned: Weights, alphas: Sequence[float], powers: Sequence[float]
    ) -> Iterator[tuple[str, Weights]]:
        """The straight line of PAINT: ``alpha=0`` is the reference, ``alpha=1`` the tuned policy."""
        for alpha in alphas:
            yield f"alpha={alpha:g}", interpolate(reference, tuned, alpha)

    @torch.no_grad()
    def frozen(self, pixels_BHWC: Tensor) -> Tensor:
        """Activations as bfloat16; with ``trainable="image"`` the pixels themselves, still uint8."""
        if self.cut == 0:
            return pixels_BHWC
        x = self._normalized(pixels_BHWC)
        for stage in self._stages[: self.cut]:
            x = stage.apply(x)
        return x.bfloat16()

    def embed(self, x: Tensor) -> Tensor:
        x = self._normalized(x) if self.cut == 0 else self._activations(x)
        for stage in self._stages[self.cut :]:
            x = stage.apply(x)
        return F.normalize(x.float(), dim=-1)

    @staticmethod
    def _activations(x: Tensor) -> Tensor:
        """Stored activations as the next stage likes them: a convolution takes bfloat16 as it is."""
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            if torch.is_autocast_enabled(x.device.type):
                return x
        return x.float()  # or the residual stream of a ViT would be bfloat16


def load_clip(name: str, pretrained: str | None = None) -> ClipModel:
    """Loads an open_clip model, in float32 and evaluation mode.

    Raises:
        ModelError: an unknown model or tag (near matches are named), or weights that do not load.
    """
    check_name(name, pretrained)
    if name == demo.MODEL_NAME and pretrained is None:
        pretrained = str(demo.WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Some published weights want another activation than the architecture's name says.
            quick_gelu = bool(published(name, pretrained).get("quick_gelu", False))
            # Weights that are asked for must be there; random ones are the same in every process.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = open_clip.create_model(
                    name, pretrained=pretrained, precision="fp32", weights_only=True,
                    force_quick_gelu=quick_gelu, require_pretrained=bool(pretrained) or ":" in name,
                    force_preprocess_cfg=wanted_by(pretrained).preprocessing,
                )  # fmt: skip
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises whatever its loaders raise
        raise ModelError(f"cannot load {name!r} with pretrained={pretrained!r}: {_reason(error)}") from error
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
        normalized=Normalization(*(torch.tensor(preprocess[k]).view(3, 1, 1) * 255 for k in ("mean", "std"))),
        _pixels=pixels,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
        return "its text side comes from Hugging Face; pip install 'clippo[hf]'"
    if isinstance(error, pickle.UnpicklingError):
        return "the file is damaged or holds more than weights; write the state dict with safetensors"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def check_name(name: str, pretrained: str | None = None) -> None:
    """Whether open_clip knows the model and the tag; nothing is loaded.

    Raises:
        ModelError: an unknown model or tag, where near matches are named; a file or folder that is not there.
    """
    demo.register()
    kind, colon, place = name.partition(":")
    if colon:
        if kind not in ("hf-hub", "local-dir"):
            raise ModelError(
                f"{name!r} is no model; write hf-hub:ORG/MODEL, local-dir:FOLDER or a name of open_clip"
            )
        if kind == "local-dir" and not (Path(place) / "open_clip_config.json").is_file():
            raise ModelError(
                f"{place!r} holds no open_clip_config.json; give a folder that open_clip has written"
            )
        if pretrained:
            raise ModelError(
                f"{name!r} brings its own weights and open_clip ignores pretrained={pretrained!r} beside it; "
                "give one of the two"
            )
        return
    known = open_clip.list_models()
    if name not in known:
        by_plain_name = {each.casefold(): each for each in known}
        near = difflib.get_close_matches(name.casefold(), by_plain_name, n=4, cutoff=0.4)
        names = ", ".join(by_plain_name[each] for each in near) or "none"
        raise ModelError(f"open_clip has no model {name!r}; near matches: {names}")
    if pretrained and not Path(pretrained).is_file() and not open_clip.get_pretrained_cfg(name, pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(f"{pretrained!r} is no file and no pretrained tag of {name}; its tags: {tags}")
    if (wanted := wanted_by(pretrained).architecture or name) != name:
        raise ModelError(f"{pretrained} has weights of {wanted}, not of {name}; name that model")


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
    cuts = f", transform or last:K with K from 1 to {blocks}" if blocks else " or transform for this model"
    raise ConfigError(f"model.trainable is {trainable!r}; it must be image{cuts}")
