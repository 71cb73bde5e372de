"""Robustness against typographic attacks, and what it costs.

Tuning sees the train pictures of the seen classes. Every measurement is on other pictures, with other
lettering: ``validation`` steers the search, ``test`` is only reported. The evaluation sets of each split are

    clean/*      pictures as they are: what the model could do before
    attacked/*   the same pictures with the name of another class written on them
    nonsense/*   the same pictures with a word of that shape that means nothing: what covering costs (test)
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

Resize = Callable[[Image.Image], Image.Image]
"""Resizes and crops a picture to what the model takes; an attack is drawn on the result."""

# The nonsense control explains a result and steers nothing, so only the test split has it.
KINDS = {
    "validation": ("clean", "attacked", "reading"),
    "test": ("clean", "attacked", "reading", "nonsense"),
}

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


@dataclass(frozen=True)
class Part:
    """Pictures that are prepared together; each gives rows of several sets.

    Attributes:
        candidates: the classes that the model tells apart in these sets.
        sets: names of the sets.
    """

    name: str
    pictures: Sequence[LabelledImage]
    candidates: tuple[int, ...]
    sets: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A picture of a set as the model takes it; ``attack_label`` is -1 where no class is written."""

    set_name: str
    image: Image.Image
    label: int
    attack_label: int


class TypographicTask:
    """Pairs and evaluation sets of one data configuration."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.source: ImageSource = open_source(config.source, config.split_seed)

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

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Everything that a sweep prepares: ``train``, and seen and held-out classes of both other splits."""
        train = self.source.pictures("train", self.seen, self.config.train_pictures)
        parts = [Part("train", train, self.seen, ("train/clean", "train/attacked"))]
        for split in ("validation", "test"):
            for group, labels in (("seen", self.seen), ("held_out", self.held_out)):
                pictures = self.source.pictures(split, labels, self.config.eval_pictures)
                names = tuple(f"{split}/{kind}/{group}" for kind in KINDS[split])
                parts.append(Part(f"{split}/{group}", pictures, labels, names))
        return {part.name: part for part in parts}

    def rows(self, part: Part, index: int, resize: Resize) -> Iterator[Row]:
        """The rows that one picture of a part gives."""
        picture = part.pictures[index]
        clean = resize(picture.load())
        if part.name == "train":
            yield Row("train/clean", clean, picture.label, -1)
            for pair in self.pairs(clean, picture):
                yield Row("train/attacked", pair.attacked, pair.label, pair.attack_label)
            return
        split, group = part.name.split("/")
        style = self._style(split)
        rng = picture_rng(self.config.split_seed, picture.key)
        word = other_label(picture.label, part.candidates, rng)
        name = self.classes[word]
        yield Row(f"{split}/clean/{group}", clean, picture.label, -1)
        yield Row(f"{split}/attacked/{group}", draw_word(clean, name, rng, style=style), picture.label, word)
        nothing = resize(self.source.background(split, group, index).load())
        yield Row(f"{split}/reading/{group}", draw_word(nothing, name, rng, style=style), word, -1)
        if "nonsense" in KINDS[split]:
            nonsense = draw_word(clean, nonsense_like(name, self.classes, rng), rng, style=style)
            yield Row(f"{split}/nonsense/{group}", nonsense, picture.label, -1)

    def pairs(self, clean: Image.Image, picture: LabelledImage) -> Iterator[PreferencePair]:
        """The preference pairs of one train picture, given as the model takes it."""
        return attacked_pairs(
            clean, picture, self.classes, self.seen,
            copies=self.config.attacked_copies, style=self._style("train"), seed=self.config.split_seed,
        )  # fmt: skip

    def _style(self, split: str) -> WordStyle:
        fonts: tuple[str, ...] = getattr(self.config, f"{split}_fonts") or FONTS[split]
        return WordStyle(fonts=fonts, font_size=self.config.font_size)


def nonsense_like(word: str, classes: Sequence[str], rng: np.random.Generator) -> str:
    """A word of the same length and letter shapes (vowel for vowel) that is no class.

    >>> nonsense_like("anchor", ["anchor"], np.random.default_rng(0))
    'upmgeb'
    """
    while True:
        letters = []
        for letter in word.lower():
            pool = VOWELS if letter in VOWELS else CONSONANTS
            letters.append(pool[int(rng.integers(len(pool)))] if letter.isalpha() else letter)
        nonsense = "".join(letters)
        if nonsense not in classes:
            return nonsense
