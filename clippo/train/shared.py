"""What all trials of a sweep share, and the processes that they run in; nothing here knows of Ray."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import dataclass
from functools import lru_cache

import torch

from clippo.config import ModelConfig, TrainConfig
from clippo.model import ClipModel, load_clip
from clippo.prepared import Location, PreparedSet, fetch, open_prepared, text_features
from clippo.train.step import Frozen


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all trials of a sweep share; each process loads it once.

    Attributes:
        prepared: name of the prepared set.
        location: where it is kept, and where this node maps it from.
        on_gpu: whether trials run on GPUs; Ray shows them to processes that have not asked for one, too.
    """

    model: ModelConfig
    train: TrainConfig
    prepared: str
    location: Location
    on_gpu: bool = False


@lru_cache(maxsize=1)
def load_shared(shared: Shared) -> tuple[ClipModel, PreparedSet, Frozen]:
    """The model, the prepared set and the text features; a process that runs many trials loads them once."""
    clip = load_clip(shared.model.name, shared.model.pretrained)
    prepared = open_prepared(fetch(shared.prepared, shared.location))
    templates = prepared.templates_per_class(shared.model.prompt)
    text_CD = text_features(clip, prepared.classes, templates, shared.location)
    # What is there now stays; no trial's collection need look at it, which took 0.2 s.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return clip, prepared, Frozen(text_CD, clip.logit_scale)


def device_of(shared: Shared) -> torch.device:
    """Where a trial in its own process trains, and where the reference is measured."""
    return torch.device("cuda" if shared.on_gpu and torch.cuda.is_available() else "cpu")


def give_back_memory() -> None:
    """Gives the system the memory that earlier trials of this process have freed.

    glibc keeps it for each thread apart, and every trial has a thread of its own: that was a gigabyte a trial
    for ViT-B-32.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
