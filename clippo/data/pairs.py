"""Preference pairs: a picture, its attacked twin, and the two labels to choose between."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clippo.data.attack import WordStyle, draw_word
from clippo.data.datasets import LabelledImage


@dataclass(frozen=True)
class PreferencePair:
    """What the policy learns from: on ``attacked``, prefer ``label`` over ``attack_label``."""

    clean: Image.Image
    attacked: Image.Image
    label: int
    attack_label: int
    attack_word: str


def picture_rng(seed: int, key: str, copy: int = 0) -> np.random.Generator:
    """The random numbers of one copy of one picture, whatever the order or process that it is made in."""
    return np.random.default_rng([seed, zlib.crc32(key.encode()), copy])


def other_label(label: int, labels: Sequence[int], rng: np.random.Generator) -> int:
    """One of ``labels`` that is not ``label``, uniformly."""
    others = [c for c in labels if c != label]
    return others[int(rng.integers(len(others)))]


def attacked_pairs(
    clean: Image.Image, picture: LabelledImage, classes: Sequence[str], labels: Sequence[int], *,
    copies: int, style: WordStyle, seed: int,
) -> Iterator[PreferencePair]:  # fmt: skip
    """The attacked copies of one picture, each with the name of another of ``labels`` written on it.

    Args:
        clean: the picture as the model takes it, resized and cropped.
        picture: its key and label.
    """
    for copy in range(copies):
        rng = picture_rng(seed, picture.key, copy)
        attack_label = other_label(picture.label, labels, rng)
        word = classes[attack_label]
        yield PreferencePair(
            clean, draw_word(clean, word, rng, style=style), picture.label, attack_label, word
        )
