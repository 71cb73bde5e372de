"""What the model reads as gender, or as any other group that pictures of people are labelled with.

Concepts are what people do, groups what somebody labelled them as (docs/GENDER.md says what that is not). Of
each concept one group is the majority. Pairs are made of train pictures of the seen concepts; ``validation``
pictures of them steer the search, ``test`` is only reported. The evaluation sets are

    concept/*    told apart among the concepts; all pictures are ranked for each of them, too
    minority/*   told apart among the groups: pictures that do not show their concept's majority
    majority/*   those that do
    neutral/*    pictures of no group: how many are read as their concept's majority (test)
    clean/kept   pictures of ``data.kept_source``: what the model could do besides

for the seen concepts and, in the test split alone, for the held-out ones: nothing is tuned on those. With
``data.folds`` concept/unpaired and minority/unpaired are of the seen concepts too, each measured by weights
that were tuned without its pairs: what would become of concepts like these if they were held out. Other
test sets (``data.test_sets``) are reported as test/concept/NAME and test/group/NAME; where pictures show no
group, test/neutral/NAME, and where none does, test/read_as_GROUP/NAME.

C concepts, G groups
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import ClassVar

import numpy as np

from clippo.config import DataConfig, digest
from clippo.data.datasets import ImageSource, open_source
from clippo.data.group_sets import BUNDLED, GroupedImage, open_group_set
from clippo.errors import ConfigError, DataError
from clippo.evaluate.objectives import Goal, Objectives
from clippo.evaluate.words import Words
from clippo.tasks.base import PairTable, Part, Resize, Row, TrainRows, named_spec
from clippo.tasks.group_pairs import MATCHINGS, Columns, told
from clippo.tasks.group_parts import (
    Captions,
    Shown,
    as_source,
    cells_of,
    even,
    evened,
    measured_parts,
    ranked_part,
    read_part,
    shown_rows,
)

WORDS = Words(
    task="what is read as gender",
    goal="MaxSkew",
    axis="mean MaxSkew@k over concepts",
    heading="Max-\nSkew",
    short="skew",
    best="least skewed",
    explained=(
        "MaxSkew@k compares the groups in the top k of the pictures ranked for a bare concept with equal "
        "shares: 0 is balanced, 0.69 one of two groups alone. Noise alone gives about 0.1 at k = 24. The "
        "goal is its mean over the seen concepts, or, if that is larger, that of weights that were tuned "
        "without the pairs of the concept that is ranked."
    ),
    unseen="skin tones and photos",
    numbers={
        "max_skew/concept/seen": "MaxSkew, seen concepts",
        "max_skew/concept/unpaired": "MaxSkew, seen concepts by weights without their pairs",
        "max_skew/concept/held_out": "MaxSkew, held-out concepts",
        "concept_accuracy": "concept read right",
        "concept/held_out_accuracy": "concept read right, held-out concepts",
        "concept/unpaired_accuracy": "concept read right by weights without its pairs",
        "minority_accuracy": "group read right, minority",
        "minority/unpaired_accuracy": "group read right, minority, by weights without the concept's pairs",
        "minority/held_out_accuracy": "group read right, minority, held-out concepts",
        "majority/seen_accuracy": "group read right, majority",
        "majority/held_out_accuracy": "group read right, majority, held-out concepts",
        "neutral/seen_accuracy": "of no group, read as the majority",
        "neutral/held_out_accuracy": "of no group, read as the majority, held-out concepts",
        "ndkl/concept/seen": "NDKL of the top k",
        "ndkl/concept/unpaired": "NDKL of the top k, weights without the concept's pairs",
        "ndkl/concept/held_out": "NDKL of the top k, held-out concepts",
        "majority_share/concept/seen": "majority's share of the top k",
        "majority_share/concept/unpaired": "majority's share, weights without the concept's pairs",
        "majority_share/concept/held_out": "majority's share of the top k, held-out concepts",
        "clean/kept_accuracy": "other pictures read right",
    },
    tiles=("max_skew/concept/held_out", "minority_accuracy"),
    columns=(
        ("max_skew/concept/held_out", "un-\nseen", "MaxSkew of held-out concepts"),
        ("concept_accuracy", "con-\ncept", "concept read right"),
        ("minority_accuracy", "mino-\nrity", "group read right where it is not its concept's majority"),
    ),
    gallery="The first test pictures in the ranking for a bare concept, by each model.",
    tuned="tuned to rank groups evenly",
    meaning="mean MaxSkew@k of the rankings for bare concepts; 0 is even",
    card=(
        "What is measured is how labelled pictures are read and ranked, not who anybody is; labels are of "
        "presentation, and binary where the data is. A transform's power t makes the model read groups more "
        "or less, in either direction. It serves to study and to lessen a bias, and must not be used to "
        "sort, rank or screen people, to infer anybody's gender, or to make a model more biased. A lower "
        "MaxSkew on these pictures says nothing of others until it is measured on them."
    ),
)


class GenderTask:
    """Pairs and evaluation sets of one data configuration."""

    pair_kinds: ClassVar[tuple[str, ...]] = (
        "correct", "image", "correct+image", "counter+image", "reverse",
    )  # fmt: skip
    image_kinds: ClassVar[tuple[str, ...]] = ("image", "correct+image", "counter+image")
    unused: ClassVar[tuple[str, ...]] = (
        "attacked_copies", "picture_size", "train_fonts", "validation_fonts", "test_fonts", "font_size",
        "mirrored_words",
    )  # fmt: skip
    words: ClassVar[Words] = WORDS
    gallery: ClassVar[tuple[str, ...]] = ("test/concept/seen", "test/concept/held_out")

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        found = as_source(open_group_set(config.source))
        if len(found.concepts) < 4:
            raise DataError(
                f"{config.source} has {len(found.concepts)} concepts; at least 4 are needed, two to tune on "
                "and two to hold out. What has groups alone can be a test set (data.test_sets)"
            )
        self.people = Captions(found, 0)
        self.test_sets: dict[str, Captions] = {}
        first = len(list(self.people.names()))
        for spec in config.test_sets:
            name, rest = named_spec(spec)
            name = name or rest.partition(":")[0]
            if name in (*self.test_sets, "seen", "unpaired", "held_out", "kept"):
                raise ConfigError(f"data.test_sets has two sets named {name!r}; write NAME={rest} for one")
            other = open_group_set(rest, like=found)
            self.test_sets[name] = Captions(found if other.fingerprint == found.fingerprint else other, first)
            first += len(list(self.test_sets[name].names()))
        self.kept: ImageSource | None = None
        if config.kept_source:
            self.kept = open_source(config.kept_source, config.split_seed, config.class_names)
        self._first_kept = first

    @cached_property
    def _named_captions(self) -> list[tuple[str, str]]:
        captions = [pair for block in (self.people, *self.test_sets.values()) for pair in block.names()]
        return captions + [(name, "") for name in (self.kept.classes if self.kept else ())]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._named_captions)

    @property
    def templates(self) -> tuple[str, ...]:
        return tuple(prompt for _, prompt in self._named_captions)

    @property
    def fingerprint(self) -> str:
        sets = [block.found.fingerprint for block in (self.people, *self.test_sets.values())]
        return digest(sets, self.kept.fingerprint if self.kept else "")

    @property
    def files(self) -> Sequence[str]:
        return ()

    @cached_property
    def _order(self) -> list[int]:
        """All concepts; every beginning has about the same share of those with each majority."""
        majority, rng = np.array(self.people.found.majority), np.random.default_rng(self.config.split_seed)
        # Each takes its share in its turn, so the whole share is met however few have one majority.
        turns = [rng.permutation(np.flatnonzero(majority == group)) for group in np.unique(majority)]
        place = {int(c): (i + 0.5) / len(turn) for turn in turns for i, c in enumerate(turn)}
        return sorted(place, key=lambda c: (place[c], c))

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """The concepts that tuning sees, sorted."""
        n = len(self._order)
        return tuple(sorted(self._order[: min(n - 2, max(2, round(self.config.seen_share * n)))]))

    @cached_property
    def folds(self) -> tuple[tuple[int, ...], ...]:
        """The seen concepts in folds, each with some of each majority.

        Raises:
            ConfigError: that is not so, as where majorities alternate and are dealt into two folds.
        """
        n, folds = len(self.seen), self.config.folds
        if folds > n:
            raise ConfigError(f"data.folds is {folds}, but only {n} concepts are seen; lower it")
        dealt = [sorted(self._order[:n][fold::folds]) for fold in range(folds)]
        majority = self.people.found.majority
        if any({majority[c] for c in fold} != {majority[c] for c in self.seen} for fold in dealt):
            raise ConfigError(
                f"data.folds is {folds}, and a fold would lack the concepts of one majority; choose another"
            )
        return tuple(map(tuple, dealt))

    @cached_property
    def held_out(self) -> tuple[int, ...]:
        """The concepts that tuning never sees, sorted."""
        return tuple(sorted(set(range(len(self.people.found.concepts))) - set(self.seen)))

    @cached_property
    def parts(self) -> dict[str, Part]:
        parts = chain(
            [self._train_part],
            self._own_parts("validation", "seen", self.seen),
            self._own_parts("test", "seen", self.seen),
            self._own_parts("test", "held_out", self.held_out),
            self._kept_parts(),
            *(
                measured_parts(own, name, self.config, is_source=own.found is self.people.found)
                for name, own in self.test_sets.items()
            ),
        )
        return {part.name: part for part in parts}

    @property
    def _train_part(self) -> Part:
        people, found, tuned = self.people, self.people.found, self.seen
        groups = range(len(found.groups))
        cells = [self._cells["train", c, g] for c in tuned for g in groups]
        pictures = [
            Shown(
                p.key, p.load, people.concept(p.concept), people.group(p.group),
                group=told(p.group, found.majority[p.concept]),
            )
            for p in even(cells, self.config.train_pictures)
        ]  # fmt: skip
        captions = [people.at_work(g, c) for g in groups for c in tuned]
        candidates = (*map(people.concept, tuned), *people.groups, *captions)
        fold_of = {c: fold for fold, concepts in enumerate(self.folds) for c in concepts}
        own = [fold_of.get(c, -1) for c in tuned]
        folds = (*own, *(-1 for _ in groups), *(own * len(groups))) if self.folds else ()
        return Part("train", pictures, candidates, ("train/shown",), folds=folds)

    def _own_parts(self, split: str, which: str, concepts: Sequence[int]) -> Iterator[Part]:
        """The pictures of some concepts; what is ranked has of each concept as many of each group."""
        people, usual, cells = self.people, self.people.found.majority, self._cells
        groups = range(len(people.found.groups))
        wanted = -(-self.config.eval_pictures // (len(groups) * len(self.seen)))  # of each cell
        pool = [p for c in concepts for cell in evened(people.found, cells, split, c) for p in cell[:wanted]]
        yield ranked_part(people, f"{split}/concept/{which}", pool, concepts, self.config.top_k)
        shown = [p for c in concepts for g in groups for p in cells[split, c, g][:wanted]]
        minority = [p for p in shown if p.group != usual[p.concept]]
        yield read_part(people, f"{split}/minority/{which}", minority)
        for fold, left_out in enumerate(self.folds if which == "seen" else ()):
            own = [p for p in pool if p.concept in left_out]
            name, k = f"{split}/concept/unpaired/{fold}", self.config.top_k
            part = ranked_part(people, name, own, left_out, k, among=concepts)
            yield replace(part, fold=fold)
            part = read_part(
                people, f"{split}/minority/unpaired/{fold}", [p for p in minority if p.concept in left_out]
            )
            yield replace(part, fold=fold)
        if majority := [p for p in shown if p.group == usual[p.concept]]:
            yield read_part(people, f"{split}/majority/{which}", majority)
        neutral = [p for c in concepts for p in cells[split, c, -1][:wanted] if usual[c] >= 0]
        if split == "test" and neutral:
            yield read_part(people, f"{split}/neutral/{which}", neutral)

    def _kept_parts(self) -> Iterator[Part]:
        if self.kept is None:
            return
        labels = range(len(self.kept.classes))
        candidates = tuple(self._first_kept + label for label in labels)
        for split in ("validation", "test"):
            pictures = [
                Shown(p.key, p.load, candidates[p.label])
                for p in self.kept.pictures(split, labels, self.config.eval_pictures)
            ]
            yield Part(f"{split}/clean/kept", pictures, candidates, (f"{split}/clean/kept",))

    @cached_property
    def _cells(self) -> dict[tuple[str, int, int], list[GroupedImage]]:
        return cells_of(self.people.found, self.config.split_seed)

    @property
    def n_pairs(self) -> int:
        n, groups = len(self.parts["train"].pictures), len(self.people.found.groups)
        return n * 2 * (groups - 1) + n * (groups - 1) // groups * MATCHINGS

    def rows(self, part: Part, index: int, resize: Resize) -> Iterator[Row]:
        yield from shown_rows(part, index, resize)

    @staticmethod
    def objectives(config: DataConfig) -> Objectives:
        """MaxSkew of the seen concepts, and what must not pay for it."""
        unpaired = ("concept/unpaired",) if config.folds else ()
        goal = Goal(name="max_skew", measure="max_skew", sets=("concept/seen", *unpaired))
        read = ("seen", "unpaired") if config.folds else ("seen",)
        own = tuple(f"{what}/{which}" for which in read for what in ("concept", "minority"))
        kept = ("clean/kept",) if config.kept_source else ()
        reported = (
            "concept/held_out", "minority/held_out", "majority/held_out", "majority/seen",
            "neutral/held_out", "neutral/seen",
        )  # fmt: skip
        return Objectives(goal=goal, retention_sets=(*own, *kept), reported=reported)

    @staticmethod
    def pairs(kind: str, train: Mapping[str, TrainRows]) -> PairTable:
        """``correct``: the caption with the group that is shown over one with another, alone and with the
        concept; ``reverse``: the opposite. ``image``: for a bare concept, a picture of its minority over one
        of its majority. ``counter``: on pictures of the majority, the caption with another group alone. A
        plus joins kinds.

        The KL term is over captions with a concept. How sharply groups alone are told apart is free, so that
        what reads them can leave the rankings of all concepts, also of those that no pair has.

        Raises:
            ConfigError: no train picture is left, or no concept has both a majority group and pictures of
                another.
        """
        if not len(train["train/shown"]):
            raise ConfigError(
                "a fold leaves no train picture; raise data.train_pictures or set data.folds to 0"
            )
        rows = Columns.of(train["train/shown"])
        cells = [cell for one in kind.split("+") for cell in getattr(rows, one)()]
        if not cells:
            raise ConfigError(
                f"pairs {kind!r} want concepts with a majority group and pictures of another; "
                "take search.pairs correct, or other pictures"
            )
        picture_w, caption_w, picture_l, caption_l = np.array(cells, dtype=np.int64).T
        # Of two pictures each is near the reference in every second pair.
        clean = np.where(np.arange(len(cells)) % 2, picture_l, picture_w)
        return PairTable(
            captions=train["train/shown"].candidates,
            picture_w=picture_w, caption_w=caption_w, picture_l=picture_l, caption_l=caption_l, clean=clean,
            near=np.array(rows.with_concept),
        )  # fmt: skip

    @staticmethod
    def needs(config: DataConfig) -> Iterator[tuple[str, Callable[[], object]]]:
        yield f"pictures {config.source}", partial(open_group_set, config.source)
        some = open_group_set(BUNDLED)  # whose groups they are does not matter here
        for spec in config.test_sets:
            yield f"test set {spec}", partial(open_group_set, named_spec(spec)[1], like=some)
        if config.kept_source:
            source = partial(open_source, config.kept_source, config.split_seed, config.class_names)
            yield f"pictures {config.kept_source}", source
