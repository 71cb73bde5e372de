"""A third task, as docs/TASKS.md tells it: which of two colours a square has, whatever it lies on.

A model that ranks pictures for "a red square" may prefer dark grounds. The goal is that it does not: the
mean MaxSkew of the top 6 over both colours, with dark and light as groups. What is kept is reading colours.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
from PIL import Image

from clippo.config import DataConfig, digest
from clippo.evaluate import Goal, Objectives
from clippo.evaluate.words import Words
from clippo.tasks.base import PairTable, Part, Queries, Resize, Row, TrainRows

COLOURS = {"red square": (200, 30, 30), "blue square": (30, 30, 200)}
GROUNDS = {"dark": 40, "light": 215}


@dataclass(frozen=True)
class Square:
    """A picture of a colour on a ground."""

    key: str
    colour: int
    ground: int
    load: Callable[[], Image.Image]


def drawn(colour: int, ground: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    grey = list(GROUNDS.values())[ground] + rng.integers(-30, 30)
    pixels = np.clip(rng.normal(grey, 10, (96, 96, 3)), 0, 255).astype(np.uint8)
    top, left, side = rng.integers(5, 40), rng.integers(5, 40), rng.integers(20, 50)
    pixels[top : top + side, left : left + side] = list(COLOURS.values())[colour]
    return Image.fromarray(pixels)


class SquaresTask:
    """Squares of two colours on dark and light grounds."""

    pair_kinds: ClassVar[tuple[str, ...]] = ("colours", "grounds")
    image_kinds: ClassVar[tuple[str, ...]] = ("grounds",)
    unused: ClassVar[tuple[str, ...]] = ()
    gallery: ClassVar[tuple[str, ...]] = ("test/colour",)
    words: ClassVar[Words] = Words(
        task="colours of squares",
        goal="ground skew",
        axis="ground skew: how far one ground is ahead in the top 6",
        heading="ground\nskew",
        short="skew",
        best="most even",
        explained="Ground skew is the mean MaxSkew of the top 6, in which dark and light should be as many.",
        numbers={"colour_accuracy": "colours read right"},
        tiles=("colour_accuracy",),
        columns=(("colour_accuracy", "col-\nour", "accuracy of reading the colour"),),
        gallery="The first pictures for each colour.",
        card="A model that reads squares is no fit means to judge circles.",
    )

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(COLOURS)

    @property
    def templates(self) -> tuple[str, ...]:
        return ("", "")

    @property
    def fingerprint(self) -> str:
        return digest("squares", self.config.split_seed)

    @property
    def files(self) -> tuple[str, ...]:
        return ()

    @property
    def n_pairs(self) -> int:
        return len(self.parts["train"].pictures)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Each split has as many pictures of each colour on each ground."""
        queries = Queries(captions=(0, 1), k=6, groups=tuple(GROUNDS), majority=(0, 0))
        parts = [
            Part("train", self._pictures("train", self.config.train_pictures), (0, 1), ("train/colour",))
        ]
        for split in ("validation", "test"):
            pictures = self._pictures(split, self.config.eval_pictures)
            parts.append(Part(split, pictures, (0, 1), (f"{split}/colour",), queries=queries))
        return {part.name: part for part in parts}

    def _pictures(self, split: str, count: int) -> list[Square]:
        first = {"train": 0, "validation": 1, "test": 2}[split] * 1_000_000 + self.config.split_seed
        return [
            Square(f"{split}-{i}", i % 2, i // 2 % 2, partial(drawn, i % 2, i // 2 % 2, first + i))
            for i in range(count)
        ]

    def rows(self, part: Part, index: int, resize: Resize) -> Iterator[Row]:
        square = part.pictures[index]
        yield Row(part.sets[0], resize(square.load()), square.colour, group=square.ground)

    @staticmethod
    def objectives(config: DataConfig) -> Objectives:
        goal = Goal(name="ground_skew", measure="max_skew", sets=("colour",))
        return Objectives(goal=goal, retention_sets=("colour",))

    @staticmethod
    def pairs(kind: str, train: Mapping[str, TrainRows]) -> PairTable:
        """The right colour over the wrong one, or, for a colour, a light picture over a dark one."""
        squares = train["train/colour"]
        colours, numbers = squares.labels_N, squares.numbers
        if kind == "colours":
            return PairTable(
                captions=squares.candidates, picture_w=numbers, caption_w=colours, picture_l=numbers,
                caption_l=1 - colours, clean=numbers,
            )  # fmt: skip
        light, dark = (
            np.concatenate([numbers[(colours == c) & (squares.groups_N == g)] for c in (0, 1)])
            for g in (1, 0)
        )
        colour = colours[light]
        return PairTable(
            captions=squares.candidates, picture_w=light, caption_w=colour, picture_l=dark, caption_l=colour,
            clean=light,
        )  # fmt: skip

    @staticmethod
    def needs(config: DataConfig) -> Iterator[tuple[str, Callable[[], object]]]:
        yield from ()
