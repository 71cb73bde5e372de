"""The procedure as published: both towers trained, policy and reference recomputed in every step.

It is what clippo's speed is measured against. Its facts are those of the authors' own code for "Aligning
Visual Contrastive Learning Models via Preference Optimization" (Afzali et al., ICLR 2025, arXiv 2411.08923):
github.com/Amirabbas-Afzali/Aligning-Visual-Contrastive-learning-models-via-Preference-Optimization, folder
scripts. It is written anew, on open_clip modules instead of Hugging Face's:

- pictures arrive at 168 pixels, attacked copies drawn by the data loader; the processor resizes them to 224
  on the CPU, with PIL and numpy, inside the forward pass of the policy and again inside the reference's;
- one forward pass of the whole policy and one of the whole reference a step: the image tower on clean and
  attacked pictures, the text tower on the prompts of all classes; the reference's weights need no gradient;
- the loss plus KL(reference || policy) on the clean pictures, all in float32, one backward pass;
- Adamax over all parameters of both towers, cosine learning rate;
- a Beta(0.7, 0.7)-weighted moving average of all parameters, which builds new tensors in every step.

It differs to the published procedure's favour in that batch norm (which ViT-B/32 has not) stays in evaluation
mode, and log-probabilities over pictures per text, which its loss does not read, are not computed. It differs
to its disadvantage where prompts have open_clip's whole context of 77 tokens; ``padded_to_the_longest`` are
the published ones.

B pairs, C classes, L tokens, S side of a picture in pixels
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import cast

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from clippo.config import DataConfig
from clippo.data.attack import FONTS, WordStyle
from clippo.data.datasets import LabelledImage
from clippo.data.pairs import attacked_pairs
from clippo.losses import kl_reference_to_policy, preference_loss
from clippo.model import ClipModel
from clippo.tasks import TASKS

SHARE = 168 / 224  # of the model's side, at which pictures arrive

Pair = tuple[Tensor, Tensor, int, int]
"""Clean and attacked picture, uint8 (3, S, S); the true and the written class."""


class Published:
    """Policy, reference, average and optimizer of one run.

    Args:
        prompts: one a class.
        loss: dpo, ipo or kto; another baseline than the reference has no published procedure.
        steps: optimizer steps of the whole run.
    """

    def __init__(
        self, clip: ClipModel, prompts: Sequence[str], *, loss: str, beta: float, kl_weight: float,
        learning_rate: float, steps: int, average_beta: float = 0.7, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.device = device or torch.device("cpu")
        self.policy = copy.deepcopy(clip.model).to(self.device).eval().requires_grad_(True)
        self.reference = copy.deepcopy(clip.model).to(self.device).eval().requires_grad_(False)
        self.average = copy.deepcopy(self.reference)
        self._tokenizer = clip.tokenizer
        self.tokens_CL = self.tokens_of(prompts)
        self.side = clip.image_size[0]
        preprocess = open_clip.get_model_preprocess_cfg(clip.model)
        self._mean, self._std = (np.asarray(preprocess[k], np.float32) for k in ("mean", "std"))
        self._loss, self._beta, self._kl_weight = loss, beta, kl_weight
        self._optimizer = torch.optim.Adamax(self.policy.parameters(), lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)
        self._steps, self._average_beta = steps, average_beta
        self._steps_done, self._mass = 0, self._density(0)

    def step(
        self, clean: Tensor, attacked: Tensor, chosen: Tensor, rejected: Tensor, *,
        tokens_CL: Tensor | None = None,
    ) -> float:  # fmt: skip
        """One optimizer step; returns the loss.

        Args:
            clean, attacked: uint8 (B, 3, S, S).
            chosen, rejected: the true and the written class, int64 (B,).
            tokens_CL: the prompts; None: as open_clip pads them, to its whole context.
        """
        self._optimizer.zero_grad()
        tokens = self.tokens_CL if tokens_CL is None else tokens_CL
        pictures = torch.cat([clean, attacked])
        policy_clean, policy_attacked = self.logps(self.policy, pictures, tokens).chunk(2)
        reference_clean, reference_attacked = self.logps(self.reference, pictures, tokens).chunk(2)
        rows = torch.arange(len(chosen))
        kl = kl_reference_to_policy(policy_clean, reference_clean)
        loss = self._kl_weight * kl + preference_loss(
            self._loss,
            policy_attacked[rows, chosen], policy_attacked[rows, rejected],
            reference_attacked[rows, chosen], reference_attacked[rows, rejected],
            beta=self._beta, kl_baseline=kl,
        )  # fmt: skip
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._update_average()
        return loss.item()

    def logps(self, model: nn.Module, pictures: Tensor, tokens_CL: Tensor) -> Tensor:
        """Log-probabilities of the classes, float32 (pictures, C)."""
        pixels = self.processed(pictures).to(self.device)
        length = tokens_CL.shape[1]
        shorter = {
            "positional_embedding": model.positional_embedding[:length],  # type: ignore[index]
            "attn_mask": model.attn_mask[:length, :length],  # type: ignore[index]
        }
        image_BD, text_CD, scale = functional_call(model, shorter, (pixels, tokens_CL))
        return (scale * image_BD @ text_CD.T).log_softmax(1)

    def processed(self, pictures: Tensor) -> Tensor:
        """What Hugging Face's image processor does: resize, rescale and normalise, picture by picture."""
        side, done = self.side, []
        for picture in pictures.cpu():
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            resized = image.resize((side, side), Image.Resampling.BICUBIC)
            values = np.asarray(resized).astype(np.float32) * np.float32(1 / 255)
            done.append(((values - self._mean) / self._std).transpose(2, 0, 1))
        return torch.from_numpy(np.stack(done))

    def tokens_of(self, prompts: Sequence[str]) -> Tensor:
        """The prompts as open_clip's tokenizer pads them: to the model's whole context."""
        return self._tokenizer(list(prompts)).to(self.device)

    def padded_to_the_longest(self) -> Tensor:
        """The prompts as Hugging Face's tokenizer pads them: to the longest of them, not to the context."""
        return self.tokens_CL[:, : int(self.tokens_CL.argmax(1).max()) + 1].contiguous()

    def state_dict(self) -> dict[str, object]:
        """What the published code writes after every epoch."""
        parts = {"policy": self.policy, "average": self.average}
        state: dict[str, object] = {name: model.state_dict() for name, model in parts.items()}
        return state | {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def _update_average(self) -> None:
        self._steps_done += 1
        density = self._density(self._steps_done)
        share = density / self._mass
        for average, weight in zip(self.average.parameters(), self.policy.parameters(), strict=True):
            average.data = (average + share * weight.detach()) / (1 + share)
        self._mass += density

    def _density(self, step: int) -> float:
        x = (step + 0.5) / (self._steps + 1)
        return float((x * (1 - x)) ** (self._average_beta - 1))


class Pairs(Dataset[Pair]):
    """Pairs of one part of the task, decoded, resized and attacked anew whenever they are asked for.

    Args:
        part: ``train``, ``validation/seen``, ``test/held_out`` ...
        image_size: side of what the model takes; pictures come at 168/224 of it.
    """

    def __init__(self, data: DataConfig, part: str, image_size: int) -> None:
        task = TASKS["typographic"](data)
        self.candidates = task.parts[part].candidates
        self.classes = task.classes
        self.names = [task.classes[c] for c in self.candidates]
        self._pictures = task.parts[part].pictures
        self._style = WordStyle(fonts=FONTS[part.partition("/")[0]], font_size=data.font_size)
        self._seed = data.split_seed
        self._resized, self._tensor = _resized_to(image_size), PILToTensor()

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Pair:
        picture = self._pictures[index]
        assert isinstance(picture, LabelledImage)
        clean = self._resized(picture.load())
        pairs = attacked_pairs(
            clean, picture, self.classes, self.candidates, copies=1, style=self._style, seed=self._seed
        )
        pair = next(pairs)
        columns = self.candidates.index(pair.label), self.candidates.index(pair.attack_label)
        return self._tensor(pair.clean), self._tensor(pair.attacked), *columns


class Measured(Dataset[list[tuple[Tensor, int]]]):
    """The pictures that a part is measured on, composed anew whenever they are asked for, as ``Pairs``.

    For each picture of the part those of its first ``kinds`` sets: clean, attacked, a lone word, and for test
    a nonsense word; each with the column of its class.
    """

    def __init__(self, data: DataConfig, part: str, image_size: int, kinds: int) -> None:
        self._task, self._kinds = TASKS["typographic"](data), kinds
        self._part = self._task.parts[part]
        # In a function that Ray sends, ``.classes`` would be taken for torch's, which cannot be sent.
        self.names = [self._task.classes[c] for c in self._part.candidates]
        self._columns = {c: column for column, c in enumerate(self._part.candidates)}
        self._resized, self._tensor = _resized_to(image_size), PILToTensor()

    def __len__(self) -> int:
        return len(self._part.pictures)

    def __getitem__(self, index: int) -> list[tuple[Tensor, int]]:
        rows = islice(self._task.rows(self._part, index, self._resized), self._kinds)
        return [(self._tensor(row.image), self._columns[row.label]) for row in rows]


def _resized_to(image_size: int) -> Callable[[Image.Image], Image.Image]:
    side = round(SHARE * image_size)
    crop = Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side)])
    return lambda image: cast(Image.Image, crop(image.convert("RGB")))


def steps_of(pairs: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a run; no batch is dropped (the published code drops the last ones by mistake)."""
    return math.ceil(pairs / batch_size) * epochs
