"""Robustness against typographic attacks, and what it costs.

Tuning sees the train pictures of the seen classes. Every measurement is on other pictures, with other
lettering: ``validation`` steers the search, ``test`` is only reported. The evaluation sets of each split are

    clean/*      pictures as they are: what the model could do before
    attacked/*   the same pictures with the name of another class written on them
    nonsense/*   the same pictures with a word of the same shape that means nothing: what covering costs
    reading/*    a class name on a picture of nothing: can it still read?

each for the seen classes and for the held-out ones, told apart among the classes of the same group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from clippo.config import DataConfig
from clippo.data.attack import FONTS, WordStyle, draw_word
from clippo.data.datasets import ImageSource, LabelledImage, open_source
from clippo.data.pairs import PreferencePair, attacked_pairs, other_label, picture_rng
from clippo.errors import DataError

Prepare = Callable[[Image.Image], Image.Image]
"""Resizes and crops a picture to what the model takes; an attack is drawn on the result."""

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


@dataclass(frozen=True)
class EvaluationSet:
    """Pictures with labels; ``attack_label`` is -1 where no class is written.

    Attributes:
        candidates: the classes that the model chooses among.
    """

    name: str
    candidates: tuple[int, ...]
    pictures: Callable[[Prepare], Iterator[tuple[Image.Image, int, int]]]
    size: int


class TypographicTask:
    """Pairs and evaluation sets of one data configuration."""

    KINDS = ("clean", "attacked", "nonsense", "reading")

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.source: ImageSource = open_source(config.source, config.split_seed)
        if len(self.classes) < 4:
            raise DataError(f"{config.source} has {len(self.classes)} classes; at least 4 are needed")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """The classes that tuning sees, sorted."""
        order = np.random.default_rng(self.config.split_seed).permutation(len(self.classes))
        n_seen = min(len(order) - 2, max(2, round(self.config.seen_share * len(order))))
        return tuple(sorted(int(c) for c in order[:n_seen]))

    @cached_property
    def held_out(self) -> tuple[int, ...]:
        """The classes that tuning never sees, sorted."""
        return tuple(sorted(set(range(len(self.classes))) - set(self.seen)))

    def train_pictures(self) -> list[LabelledImage]:
        pictures = self.source.pictures("train", self.seen, self.config.train_pictures)
        if len(pictures) < 2:
            raise DataError(f"{self.config.source} has {len(pictures)} train pictures; at least 2 are needed")
        return pictures

    def pairs(self, clean: Image.Image, picture: LabelledImage) -> Iterator[PreferencePair]:
        """The preference pairs of one train picture, given as the model takes it."""
        return attacked_pairs(
            clean, picture, self.classes, self.seen,
            copies=self.config.attacked_copies, style=self._style("train"), seed=self.config.split_seed,
        )  # fmt: skip

    def evaluation_sets(self, split: str) -> list[EvaluationSet]:
        """The sets of ``validation`` or ``test``."""
        return [
            self._evaluation_set(split, kind, group, labels)
            for group, labels in (("seen", self.seen), ("held_out", self.held_out))
            for kind in self.KINDS
        ]

    def _evaluation_set(self, split: str, kind: str, group: str, labels: tuple[int, ...]) -> EvaluationSet:
        n, seed, style = self.config.eval_pictures, self.config.split_seed, self._style(split)
        if kind == "reading":
            images = self.source.backgrounds(split, n)
        else:
            images = self.source.pictures(split, labels, n)

        def pictures(prepare: Prepare) -> Iterator[tuple[Image.Image, int, int]]:
            for i, picture in enumerate(images):
                # One stream per picture and kind, so that seen and held-out sets do not share words.
                rng = picture_rng(seed, f"{kind}/{group}/{picture.key}")
                image = prepare(picture.load())
                if kind == "clean":
                    yield image, picture.label, -1
                elif kind == "attacked":
                    word = other_label(picture.label, labels, rng)
                    yield draw_word(image, self.classes[word], rng, style=style), picture.label, word
                elif kind == "nonsense":
                    word = other_label(picture.label, labels, rng)
                    shape = nonsense_like(self.classes[word], self.classes, rng)
                    yield draw_word(image, shape, rng, style=style), picture.label, -1
                else:
                    word = labels[i % len(labels)]
                    yield draw_word(image, self.classes[word], rng, style=style), word, -1

        return EvaluationSet(f"{split}/{kind}/{group}", labels, pictures, len(images))

    def _style(self, split: str) -> WordStyle:
        return WordStyle(fonts=FONTS[split], font_size=self.config.font_size)


def nonsense_like(word: str, classes: Sequence[str], rng: np.random.Generator) -> str:
    """A word of the same length and letter shapes (vowel for vowel) that is no class.

    >>> nonsense_like("anchor", ["anchor"], np.random.default_rng(0))
    'unntuw'
    """
    while True:
        letters = []
        for letter in word.lower():
            pool = VOWELS if letter in VOWELS else CONSONANTS
            letters.append(pool[int(rng.integers(len(pool)))] if letter.isalpha() else letter)
        nonsense = "".join(letters)
        if nonsense not in classes:
            return nonsense
