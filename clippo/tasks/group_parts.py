"""Captions of a set of pictures of people of several groups, and what its pictures are measured for."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from clippo.config import DataConfig
from clippo.data.datasets import SPLITS, splits_of
from clippo.data.group_sets import BUNDLED, GroupedImage, GroupSet, most_common, only_groups, open_group_set
from clippo.errors import ConfigError, DataError
from clippo.tasks.base import Part, Queries, Resize, Row


@dataclass(frozen=True)
class Shown:
    """A picture of a set, with what its row says of it."""

    key: str
    load: Callable[[], Image.Image]
    label: int
    attack_label: int = -1
    group: int = -1


@dataclass(frozen=True)
class Captions:
    """Where a group set's captions are among the classes: concepts, groups, each group with each concept."""

    found: GroupSet
    first: int

    def concept(self, c: int) -> int:
        return self.first + c

    def group(self, g: int) -> int:
        return self.first + len(self.found.concepts) + g

    def at_work(self, g: int, c: int) -> int:
        """The caption of a group with a concept."""
        return self.group(len(self.found.groups)) + g * len(self.found.concepts) + c

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(map(self.group, range(len(self.found.groups))))

    def names(self) -> Iterator[tuple[str, str]]:
        """Name and prompt of each; an empty prompt is the model's."""
        prompts = ["\n".join(templates) for templates in self.found.templates]
        yield from zip(self.found.concepts, prompts, strict=True)
        yield from ((group, "") for group in self.found.groups)
        for group in self.found.groups:
            for concept, templates in zip(self.found.concepts, self.found.templates, strict=True):
                if templates:
                    yield concept, "\n".join(_with_group(t, group) for t in templates)
                else:
                    yield f"{group} {concept}", ""


def ranked_part(
    captions: Captions, name: str, pictures: Sequence[GroupedImage], concepts: Sequence[int], k: int,
    among: Sequence[int] = (),
) -> Part:  # fmt: skip
    """Pictures ranked for each of the concepts, and told apart among these, or among more of them.

    Args:
        pictures: as many of each group, see `evened`, and perhaps some of none.

    Raises:
        ConfigError: fewer than k of them have a group.
    """
    found = captions.found
    n_ranked = sum(p.group >= 0 for p in pictures)
    if k > n_ranked:
        raise ConfigError(
            f"top_k is {k}, but {name} has {n_ranked} pictures of a group; lower it, take more pictures "
            "(data.eval_pictures of a sweep, --pictures of clippo evaluate), or add some of each concept's "
            "rarest group, as no group has more"
        )
    usual = tuple(found.majority[c] for c in concepts)
    queries = Queries(
        captions=tuple(map(captions.concept, concepts)),
        k=k,
        groups=found.groups,
        majority=usual if max(usual) >= 0 else (),
    )
    shown = [Shown(p.key, p.load, captions.concept(p.concept), group=p.group) for p in pictures]
    candidates = tuple(map(captions.concept, among or concepts))
    return Part(name, shown, candidates, (name,), queries=queries)


def read_part(
    captions: Captions, name: str, pictures: Sequence[GroupedImage], asked: int | None = None
) -> Part:
    """Pictures told apart among groups.

    Right is the group that is shown, and, of a picture that shows none, its concept's majority; or, with
    ``asked``, that group whatever is shown.
    """
    majority = captions.found.majority

    def label(p: GroupedImage) -> int:
        if asked is not None:
            return asked
        return p.group if p.group >= 0 else majority[p.concept]

    shown = [Shown(p.key, p.load, captions.group(label(p))) for p in pictures]
    return Part(name, shown, captions.groups, (name,))


def measured_parts(
    captions: Captions, name: str, data: DataConfig, is_source: bool = False
) -> Iterator[Part]:
    """The parts of a test set: its pictures of the test split, or all where it names no splits.

    What is ranked has of each concept as many pictures of each group, or, where not all of these are taken,
    of one concept one more of some; a concept whose pictures show no group has no ranking. Where no picture
    has a label, nothing is ranked. What is read as groups is then measured by itself: how many pictures are
    read as their concept's majority, where that is known, and as each group but the last.

    Args:
        is_source: models are tuned on its other pictures, so only those of the test split are taken.

    Raises:
        ConfigError: a ranking would be deeper than there are pictures, or two groups give parts one name.
        DataError: there is no picture to measure, or none of a concept's group to rank.
    """
    found, n = captions.found, data.eval_pictures
    cells = cells_of(found, data.split_seed, whole=not is_source)
    of_test = [cell for (split, _, _), cell in sorted(cells.items()) if split == "test"]
    if not of_test:
        raise DataError(f"{found.name} has no test pictures, of {len(found.pictures)} in all; it needs more")
    concepts = range(len(found.concepts))
    ranked = sorted({cell[0].concept for cell in of_test if cell[0].concept >= 0 and cell[0].group >= 0})
    pools = {c: evened(found, cells, "test", c) for c in ranked}
    shown = even([cell for c in concepts for cell in (cells["test", c, -1], *pools.get(c, ()))], n)
    if concepts:
        own = f"test/concept/{name}"
        if found.is_labelled:
            yield ranked_part(captions, own, shown, ranked, data.top_k, among=concepts)
        else:
            told = [Shown(p.key, p.load, captions.concept(p.concept)) for p in shown]
            yield Part(own, told, tuple(map(captions.concept, concepts)), (own,))
    if of_groups := [cell for cell in of_test if cell[0].group >= 0]:
        yield read_part(captions, f"test/group/{name}", even(of_groups, n))
    if neutral := [p for p in shown if p.group < 0 and found.majority[p.concept] >= 0]:
        yield read_part(captions, f"test/neutral/{name}", neutral)
    if not found.is_labelled:
        for g, as_file in enumerate(_as_files(found.groups)[:-1]):
            yield read_part(captions, f"test/read_as_{as_file}/{name}", shown, asked=g)


