"""Sources of labelled pictures, by name."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from PIL import Image

from clippo import demo
from clippo.data.formats import FORMATS, SPLITS, Listing
from clippo.data.names import names_of
from clippo.demo import scenes
from clippo.errors import ConfigError, DataError

__all__ = ["SOURCES", "SPLITS", "ImageSource", "LabelledImage", "open_source", "splits_of"]

# Shares of the splits of pictures that come without; a split that is missing is taken from train.
_SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


@dataclass(frozen=True)
class LabelledImage:
    """A picture that is decoded when it is asked for.

    Attributes:
        key: names the picture within its source, stable over runs and machines.
        label: class index.
        load: the picture as RGB, upright; DataError when it cannot be read.
    """

    key: str
    label: int
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class ImageSource:
    """Labelled pictures of named classes.

    Attributes:
        pictures: ``pictures(split, labels, n)`` gives up to ``n`` pictures of the given classes, the same
            ones on every call, spread evenly over the classes; the split ``all`` has those of every split.
            DataError if the split has no pictures at all.
        background: ``background(split, group, index)`` is a picture of nothing, to write a word on.
        fingerprint: changes when the pictures change.
        has_splits: the source itself says which pictures are for testing.
    """

    name: str
    classes: tuple[str, ...]
    pictures: Callable[[str, Sequence[int], int], list[LabelledImage]]
    background: Callable[[str, str, int], LabelledImage]
    fingerprint: str
    has_splits: bool


def open_source(spec: str, seed: int, class_names: str = "") -> ImageSource:
    """Opens ``name`` or ``name:argument``.

    Args:
        class_names: names for the classes: ``imagenet``, or a file (.txt, .csv, .json).

    Raises:
        ConfigError: an unknown name, where the message lists the known ones; a place that does not exist or
            cannot be read; classes that have no name of their own.
        DataError: the source has no usable pictures.
    """
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise ConfigError(f"data.source is {spec!r}; it must be one of: {', '.join(SOURCES)} (folder:PATH)")
    return SOURCES[name](argument, seed, class_names)


def _demo(argument: str, seed: int, class_names: str = "") -> ImageSource:
    """The bundled things, composed on the fly; no split has another's photos, nor test another's style."""
    if argument:
        raise ConfigError(f"data.source demo takes no argument, got {argument!r}")
    if class_names:
        raise ConfigError(
            f"data.class_names is {class_names!r}; the classes of demo have names, leave it empty"
        )

    def scene(split: str, name: str | None, index: int) -> Callable[[], Image.Image]:
        place = [seed, SPLITS.index(split), demo.CLASSES.index(name) if name else len(demo.CLASSES), index]
        return lambda: scenes.compose(scenes.material_of_split(split), name, np.random.default_rng(place))

    def pictures(split: str, labels: Sequence[int], n: int) -> list[LabelledImage]:
        if split == "all":
            parts = [pictures(one, labels, -(-n // len(SPLITS))) for one in SPLITS]
            return [picture for row in zip(*parts, strict=True) for picture in row][:n]
        chosen = [(labels[i % len(labels)], i // len(labels)) for i in range(n)]
        return [
            LabelledImage(f"{split}/{demo.CLASSES[c]}/{k}", c, scene(split, demo.CLASSES[c], k))
            for c, k in chosen
        ]

    def background(split: str, group: str, index: int) -> LabelledImage:
        return LabelledImage(
            f"{split}/{group}/{index}", -1, scene(split, None, zlib.crc32(f"{group}/{index}".encode()))
        )

    content = hashlib.sha256(scenes.PICTURES.read_bytes()).hexdigest()[:16]
    return ImageSource("demo", demo.CLASSES, pictures, background, f"demo-{content}", has_splits=True)


def _listed(
    name: str, list_pictures: Callable[[str], Listing], argument: str, seed: int, class_names: str = ""
) -> ImageSource:
    """Pictures that lie somewhere, split as `splits_of` does."""
    if not argument:
        raise ConfigError(f"{name}: lacks the place of its pictures; write {name}:PATH")
    listing = list_pictures(argument)
    labels = sorted({p.label for p in listing.pictures})
    if all(label.isdecimal() for label in labels):
        labels.sort(key=int)
    if len(labels) < 4:
        raise DataError(
            f"{name}:{argument} has pictures of {len(labels)} classes; at least 4 are needed, "
            f"{listing.layout}"
        )
    if repeated := [key for key, n in Counter(p.key for p in listing.pictures).items() if n > 1]:
        raise DataError(f"{name}:{argument} has {repeated[0]} twice; a picture has one class and one split")
    classes = names_of(labels, listing.names, class_names, indexed=listing.indexed)
    splits, has_splits = splits_of(listing.pictures)
    index_of = {label: c for c, label in enumerate(labels)}
    by_key = sorted(range(len(splits)), key=lambda i: listing.pictures[i].key)
    groups: dict[str, list[list[int]]] = {split: [[] for _ in labels] for split in (*SPLITS, "all")}
    for i in by_key:
        for split in (splits[i], "all"):
            groups[split][index_of[listing.pictures[i].label]].append(i)

    def labelled(i: int) -> LabelledImage:
        picture = listing.pictures[i]
        return LabelledImage(picture.key, index_of[picture.label], partial(listing.load, picture.place))

    def pictures(split: str, labels: Sequence[int], n: int) -> list[LabelledImage]:
        if not any(groups[split]):
            raise DataError(
                f"{name}:{argument} has no {split} pictures; add some, or make {'/'.join(SPLITS)} folders"
            )
        order = np.random.default_rng([seed, list(groups).index(split)])
        shuffled = [[group[k] for k in order.permutation(len(group))] for group in groups[split]]
        deepest = max(len(shuffled[c]) for c in labels)
        chosen = [shuffled[c][k] for k in range(deepest) for c in labels if k < len(shuffled[c])][:n]
        return [labelled(i) for i in (sorted(chosen) if listing.sequential else chosen)]

    def background(split: str, group: str, index: int) -> LabelledImage:
        # There are no pictures of nothing, so words are read on plain colours.
        key = f"{split}/{group}/{index}"
        shade = np.random.default_rng([seed, zlib.crc32(key.encode())]).integers(0, 256, 3)
        red, green, blue = (int(v) for v in shade)
        return LabelledImage(key, -1, lambda: Image.new("RGB", (224, 224), (red, green, blue)))

    stamps = sorted(listing.stamps) + list(classes if class_names or listing.names else ())
    content = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]
    return ImageSource(name, classes, pictures, background, f"{name}-{content}", has_splits)


class Placed(Protocol):
    """A picture by its key, and the split that its source puts it in, if it says so."""

    @property
    def key(self) -> str: ...

    @property
    def split(self) -> str | None: ...


def splits_of(pictures: Sequence[Placed]) -> tuple[list[str], bool]:
    """The split of each picture, and whether the source has test pictures of its own.

    A picture's split is what the source says. Pictures of which it says nothing, and those of a split that is
    missing, follow from a hash of their keys: 60 % train, 20 % validation, 20 % test. Where there are no test
    pictures, those for validation, which others report on, become the test pictures.
    """
    given = {p.split for p in pictures}
    test = "test" if "test" in given else "validation"
    # Pictures for training also serve the splits that are lacking.
    shared = ["train"]
    if test == "validation" or "validation" not in given:
        shared.append("validation")
    if test not in given:
        shared.append("test")

    def split_of(picture: Placed) -> str:
        if picture.split in (None, "train"):
            return _hashed(picture.key, shared if picture.split else SPLITS)
        return "test" if picture.split == test else str(picture.split)

    return [split_of(p) for p in pictures], test in given


def _hashed(key: str, splits: Sequence[str]) -> str:
    """One of ``splits``, in the proportion of their shares, that depends on nothing but ``key``."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    place *= sum(_SHARES[split] for split in splits)
    for split in splits[:-1]:
        place -= _SHARES[split]
        if place < 0:
            return split
    return splits[-1]


SOURCES: dict[str, Callable[..., ImageSource]] = {
    "demo": _demo,
    **{name: partial(_listed, name, list_pictures) for name, list_pictures in FORMATS.items()},
}
