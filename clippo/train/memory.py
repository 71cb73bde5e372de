"""How much memory a trial needs, roughly, before it is run.

The activations are those of two small forward passes of the model itself, what comes besides is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.filesize import decimal

from clippo.config import SweepConfig
from clippo.model import ClipModel, Policy, policy_of
from clippo.train.step import autocast, resolved_precision

PROCESS = 700_000_000  # Python with torch, open_clip and Ray; pages shared with others count in part [bytes]
COPIES = ("the reference", "the average", "gradients", "two of the optimizer")
"""Copies of what is trained, besides the weights themselves."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one process of a trial holds [bytes].

    Attributes:
        model: both towers as they were loaded, which stay in the host's memory.
        policy: the model that is tuned, of which ``trained`` bytes are.
        copies: of the trained weights during a step; ``curve`` more are made for the trial's last evaluation.
        activations: what a step keeps for its backward pass, for each of ``pairs`` pairs.
        fixed: what it keeps once, such as weights in the precision of the step.
    """

    model: int
    policy: int
    trained: int
    copies: int
    curve: int
    activations: int
    fixed: int
    pairs: int

    @property
    def step(self) -> int:
        return self.policy + self.copies * self.trained + self.fixed + self.pairs * self.activations

    @property
    def evaluation(self) -> int:
        return self.policy + (self.copies + self.curve) * self.trained

    @property
    def device(self) -> int:
        """The most that is held at once where the policy is."""
        return max(self.step, self.evaluation)

    @property
    def host(self) -> int:
        """What the process holds besides."""
        return PROCESS + self.model

    def __str__(self) -> str:
        """The arithmetic."""
        shown = {name: decimal(value) for name, value in vars(self).items()}
        weights = f"{shown['policy']} weights + {self.copies} x {shown['trained']} trained"
        if self.step >= self.evaluation:
            rest = f" + {self.pairs} pairs x {shown['activations']}" + f" + {shown['fixed']}" * bool(
                self.fixed
            )
        else:
            rest = f" + {self.curve} x {shown['trained']} of the curve"
        return f"{decimal(self.device)} = {weights}{rest}"


def estimated_memory(config: SweepConfig, clip: ClipModel) -> Memory:
    """What each process of a trial needs.

    Raises:
        ConfigError: ``model.trainable`` is not possible with this model.
    """
    policy = policy_of(clip, config.model.trainable).eval()
    pairs = -(-config.train.batch_size // max(1, config.min_workers))
    one, two = (_kept(policy, clip, config, n) for n in (1, 2))
    return Memory(
        model=_bytes(clip.model.state_dict()),
        policy=_bytes(policy.state_dict()),
        trained=_bytes(policy.trainable_weights()),
        copies=len(COPIES) + 1 + (config.max_workers > 1),  # the ranks exchange gradients through buffers
        curve=2,  # the last weights, and one point of the curve at a time
        activations=two - one,
        fixed=max(0, 2 * one - two),
        pairs=min(pairs, config.train.micro_batch or pairs),
    )


def _kept(policy: Policy, clip: ClipModel, config: SweepConfig, pairs: int) -> int:
    """Bytes that a forward pass of so many pairs keeps for the backward pass."""
    own = {w.untyped_storage().data_ptr() for w in policy.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    height, width = clip.image_size
    pixels = torch.randint(0, 256, (2 * pairs, height, width, 3), dtype=torch.uint8)
    inputs, text_CD = policy.frozen(pixels), clip.text_features(["a picture"])
    own.add(inputs.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _cast(config):
        embeddings = policy(inputs, text_CD)  # held, or what it keeps would be freed and counted once
    del embeddings
    return sum(kept.values())


def _cast(config: SweepConfig) -> Any:
    """The precision of a step on the device that trials use, carried out on this CPU."""
    cpu = torch.device("cpu")
    if not config.gpus_per_worker:
        return autocast(resolved_precision(config.train.precision, cpu), cpu)()
    # GPUs that lack bfloat16 are rare by now; float16 takes the same room.
    return torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision != "fp32")


def _bytes(weights: Any) -> int:
    return sum(w.nbytes for w in weights.values())
