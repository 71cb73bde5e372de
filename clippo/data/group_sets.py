"""Pictures of people of several groups, at something or just there.

    people                      the bundled drawings of people at work
    fairface:PATH               faces by gender; fairface-race:PATH and fairface-age:PATH by those columns
    vl-bias:PATH                52 activities and 13 occupations (arXiv 2207.01056)
    grouped:PATH                a CSV file with columns path and group, and perhaps concept and split

PATH is local, ``s3://`` or the URL of another fsspec file system. FairFace is its two tables,
``fairface_label_train.csv`` and ``fairface_label_val.csv``, with ``train/`` and ``val/`` beside them or in
the folder of the published archive. VL-Bias is ``verb/<activity>/`` and ``occu/<occupation>/``. As released
these have the pictures, and nothing says what group is on them; whoever labels them makes a folder for each
group in these, and what lies beside is of no group. Groups are whatever the column or the folders say: two or
more, and an empty one for pictures that show none. What a group is called is how somebody labelled a picture,
not who is on it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from clippo.data.files import File, find, joined, read, stamp
from clippo.data.formats import SPLITS
from clippo.data.formats.listing import IMAGE_SUFFIXES, SPLIT_NAMES, Bytes, intact, load_bytes, split_in
from clippo.demo import people, scenes
from clippo.errors import ConfigError, DataError

BUNDLED = "people"
PARTS = 2  # which pictures are taken of a set; in the fingerprints of those read from files
PICTURES_OF_A_CELL = 60  # of the bundled drawings, for each split, concept and group

_ARCHIVES = ("", "fairface-img-margin025-trainval", "fairface-img-margin125-trainval")

# VL-Bias asks with four templates; these name no group, as a query must not.
_TEMPLATES = {
    "verb": ("a person is {}", "the person is {}", "a photo of a person {}", "a person {} in the picture"),
    "occu": ("a person is a {}", "the person is a {}", "a photo of a {}", "a {} in the picture"),
}
_FOLDERS = {"verb": "verb", "activities": "verb", "occu": "occu", "occupations": "occu"}


@dataclass(frozen=True)
class GroupedImage:
    """A picture that is read and decoded when it is asked for.

    Attributes:
        key: names it within its set, stable over machines.
        concept: what is done on it, an index of the set's concepts; -1 where the set does not say.
        group: an index of the set's groups; -1 if it shows none.
        split: where the set puts it, if it says so: train, validation or test.
        load: the picture as upright RGB; DataError when it cannot be read. It may be pickled.
    """

    key: str
    concept: int
    group: int
    split: str | None
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class GroupSet:
    """Pictures of people with a group and perhaps a concept each.

    Attributes:
        groups: two or more names, sorted; where no picture is labelled those that are asked for.
        concepts: names, sorted; empty if the set has only groups.
        templates: of each concept its prompts, empty where the model's is to be used.
        majority: of each concept the group that most of its pictures show, those for validation and test
            left out, an index of ``groups``; -1 where no group has more than every other.
        fingerprint: changes when the pictures do; of ``grouped`` and ``fairface`` on a remote place only when
            their names or labels do.
    """

    name: str
    groups: tuple[str, ...]
    concepts: tuple[str, ...]
    templates: tuple[tuple[str, ...], ...]
    majority: tuple[int, ...]
    pictures: tuple[GroupedImage, ...]
    fingerprint: str

    @property
    def is_labelled(self) -> bool:
        """Whether any picture says which group it shows."""
        return any(picture.group >= 0 for picture in self.pictures)


class _Row(NamedTuple):
    key: str
    path: str
    concept: str
    group: str
    split: str | None
    stamp: str


def open_group_set(spec: str, like: GroupSet | None = None) -> GroupSet:
    """Opens ``people`` or ``name:PATH``, see the top of this file.

    Args:
        like: a set whose groups, and whose majority of a concept of the same name, are asked for where no
            picture of this one is labelled; None: such a set is refused.

    Raises:
        ConfigError: an unknown name, or a PATH that does not exist or may not be read.
        DataError: what is there is not laid out as it must be, or has fewer than two groups.
    """
    name, _, path = spec.partition(":")
    if name not in GROUP_SETS:
        known = ", ".join(n if n == BUNDLED else f"{n}:PATH" for n in GROUP_SETS)
        raise ConfigError(f"group set {spec!r} must be one of: {known}")
    if path and name == BUNDLED:
        raise ConfigError(f"group set {BUNDLED} is bundled and takes no path, got {path!r}")
    if not path and name != BUNDLED:
        raise ConfigError(f"group set {spec!r} lacks the place of its files; write {name}:PATH")
    found = GROUP_SETS[name](path)
    if like is not None and not found.groups and found.concepts:
        usual = dict(zip(like.concepts, like.majority, strict=True))
        majority = tuple(usual.get(concept, -1) for concept in found.concepts)
        return replace(found, groups=like.groups, majority=majority)
    if len(found.groups) < 2:
        which = f"only {found.groups[0]!r}" if found.groups else "none"
        raise DataError(
            f"{name} needs pictures of two groups or more, and has {which}; put them into folders for each "
            "group where the set has folders, or list them with a column group (grouped:FILE)"
            + (
                ""
                if found.groups or not found.concepts
                else "; as it is it can be a test set of a sweep (data.test_sets), or "
                "clippo evaluate --groups measures what is read as these"
            )
        )
    return found


def only_groups(groups: Sequence[str]) -> GroupSet:
    """A set of no pictures, for its groups."""
    return GroupSet("", tuple(groups), (), (), (), (), "")


def _people(_: str) -> GroupSet:
    """The bundled drawings, composed on the fly; tones and photos are those of their split alone."""
    groups, concepts = sorted(people.GROUPS), sorted(people.OCCUPATIONS)
    shown = [*groups, people.NEUTRAL]  # the last shows no group
    cells = [(s, c, g) for s in range(len(SPLITS)) for c in range(len(concepts)) for g in range(len(shown))]
    pictures = [
        GroupedImage(
            f"{SPLITS[s]}/{concepts[c]}/{shown[g]}/{i}",
            c,
            g if g < len(groups) else -1,
            SPLITS[s],
            partial(_person, SPLITS[s], concepts[c], shown[g], (s, c, g, i)),
        )
        for s, c, g in cells
        for i in range(PICTURES_OF_A_CELL)
    ]
    content = hashlib.sha256(people.PEOPLE.read_bytes() + scenes.PICTURES.read_bytes()).hexdigest()[:16]
    return GroupSet(
        name=BUNDLED,
        groups=tuple(groups),
        concepts=tuple(concepts),
        templates=((),) * len(concepts),
        majority=tuple(groups.index(people.MAJORITY[concept]) for concept in concepts),
        pictures=tuple(pictures),
        fingerprint=f"{BUNDLED}-{content}",
    )


def _person(split: str, occupation: str, shown: str, place: tuple[int, ...]) -> Image.Image:
    found = people.load_people(people.TONES[split], (split,))
    drawings = found.drawings[occupation, shown]
    drawing = drawings[place[-1] % len(drawings)]
    return people.compose_person([drawing], found.photos, np.random.default_rng(place))


def _fairface(name: str, column: str, path: str) -> GroupSet:
    files = [f for f in find(path, 1) if f.name.startswith("fairface_label_") and f.name.endswith(".csv")]
    if not files:
        raise DataError(
            f"{name}:{path} has no fairface_label_train.csv or fairface_label_val.csv; give the folder that "
            "holds them"
        )
    cells = [(file, n, row) for file in files for n, row in enumerate(_table(file, ("file", column)))]
    # The published archive unpacks into a folder of its own.
    places = [joined(path, archive) if archive else path for archive in _ARCHIVES]
    first = cells[0][2]["file"] if cells else ""
    root = next((place for place in places if _is_there(joined(place, first))), None)
    if root is None:
        raise DataError(
            f"{name}:{path} has no picture {first}, the first in {files[0].name}; it must lie there or in "
            f"{_ARCHIVES[1]}/"
        )
    rows = [
        _row(
            file,
            number,
            joined(root, row["file"]),
            row["file"],
            "",
            row[column],
            _split_of(file, row["file"]),
        )
        for file, number, row in cells
    ]
    return _set(name, rows, {})


def _vl_bias(path: str) -> GroupSet:
    rows: list[_Row] = []
    templates: dict[str, tuple[str, ...]] = {}
    kind_of: dict[str, str] = {}
    for file in find(path, 4):
        kind, *concept_and_group = file.name.split("/")[:-1] or [""]
        is_picture = file.name.lower().endswith(IMAGE_SUFFIXES)
        if not is_picture or kind not in _FOLDERS or len(concept_and_group) not in (1, 2):
            continue
        concept, *group = (part.replace("_", " ") for part in concept_and_group)
        kind_of.setdefault(concept, kind)
        if _FOLDERS[kind_of[concept]] != _FOLDERS[kind]:
            raise DataError(
                f"vl-bias:{path} has {concept!r} in {kind_of[concept]}/ and in {kind}/, and is asked for it "
                "with the prompts of one; rename one of these folders"
            )
        templates[concept] = _TEMPLATES[_FOLDERS[kind]]
        rows.append(_Row(file.name, file.path, concept, "".join(group), None, file.stamp))
    if not rows:
        raise DataError(
            f"vl-bias:{path} has no pictures; they must lie in verb/<activity>/ and occu/<occupation>/, or "
            "in a folder for each group there"
        )
    return _set("vl-bias", rows, templates)


def _grouped(path: str) -> GroupSet:
    files = find(path, 1)
    if len(files) != 1 or not files[0].name.lower().endswith(".csv"):
        raise DataError(f"grouped:{path} is no CSV file; give the file, with columns path, group and concept")
    file = files[0]
    rows = []
    for number, row in enumerate(_table(file, ("path", "group"))):
        place = joined(file.path.rpartition("/")[0], row["path"])
        split = row.get("split") or ""
        if split and split.lower() not in SPLIT_NAMES:
            raise DataError(
                f"row {number} of {file.path} has split {split!r}; known are {', '.join(SPLIT_NAMES)}"
            )
        its_split = SPLIT_NAMES[split.lower()] if split else None
        key, concept = row["path"], row.get("concept") or ""
        rows.append(_row(file, number, place, key, concept, row["group"], its_split))
    return _set("grouped", rows, {})


GROUP_SETS: dict[str, Callable[[str], GroupSet]] = {
    BUNDLED: _people,
    "fairface": partial(_fairface, "fairface", "gender"),
    "fairface-race": partial(_fairface, "fairface-race", "race"),
    "fairface-age": partial(_fairface, "fairface-age", "age"),
    "vl-bias": _vl_bias,
    "grouped": _grouped,
}


def _table(file: File, columns: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """The rows of a CSV file, their cells stripped."""
    with intact(file.path):
        text = io.StringIO(read(file.path).decode("utf-8-sig"), newline="")
        rows = csv.DictReader(text)
        there = rows.fieldnames or ()
        if missing := [name for name in columns if name not in there]:
            raise DataError(f"{file.path} has no column {missing[0]}; its columns are: {', '.join(there)}")
        for row in rows:
            yield {name: (row[name] or "").strip() for name in there}


def _row(file: File, number: int, place: str, key: str, concept: str, group: str, split: str | None) -> _Row:
    if not key:
        raise DataError(f"row {number} of {file.path} names no picture")
    return _Row(posixpath.normpath(key), place, concept, group, split, stamp(place))


def _split_of(file: File, picture: str) -> str | None:
    """FairFace says it twice, in the picture's folder and in the name of the table."""
    return split_in(picture) or split_in(file.name.removeprefix("fairface_label_"))


