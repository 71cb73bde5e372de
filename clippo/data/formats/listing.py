"""What a format says of a place: its pictures, their classes and splits, and how to load them."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from clippo.data.decode import decoded
from clippo.data.files import read
from clippo.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "dev"), "validation")
DEPTH = 4  # levels of folders in which tables and shards are looked for

_DAMAGED = (pa.ArrowException, tarfile.TarError, UnicodeDecodeError, csv.Error, json.JSONDecodeError)
_SPLIT_IN_NAME = re.compile(rf"(?:^|/)({'|'.join(SPLIT_NAMES)})(?=[-_./\d])")


class Picture(NamedTuple):
    """A picture that is listed.

    Attributes:
        key: names it within its source, whatever other pictures there are.
        label: its class as the source writes it.
        split: where the source puts it, if it says so.
        place: what the listing's ``load`` takes.
    """

    key: str
    label: str
    split: str | None
    place: Any


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The pictures of a place.

    Attributes:
        layout: how pictures must lie there, for messages.
        load: reads and decodes a picture; DataError when it cannot be.
        stamps: change when the pictures do.
        names: readable names of classes, where the place has them.
        indexed: classes that are all numbers are indices, and no names.
        sequential: pictures are read much faster in this order than in any other.
    """

    layout: str
    pictures: list[Picture]
    load: Callable[[Any], Image.Image]
    stamps: list[str]
    names: Mapping[str, str] = field(default_factory=dict)
    indexed: bool = True
    sequential: bool = False


class Bytes(NamedTuple):
    """A file, or a part of one."""

    path: str
    start: int | None = None
    end: int | None = None


def load_bytes(place: Bytes) -> Image.Image:
    return decoded(read(*place))


def split_in(name: str) -> str | None:
    """The split that a file's or folder's name begins with.

    >>> split_in("data/train-00000-of-00002.parquet"), split_in("val/0.tar"), split_in("training.csv")
    ('train', 'validation', None)
    """
    found = _SPLIT_IN_NAME.search(name.lower())
    return SPLIT_NAMES[found[1]] if found else None


@contextmanager
def intact(path: str) -> Iterator[None]:
    """Turns what the readers of tables and shards raise for one that is damaged into a DataError."""
    try:
        yield
    except _DAMAGED as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error
