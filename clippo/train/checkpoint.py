"""What a trial saves: its state after an epoch, to resume from, and the tuned weights at the end."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from clippo.errors import ConfigError
from clippo.model import Policy, Weights

STATE = "state.pt"
POLICY = "policy.safetensors"


class Checkpoints(Protocol):
    """Where a trial keeps its objects; a write is visible whole or not at all."""

    def write(self, name: str, data: bytes) -> None: ...
    def read(self, name: str) -> bytes | None:
        """The object, or None where there is none."""
        ...


class FileCheckpoints:
    """Checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_bytes(data)
        temporary.replace(self.folder / name)

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.exists() else None


def save_state(checkpoints: Checkpoints, state: dict[str, Any]) -> None:
    """Writes what a resumed run needs."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checkpoints.write(STATE, buffer.getvalue())


def load_state(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """What ``save_state`` wrote last, or None."""
    data = checkpoints.read(STATE)
    if data is None:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def weights_after(epoch: int) -> str:
    """Name of the object with the weights of a trial that was stopped after this epoch.

    Each epoch has its own: workers may be ahead of the epoch after which their trial is stopped.
    """
    return f"averaged-{epoch:03d}.safetensors"


def save_policy(
    checkpoints: Checkpoints, variants: Mapping[str, Mapping[str, Tensor]], name: str = POLICY
) -> None:
    """Writes the trained weights of each variant in one safetensors file, named ``<variant>/<parameter>``."""
    flat = {
        f"{v}/{n}": w.detach().cpu().contiguous()
        for v, weights in variants.items()
        for n, w in weights.items()
    }
    checkpoints.write(name, save(flat))


def load_policy(checkpoints: Checkpoints, name: str = POLICY) -> dict[str, dict[str, Tensor]] | None:
    """The variants that ``save_policy`` wrote, or None."""
    data = checkpoints.read(name)
    if data is None:
        return None
    variants: dict[str, dict[str, Tensor]] = {}
    for key, weight in load(data).items():
        variant, _, name = key.partition("/")
        variants.setdefault(variant, {})[name] = weight
    return variants


def weights_of(policy: Policy, saved: Mapping[str, Weights], variant: str) -> Weights:
    """The weights of a variant: one that was saved, or a point of the curve to the averaged ones.

    Args:
        policy: untouched, so that it holds the reference's weights.
        saved: what ``load_policy`` gave.
        variant: ``averaged``, ``last``, ``alpha=0.5`` of a tower or ``t=0.5`` of a transform.

    Raises:
        ConfigError: no such variant.
    """
    if variant in saved:
        return saved[variant]
    kind, _, number = variant.partition("=")
    with contextlib.suppress(ValueError):
        if math.isfinite(point := float(number)):
            curve = dict(policy.curve(policy.trainable_weights(), saved["averaged"], [point], [point]))
            if (weights := curve.get(f"{kind}={point:g}")) is not None:
                return weights
    ((example, _),) = policy.curve(policy.trainable_weights(), saved["averaged"], [0.5], [0.5])
    raise ConfigError(
        f"the trial has no weights {variant!r}; it has {', '.join(sorted(saved))} and such as {example}"
    )
