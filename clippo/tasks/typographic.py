"""Robustness against typographic attacks, and what it costs.

Tuning sees the train pictures of the seen classes. Every measurement is on other pictures, with other
lettering: ``validation`` steers the search, ``test`` is only reported. The evaluation sets of each split are

    clean/*      pictures as they are: what the model could do before
    attacked/*   the same pictures with the name of another class written on them
    nonsense/*   the same pictures with a word of that shape that means nothing: what covering costs (test)
    mirrored/*   the same pictures with the same word mirrored: what covering costs (test, on request)
    reading/*    a class name on a picture of nothing: can it still read?

each for the seen classes and for the held-out ones, told apart among the classes of the same group. Other
test sets (``data.test_sets``) have classes of their own and are only reported: published photos of words on
objects as they are, pictures of another source as test/clean/NAME and test/attacked/NAME.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np
from PIL import Image

from clippo.config import DataConfig, digest
from clippo.data.attack import FONTS, WordStyle, draw_word
from clippo.data.datasets import SOURCES, ImageSource, LabelledImage, open_source
from clippo.data.pairs import PreferencePair, attacked_pairs, other_label, picture_rng
from clippo.data.prompts import templates_of
from clippo.data.typographic_sets import TYPOGRAPHIC_SETS, AttackedImage, TypographicSet, open_typographic_set
from clippo.errors import ConfigError
from clippo.evaluate.objectives import Goal, Objectives
from clippo.evaluate.words import Words
from clippo.tasks.base import PairTable, Part, Resize, Row, TrainRows, named_spec

# The nonsense control explains a result and steers nothing, so only the test split has it; so does the
# mirrored word, which is measured on request.
KINDS = {
    "validation": ("clean", "attacked", "reading"),
    "test": ("clean", "attacked", "reading", "nonsense"),
}

WORDS = Words(
    task="robustness to typographic attacks",
    goal="robustness",
    axis="robustness: accuracy on attacked pictures",
    heading="robust-\nness",
    short="rob.",
    best="most robust",
    explained="Robustness is the accuracy on pictures with a misleading word.",
    unseen="pictures, lettering and drawings",
    numbers={
        "attack_success_rate": "attacks that succeed",
        "robust_accuracy": "robust accuracy",
        "clean_accuracy": "clean accuracy",
        "reading_accuracy": "word reading",
        "nonsense_accuracy": "with a nonsense word",
        "mirrored_accuracy": "with the word mirrored",
    },
    tiles=("attack_success_rate", "reading_accuracy"),
    columns=(
        ("attack_success_rate", "fool\ned", "read as the written word"),
        ("reading_accuracy", "read", "accuracy of reading a lone word"),
    ),
    gallery=(
        "Attacked test pictures in the order in which they come, right and wrong alike: the true class, the "
        "word that is written on it, and each model's answer."
    ),
    tuned="tuned against typographic attacks",
    meaning="share of attacked pictures labelled right",
)

CONSONANTS, VOWELS, DIGITS = "bcdfghjklmnprstvwz", "aeiou", "0123456789"
TRIES = 20  # nonsense words of one shape that may be classes


@dataclass(frozen=True)
class TestSet:
    """A test set with classes of its own.

    Attributes:
        pictures: photos with a word on them, or pictures that a word is drawn on.
        first: index of its first class among the classes of the task.
    """

    name: str
    pictures: TypographicSet | ImageSource
    first: int
    prompt: str

    @property
    def candidates(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + len(self.pictures.classes)))


class TypographicTask:
    """Pairs and evaluation sets of one data configuration.

    Args:
        test_set_names: names for the classes of the test sets, as ``data.class_names`` for the source's.
    """

    pair_kinds: ClassVar[tuple[str, ...]] = ("attacked",)
    image_kinds: ClassVar[tuple[str, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ("kept_source", "top_k", "folds")
    words: ClassVar[Words] = WORDS
    gallery: ClassVar[tuple[str, ...]] = ("test/attacked/seen", "test/attacked/held_out")

    def __init__(self, config: DataConfig, test_set_names: str = "") -> None:
        self.config = config
        self.source: ImageSource = open_source(config.source, config.split_seed, config.class_names)
        self.test_sets: dict[str, TestSet] = {}
        first = len(self.source.classes)
        for spec in config.test_sets:
            name, pictures, prompt = open_test_set(spec, config.split_seed, test_set_names)
            if name in (*self.test_sets, "seen", "held_out"):
                rest = named_spec(spec)[1]
                raise ConfigError(f"data.test_sets has two sets named {name!r}; write NAME={rest} for one")
            self.test_sets[name] = TestSet(name, pictures, first, prompt)
            first += len(pictures.classes)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The source's classes, then those of each test set."""
        others = [c for test in self.test_sets.values() for c in test.pictures.classes]
        return (*self.source.classes, *others)

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """The prompt of each class; empty: the model's."""
        own = [""] * len(self.source.classes)
        return (*own, *(t.prompt for t in self.test_sets.values() for _ in t.candidates))

    @property
    def fingerprint(self) -> str:
        """Changes when the pictures change."""
        return digest(self.source.fingerprint, [t.pictures.fingerprint for t in self.test_sets.values()])

    @property
    def files(self) -> tuple[str, ...]:
        """Fonts that are not the bundled ones, and bundled ones by name."""
        config = self.config
        return (*config.train_fonts, *config.validation_fonts, *config.test_fonts)

    @property
    def n_pairs(self) -> int:
        return len(self.parts["train"].pictures) * self.config.attacked_copies

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """The classes that tuning sees, sorted."""
        order = np.random.default_rng(self.config.split_seed).permutation(len(self.source.classes))
        n_seen = min(len(order) - 2, max(2, round(self.config.seen_share * len(order))))
        return tuple(sorted(int(c) for c in order[:n_seen]))

    @cached_property
    def held_out(self) -> tuple[int, ...]:
        """The classes that tuning never sees, sorted."""
        return tuple(sorted(set(range(len(self.source.classes))) - set(self.seen)))

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Everything that a sweep prepares: ``train``, and seen and held-out classes of both other splits."""
        train = self.source.pictures("train", self.seen, self.config.train_pictures)
        sets = ("train/clean", "train/attacked")
        parts = [Part("train", train, self.seen, sets, copies=self.config.attacked_copies)]
        for split in ("validation", "test"):
            for group, labels in (("seen", self.seen), ("held_out", self.held_out)):
                pictures = self.source.pictures(split, labels, self.config.eval_pictures)
                names = tuple(f"{split}/{kind}/{group}" for kind in self._kinds(split))
                parts.append(Part(f"{split}/{group}", pictures, labels, names))
        parts += [self._test_part(test) for test in self.test_sets.values()]
        return {part.name: part for part in parts}

    def _kinds(self, split: str) -> tuple[str, ...]:
        on_request = ("mirrored",) if self.config.mirrored_words and split == "test" else ()
        return (*KINDS[split], *on_request)

    def _test_part(self, test: TestSet) -> Part:
        names = {kind: f"test/{kind}/{test.name}" for kind in ("clean", "attacked")}
        if isinstance(test.pictures, TypographicSet):
            twins = test.pictures.clean
            sets = tuple(names.values()) if twins else (names["attacked"],)
            pictures = (*twins, *test.pictures.attacked)
            return Part(f"test/{test.name}", pictures, test.candidates, sets, test.pictures.pairwise)
        split = "test" if test.pictures.has_splits else "all"
        labels = range(len(test.pictures.classes))
        found = test.pictures.pictures(split, labels, self.config.eval_pictures)
        return Part(f"test/{test.name}", found, test.candidates, tuple(names.values()))

    def rows(self, part: Part, index: int, resize: Resize) -> Iterator[Row]:
        """The rows that one picture of a part gives."""
        picture = part.pictures[index]
        clean = self._resized(picture.load(), resize)
        _, _, group = part.name.partition("/")
        if group in self.test_sets:
            yield from self._test_rows(self.test_sets[group], part, index, clean)
            return
        assert isinstance(picture, LabelledImage)
        if part.name == "train":
            yield Row("train/clean", clean, picture.label, -1)
            for pair in self.attacked(clean, picture):
                yield Row("train/attacked", pair.attacked, pair.label, pair.attack_label)
            return
        split, group = part.name.split("/")
        style = self._style(split)
        rng = picture_rng(self.config.split_seed, picture.key)
        word = other_label(picture.label, part.candidates, rng)
        name = self.classes[word]
        kinds = self._kinds(split)
        same_ink = copy.deepcopy(rng) if "mirrored" in kinds else rng
        yield Row(f"{split}/clean/{group}", clean, picture.label, -1)
        yield Row(f"{split}/attacked/{group}", draw_word(clean, name, rng, style=style), picture.label, word)
        nothing = self._resized(self.source.background(split, group, index).load(), resize)
        yield Row(f"{split}/reading/{group}", draw_word(nothing, name, rng, style=style), word, -1)
        if "nonsense" in kinds:
            nonsense = draw_word(clean, nonsense_like(name, self.classes, rng), rng, style=style)
            yield Row(f"{split}/nonsense/{group}", nonsense, picture.label, -1)
        if "mirrored" in kinds:
            mirrored = draw_word(clean, name, same_ink, style=style, mirrored=True)
            yield Row(f"{split}/mirrored/{group}", mirrored, picture.label, -1)

    def _test_rows(self, test: TestSet, part: Part, index: int, clean: Image.Image) -> Iterator[Row]:
        picture, first = part.pictures[index], test.first
        if isinstance(picture, AttackedImage):  # the word is there already, or was taken away
            assert isinstance(test.pictures, TypographicSet)
            kind = "clean" if index < len(test.pictures.clean) else "attacked"
            word = first + picture.attack_label if picture.attack_label >= 0 else -1
            yield Row(f"test/{kind}/{test.name}", clean, first + picture.label, word)
            return
        rng = picture_rng(self.config.split_seed, picture.key)
        label = first + picture.label
        word = other_label(label, test.candidates, rng)
        yield Row(f"test/clean/{test.name}", clean, label, -1)
        attacked = draw_word(clean, self.classes[word], rng, style=self._style("test"))
        yield Row(f"test/attacked/{test.name}", attacked, label, word)

    def _resized(self, image: Image.Image, resize: Resize) -> Image.Image:
        """A picture at the size that a word is drawn on."""
        side = self.config.picture_size
        if not side:
            return resize(image)
        scale = side / min(image.size)
        size = tuple(max(side, round(length * scale)) for length in image.size)
        resized = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return resized.crop((left, top, left + side, top + side))

    @staticmethod
    def objectives(config: DataConfig) -> Objectives:
        """Robustness, and what the attacks must not cost: seen and held-out classes, and reading."""
        goal = Goal(name="robustness", measure="right", sets=("attacked/seen", "attacked/held_out"))
        return Objectives(goal=goal, retention_sets=("clean/seen", "clean/held_out", "reading/held_out"))

    @staticmethod
    def pairs(kind: str, train: Mapping[str, TrainRows]) -> PairTable:
        """On each attacked picture the true class is preferred to the written one; the clean twin stays."""
        clean, attacked = train["train/clean"], train["train/attacked"]
        column = {label: i for i, label in enumerate(clean.candidates)}
        copies = len(attacked) // len(clean)
        return PairTable(
            captions=clean.candidates,
            picture_w=attacked.numbers,
            caption_w=np.array([column[label] for label in attacked.labels_N.tolist()]),
            picture_l=attacked.numbers,
            caption_l=np.array([column[label] for label in attacked.attack_labels_N.tolist()]),
            clean=clean.first + np.arange(len(attacked)) // copies,
        )

    @staticmethod
    def needs(config: DataConfig) -> Iterator[tuple[str, Callable[[], object]]]:
        source = partial(open_source, config.source, config.split_seed, config.class_names)
        yield f"pictures {config.source}", source
        for spec in config.test_sets:
            yield f"test set {spec}", partial(open_test_set, spec, config.split_seed)

    def attacked(self, clean: Image.Image, picture: LabelledImage) -> Iterator[PreferencePair]:
        """The attacked copies of one train picture, given as it is drawn on."""
        return attacked_pairs(
            clean, picture, self.classes, self.seen,
            copies=self.config.attacked_copies, style=self._style("train"), seed=self.config.split_seed,
        )  # fmt: skip

    def _style(self, split: str) -> WordStyle:
        fonts: tuple[str, ...] = getattr(self.config, f"{split}_fonts") or FONTS[split]
        return WordStyle(fonts=fonts, font_size=self.config.font_size)


def open_test_set(
    spec: str, seed: int, class_names: str = ""
) -> tuple[str, TypographicSet | ImageSource, str]:
    """Name, pictures and prompt of ``[NAME=]KIND:PATH``; without NAME the set is named after what it is.

    Raises:
        ConfigError: an unknown kind, a name that is none, or names for classes that have their own.
    """
    given, rest = named_spec(spec)
    kind, _, argument = rest.partition(":")
    if kind in TYPOGRAPHIC_SETS:
        if class_names:
            raise ConfigError(f"the classes of {kind} have names; leave class_names ({class_names}) empty")
        return given or kind, open_typographic_set(rest), ""
    if kind not in SOURCES:
        known = ", ".join((*TYPOGRAPHIC_SETS, *SOURCES))
        raise ConfigError(f"data.test_sets has {spec!r}; its kind must be one of: {known}")
    pictures = open_source(rest, seed, class_names)
    dataset = argument.partition(":")[0]
    name = given or (dataset if kind == "torchvision" else PurePosixPath(argument).name or kind)
    name = re.sub(r"[^\w-]+", "-", name)
    with contextlib.suppress(ConfigError):  # most data sets have no prompt of their own
        if kind == "torchvision" and templates_of(dataset):
            return name, pictures, dataset
    return name, pictures, ""


def nonsense_like(word: str, classes: Sequence[str], rng: np.random.Generator) -> str:
    """A word of the same length and letter shapes (vowel for vowel, digit for digit) that is no class.

    It is longer where the words of that shape seem to be classes, all of them.

    >>> nonsense_like("anchor", ["anchor"], np.random.default_rng(0))
    'upmgeb'
    """
    taken, shape = {name.casefold() for name in classes}, word.lower()
    while True:
        for _ in range(TRIES):
            nonsense = "".join(_like(letter, rng) for letter in shape)
            if nonsense not in taken:
                return nonsense
        shape += CONSONANTS[0]  # perhaps every word of that shape is a class


def _like(letter: str, rng: np.random.Generator) -> str:
    if letter.isalpha():
        pool = VOWELS if letter in VOWELS else CONSONANTS
    elif letter.isdecimal():
        pool = DIGITS
    else:
        return letter
    return pool[int(rng.integers(len(pool)))]