def _is_there(path: str) -> bool:
    if not path:
        return False
    if stamp(path):
        return True
    try:
        return bool(read(path, 0, 1))
    except DataError:
        return False


def most_common(groups: Iterable[int]) -> int:
    """The group that occurs more often than every other; -1 where none does.

    >>> most_common([1, 0, 1]), most_common([0, 1]), most_common([])
    (1, -1, -1)
    """
    (first, most), (_, next_most) = (*Counter(groups).most_common(2), (-1, 0), (-1, 0))[:2]
    return first if most > next_most else -1


def _set(name: str, rows: Sequence[_Row], templates: Mapping[str, tuple[str, ...]]) -> GroupSet:
    groups = sorted({row.group for row in rows} - {""})
    concepts = sorted({row.concept for row in rows} - {""})
    group_of = {"": -1} | {group: i for i, group in enumerate(groups)}
    concept_of = {"": -1} | {concept: i for i, concept in enumerate(concepts)}
    seen: set[str] = set()
    shown = defaultdict[str, list[int]](list)
    for row in rows:
        if row.key in seen:
            raise DataError(f"{name} has {row.key} twice; a picture has one group and one concept")
        seen.add(row.key)
        if row.group and row.split in (None, "train"):
            shown[row.concept].append(group_of[row.group])
    stamps = [f"parts {PARTS}"]
    stamps += sorted(
        "\t".join(map(str, (row.key, row.concept, row.group, row.split, row.stamp))) for row in rows
    )
    return GroupSet(
        name=name,
        groups=tuple(groups),
        concepts=tuple(concepts),
        templates=tuple(templates.get(concept, ()) for concept in concepts),
        majority=tuple(most_common(shown[concept]) for concept in concepts),
        pictures=tuple(
            GroupedImage(
                row.key,
                concept_of[row.concept],
                group_of[row.group],
                row.split,
                partial(load_bytes, Bytes(row.path)),
            )
            for row in rows
        ),
        fingerprint=f"{name}-{hashlib.sha256(chr(10).join(stamps).encode()).hexdigest()[:16]}",
    )