def _as_files(groups: Sequence[str]) -> list[str]:
    """What groups are called in the names of sets, which are files of the prepared set.

    Raises:
        ConfigError: two would be called the same.
    """
    group_of: dict[str, str] = {}
    for group in groups:
        as_file = re.sub(r"\W+", "_", group)
        if (other := group_of.setdefault(as_file, group)) != group:
            raise ConfigError(
                f"groups {other!r} and {group!r} would both be reported as read_as_{as_file}; rename one, so "
                "that they differ in letters or digits"
            )
    return list(group_of)


def shown_rows(part: Part, index: int, resize: Resize) -> Iterator[Row]:
    """The row of a picture.

    Raises:
        DataError: it cannot be read.
    """
    picture: Shown = part.pictures[index]
    image = resize(picture.load())
    yield Row(part.sets[0], image, picture.label, picture.attack_label, picture.group)


class MeasuredSet:
    """A group set by itself, of which a model is measured without a sweep.

    Args:
        groups: what is asked for where no picture is labelled; none: such a set is refused.

    Raises:
        ConfigError: an unknown set or place, or groups for a set with labels, or a single one, or one twice.
        DataError: nobody says the groups, or the set is not laid out as it must be.
    """

    def __init__(self, spec: str, name: str, data: DataConfig, groups: tuple[str, ...] = ()) -> None:
        if len(groups) == 1:
            raise ConfigError(f"groups is {groups[0]!r} alone; give two or more to tell apart")
        if repeated := [group for group, n in Counter(groups).items() if n > 1]:
            raise ConfigError(f"groups has {repeated[0]!r} twice; give two or more different ones")
        found = open_group_set(spec, like=only_groups(groups) if groups else None)
        if groups and found.is_labelled:
            raise ConfigError(f"{spec} has labels of its own ({', '.join(found.groups)}); leave out groups")
        captions = Captions(found, 0)
        self.classes, self.templates = zip(*captions.names(), strict=True)
        self.parts = {part.name: part for part in measured_parts(captions, name, data)}
        self.rows = shown_rows


def as_source(found: GroupSet) -> GroupSet:
    """The set with the majorities of the pictures that tuning gets; the bundled one says its majorities."""
    if found.name == BUNDLED:
        return found
    groups: dict[int, list[int]] = defaultdict(list)
    for picture, split in zip(found.pictures, splits_of(found.pictures)[0], strict=True):
        if split == "train" and picture.group >= 0:
            groups[picture.concept].append(picture.group)
    return replace(found, majority=tuple(most_common(groups[c]) for c in range(len(found.concepts))))


Cells = dict[tuple[str, int, int], list[GroupedImage]]


def cells_of(found: GroupSet, seed: int, whole: bool = False) -> Cells:
    """The pictures of each split, concept and group, shuffled; empty where there are none.

    Args:
        whole: all pictures of a set that names no splits are test pictures.
    """
    splits, _ = splits_of(found.pictures)
    if whole and all(picture.split is None for picture in found.pictures):
        splits = ["test"] * len(splits)
    cells: Cells = defaultdict(list)
    for picture, split in sorted(zip(found.pictures, splits, strict=True), key=lambda pair: pair[0].key):
        cells[split, picture.concept, picture.group].append(picture)
    return defaultdict(list, {place: _shuffled(cell, seed, place) for place, cell in cells.items()})


def _shuffled(cell: Sequence[GroupedImage], seed: int, place: tuple[str, int, int]) -> list[GroupedImage]:
    split, concept, group = place
    order = np.random.default_rng([seed, SPLITS.index(split), concept + 1, group + 1]).permutation(len(cell))
    return [cell[i] for i in order]


def evened(found: GroupSet, cells: Cells, split: str, concept: int) -> list[list[GroupedImage]]:
    """The pictures of a concept by group, of each as many as of the rarest.

    MaxSkew wants equal shares, so a pool with more of one group would be taken for a bias of the model.

    Raises:
        DataError: there is none of a group.
    """
    of_groups = [cells[split, concept, g] for g in range(len(found.groups))]
    fewest = min(map(len, of_groups))
    if not fewest:
        lacking = found.groups[[len(cell) for cell in of_groups].index(0)]
        raise DataError(
            f"{found.name} has no {split} picture of {found.concepts[concept]!r} that shows {lacking!r}, and "
            "rankings need one or more of each group; add some, or leave out that concept"
        )
    return [cell[:fewest] for cell in of_groups]


def even(cells: Sequence[Sequence[GroupedImage]], n: int) -> list[GroupedImage]:
    """Up to n pictures, one of each cell in turn."""
    deepest = max(map(len, cells), default=0)
    return [cell[k] for k in range(deepest) for cell in cells if k < len(cell)][:n]


def _with_group(template: str, group: str) -> str:
    """A prompt that names the group.

    >>> _with_group("a person is {}", "woman"), _with_group("a photo of a {}", "woman")
    ('a woman is {}', 'a photo of a woman {}')
    """
    return (
        template.replace("person", group) if "person" in template else template.replace("{}", f"{group} {{}}")
    )
