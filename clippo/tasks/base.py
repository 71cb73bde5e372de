"""What a task is: all that differs between tasks, and nothing that does not.

A task names classes (whatever a caption is made of), lends pictures, says which of them make preference pairs
and how the others are judged. Preparing, training, searching, the front and the report ask it and know no
task by name; docs/TASKS.md shows how one is added.

P pairs, C captions, N rows of a set
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clippo.config import DataConfig
from clippo.evaluate.objectives import Objectives
from clippo.evaluate.words import Words

Resize = Callable[[Image.Image], Image.Image]
"""Resizes and crops a picture to what the model takes; whatever a task draws is drawn on the result."""

Indices = NDArray[np.int64]


class Picture(Protocol):
    """A picture that is read when it is asked for.

    Attributes:
        key: names it, stable over machines.
    """

    @property
    def key(self) -> str: ...

    @property
    def load(self) -> Callable[[], Image.Image]:
        """The picture as upright RGB; DataError when it cannot be read."""
        ...


@dataclass(frozen=True)
class Queries:
    """What the pictures of a part are ranked for; each picture gives one row of each of its sets.

    Attributes:
        captions: the classes that are asked for.
        k: the top of a ranking that is looked at.
        groups: names of the groups that pictures belong to, `Row.group`.
        majority: of each caption the group whose share of the top is shown, an index of ``groups``; -1
            where it has none, and empty where none has.
    """

    captions: tuple[int, ...]
    k: int
    groups: tuple[str, ...]
    majority: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """Pictures that are prepared together; each gives rows of several sets.

    Attributes:
        candidates: the classes that the model tells apart in these sets.
        sets: names of the sets: ``train/...``, or ``validation/...`` and ``test/...``.
        pairwise: a picture is judged between its own label and its attack label alone.
        copies: rows that a picture gives of the last set; of the others it gives one.
        queries: what the rows of its sets are ranked for, besides being told apart.
        folds: of the train part, where trials are cross-validated: of each candidate the fold that it is in;
            -1: of none.
        fold: its sets are measured by weights tuned without this fold. Their names end with its number, and
            what is measured on those of all folds is put together under the name before it (`joined_name`).
    """

    name: str
    pictures: Sequence[Any]  # of `Picture`, and of whatever else the task's own rows need
    candidates: tuple[int, ...]
    sets: tuple[str, ...]
    pairwise: bool = False
    copies: int = 1
    queries: Queries | None = None
    folds: tuple[int, ...] = ()
    fold: int | None = None

    @property
    def n_rows(self) -> int:
        """Rows of all of its sets, if every picture can be read."""
        return len(self.pictures) * (len(self.sets) - 1 + self.copies)


def named_spec(spec: str) -> tuple[str, str]:
    """Name and rest of ``[NAME=]KIND:PATH``; '' where no name is given.

    >>> named_spec("faces=fairface:data/fairface"), named_spec("folder:a=b/pictures")
    (('faces', 'fairface:data/fairface'), ('', 'folder:a=b/pictures'))
    """
    given, equals, rest = spec.partition("=")
    if equals and re.fullmatch(r"[\w-]+", given):  # an equals sign may be part of a path
        return given, rest
    return "", spec


def joined_name(name: str, fold: int | None) -> str:
    """What a set is called when those of all folds are put together.

    >>> joined_name("test/concept/unpaired/2", 2), joined_name("test/concept/seen", None)
    ('test/concept/unpaired', 'test/concept/seen')
    """
    return name if fold is None else name.removesuffix(f"/{fold}")


@dataclass(frozen=True)
class Row:
    """A picture of a set as the model takes it.

    Attributes:
        attack_label: the class that is written on it, or -1; in a clean pairwise set, the class that it is
            judged against.
        group: which of a ranked part's groups the picture belongs to, or what else the task's pairs need to
            know of it; -1: none, and it is not ranked.
    """

    set_name: str
    image: Image.Image
    label: int
    attack_label: int = -1
    group: int = -1


@dataclass(frozen=True)
class TrainRows:
    """What is known of the rows of one train set, in their order.

    Attributes:
        first: the number of its first row, where the rows of all train sets are counted through.
        kept: which of its rows these are, where some are left out; None: all.
    """

    first: int
    labels_N: Indices
    attack_labels_N: Indices
    groups_N: Indices
    candidates: tuple[int, ...]
    kept: Indices | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def numbers(self) -> Indices:
        """The numbers of its rows, (N,)."""
        return self.first + (np.arange(len(self)) if self.kept is None else self.kept)

    def without(self, fold: int, folds: Sequence[int]) -> TrainRows:
        """The same without the candidates of a fold, and without the rows whose label is one of them.

        Args:
            folds: `Part.folds`.

        >>> rows = TrainRows(5, np.array([0, 1]), np.array([2, 2]), np.array([0, 0]), (0, 1, 2))
        >>> rows.without(0, (0, 1, -1)).numbers.tolist(), rows.without(0, (0, 1, -1)).candidates
        ([6], (1, 2))
        """
        candidates = tuple(c for c, own in zip(self.candidates, folds, strict=True) if own != fold)
        kept = np.flatnonzero(np.isin(self.labels_N, candidates))
        columns = (self.labels_N[kept], self.attack_labels_N[kept], self.groups_N[kept])
        return TrainRows(self.first, *columns, candidates, kept)


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """Preference pairs: two cells each, a chosen and a rejected one, of the table of pictures by captions.

    A pair of one picture compares captions by their log-probability over all ``captions``. A pair of two
    pictures compares these by their scaled cosine, as a ranking does; what it would be normalised by, the sum
    over pictures, is the same for both.

    Attributes:
        captions: the classes that are told apart, C.
        picture_w, picture_l: numbers of train rows, (P,).
        caption_w, caption_l: columns of ``captions``, (P,).
        clean: of each pair the train row on which the policy is to stay near the reference, (P,).
        near: columns of ``captions`` between which it is to stay near, those of the KL term; None: all.
    """

    captions: tuple[int, ...]
    picture_w: Indices
    caption_w: Indices
    picture_l: Indices
    caption_l: Indices
    clean: Indices
    near: Indices | None = None


class Task(Protocol):
    """One task, opened with a data configuration."""

    pair_kinds: ClassVar[tuple[str, ...]]
    """Kinds of pairs that a trial may be tuned with; the first unless the search says otherwise."""

    image_kinds: ClassVar[tuple[str, ...]]
    """Those of them with pairs that compare two pictures; cross-entropy cannot be tuned on these."""

    unused: ClassVar[tuple[str, ...]]
    """Settings of its data configuration that it has no use for; a sweep that changes one is refused."""

    words: ClassVar[Words]
    """How its numbers are called."""

    gallery: ClassVar[tuple[str, ...]]
    """The sets whose pictures the report shows with what models say of them, or, where they are ranked, in
    the order in which models rank them."""

    def __init__(self, config: DataConfig) -> None: ...

    @property
    def classes(self) -> tuple[str, ...]:
        """What captions are made of; labels and candidates are indices of it."""
        ...

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompt of each class; empty: the model's."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the pictures change."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """Files whose content decides what the rows look like, such as fonts."""
        ...

    @property
    def parts(self) -> Mapping[str, Part]:
        """Everything that a sweep prepares, by name; the sets of ``train`` make the pairs."""
        ...

    @property
    def n_pairs(self) -> int:
        """Pairs of an epoch, of the kind that has most."""
        ...

    def rows(self, part: Part, index: int, resize: Resize) -> Iterator[Row]:
        """The rows that one picture of a part gives.

        Raises:
            DataError: the picture cannot be read; then it gives none.
        """
        ...

    @staticmethod
    def objectives(config: DataConfig) -> Objectives:
        """The goal, and the sets whose accuracy is to be kept, unless the sweep names others."""
        ...

    @staticmethod
    def pairs(kind: str, train: Mapping[str, TrainRows]) -> PairTable:
        """The preference pairs of a kind, from the rows of the train sets that could be prepared."""
        ...

    @staticmethod
    def needs(config: DataConfig) -> Iterator[tuple[str, Callable[[], object]]]:
        """What must be there, and a check of it that raises a ClippoError."""
        ...
