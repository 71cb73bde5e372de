"""Published photos of objects with a misleading word on them.

    rta-100:PATH, paint:PATH     label=<object>_text=<word>.png in one folder (arXiv 2304.04512, 2208.05592)
    disentangling:PATH           annotations.json, classes.json, photos or images/ (arXiv 2206.07835)
    scam:PATH, synth-scam:PATH   Parquet files of Hugging Face's BLISS-e-V/SCAM (arXiv 2504.04893)

PATH is local, ``s3://`` or the URL of another fsspec file system. Names of classes are equal when they differ
only in case, blanks and underscores; dots, hyphens and all else count ("St. Bernard" is not "St Bernard").
The classes are all objects and then all words, since a model can answer with a word that names no object.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clippo.data.decode import decoded
from clippo.data.files import File, find, is_remote, open_file, read, reading
from clippo.data.formats.listing import IMAGE_SUFFIXES, Bytes, load_bytes
from clippo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_SCAM_COLUMNS = ("id", "object_label", "attack_word", "type")


@dataclass(frozen=True)
class AttackedImage:
    """A photo that is read and decoded when it is asked for.

    Attributes:
        key: names the photo within its set, stable over machines.
        label: class index of the object.
        attack_label: class index of the word; of a clean photo that of its attacked twin, -1 without one.
        load: the photo as upright RGB; DataError when it cannot be read. It may be pickled.
    """

    key: str
    label: int
    attack_label: int
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class TypographicSet:
    """A published test set.

    Attributes:
        attacked: photos with a word that names something else.
        clean: photos of the same objects without a word; empty where the set has none.
        pairwise: a photo is judged between its own label and attack label alone, as by SCAM's authors.
        fingerprint: changes when the files do.
        left_out: files or rows that fit no pattern, or whose word names the object itself.
    """

    name: str
    classes: tuple[str, ...]
    attacked: tuple[AttackedImage, ...]
    clean: tuple[AttackedImage, ...]
    pairwise: bool
    fingerprint: str
    left_out: tuple[str, ...] = ()


def open_typographic_set(spec: str) -> TypographicSet:
    """Opens ``name:PATH``, see the top of this file. How many files are left out is logged as a warning.

    Raises:
        ConfigError: an unknown name, or a PATH that does not exist or may not be read.
        DataError: what is there is not laid out as published.
    """
    name, _, path = spec.partition(":")
    if name not in TYPOGRAPHIC_SETS:
        raise ConfigError(
            f"test set {spec!r} must be one of: {', '.join(f'{n}:PATH' for n in TYPOGRAPHIC_SETS)}"
        )
    if not path:
        raise ConfigError(f"test set {spec!r} lacks the place of its files; write {name}:PATH")
    opened = TYPOGRAPHIC_SETS[name](path)
    if opened.left_out:
        logger.warning("%s: %d left out, such as %s", spec, len(opened.left_out), opened.left_out[0])
    return opened


def label_and_word(file_name: str) -> tuple[str, str] | None:
    """The object and the word in a file name of RTA-100 or PAINT; None if it is no such name.

    The first ``_text=`` ends the label. A number in parentheses at the end is a copy's and left out.

    >>> label_and_word("label=St. Bernard_text=ice_cream (2).PNG")
    ('St. Bernard', 'ice_cream')
    >>> label_and_word("IMG_2934.JPG")
    """
    stem, suffix = os.path.splitext(file_name)
    label, _, word = stem.removeprefix("label=").partition("_text=")
    word = re.sub(r"\s?\(\d+\)$", "", word)
    fits = stem.startswith("label=") and suffix.lower() in IMAGE_SUFFIXES and _tidy(label) and _tidy(word)
    return (label, word) if fits else None


# ---- the sets


class _Row(NamedTuple):
    key: str
    label: str
    word: str  # "" where there is none
    load: Callable[[], Image.Image]


def _named(name: str, path: str) -> TypographicSet:
    files = find(path, 1)
    parsed = {file: names for file in files if (names := label_and_word(file.name))}
    if not parsed:
        raise DataError(
            f"none of the {len(files)} files in {name}:{path} is named label=<object>_text=<word>.png; "
            "give the folder that holds the photos"
        )
    known = {_normal(each) for names in parsed.values() for each in names}

    def without_number(word: str) -> str:
        # cat_2 is a copy's number where cat is a name of the set; boeing_747 is not.
        stem = re.sub(r"_\d+$", "", word)
        return stem if _normal(stem) in known else word

    rows = [
        _Row(file.name, label, without_number(word), partial(load_bytes, Bytes(file.path)))
        for file, (label, word) in parsed.items()
    ]
    return _set(name, rows, [], parsed, left_out=[file.name for file in files if file not in parsed])


def _disentangling(path: str) -> TypographicSet:
    files = {file.name: file for file in find(path, 2)}
    listed = files.get("annotations.json") or files.get("annotation.json")
    if listed is None:
        raise DataError(
            f"disentangling:{path} has no annotations.json, which says what each photo shows and what is "
            "written on it; give the folder that holds it"
        )
    annotations = _json(listed.path)
    try:
        names = {
            photo: (_tidy(entry["true object"]), _tidy(entry.get("typographic attack label") or ""))
            for photo, entry in annotations.items()
        }
    except (AttributeError, KeyError, TypeError):
        names = {}
    if not names or not all(label for label, _ in names.values()):
        raise DataError(
            f"{listed.path} must map each photo's file name to "
            '{"true object": NAME, "typographic attack label": WORD or ""}'
        )
    used = {listed}
    classes: Iterable[str] = ()
    if named := files.get("classes.json"):  # some copies have none
        used.add(named)
        classes = _json(named.path)  # a list, or an object with the names as its keys
        if not isinstance(classes, (list, dict)) or not all(isinstance(name, str) for name in classes):
            raise DataError(f"{named.path} must be a list of class names, or an object of them")
    photos = {photo: files.get(photo) or files.get(f"images/{photo}") for photo in sorted(names)}
    if missing := [photo for photo, file in photos.items() if file is None]:
        raise DataError(
            f"{len(missing)} of the {len(names)} photos in {listed.path}, such as {missing[0]}, are neither "
            "beside it nor in images/; add them or take them out of the file"
        )
    found = {photo: file for photo, file in photos.items() if file}
    used.update(found.values())
    loads = {photo: partial(load_bytes, Bytes(file.path)) for photo, file in found.items()}
    rows = [_Row(photo, *names[photo], load) for photo, load in loads.items()]
    return _set(
        "disentangling",
        [row for row in rows if row.word],
        [row for row in rows if not row.word],
        used,
        first=classes,
        left_out=[n for n, file in files.items() if n.lower().endswith(IMAGE_SUFFIXES) and file not in used],
    )


def _scam(name: str, variant: str, path: str) -> TypographicSet:
    files = [file for file in find(path, 3) if file.name.endswith(".parquet")]
    if not files:
        raise DataError(
            f"{name}:{path} has no Parquet file; give the folder with those of BLISS-e-V/SCAM (Hugging Face)"
        )
    rows: dict[str, list[_Row]] = {}
    left_out = []
    for file in files:
        for group, i, (key, label, word, kind) in _scam_rows(file):
            if all(isinstance(text, str) and _tidy(text) for text in (key, label, word)):
                rows.setdefault(kind, []).append(_Row(key, label, word, partial(_cell, file, group, i)))
            else:
                left_out.append(f"{key or 'row'} ({file.name}, row group {group}, row {i})")
    if variant not in rows:
        raise DataError(
            f"{name}:{path} has no row of type {variant}; its types: {', '.join(map(str, rows)) or 'none'}"
        )
    return _set(name, rows[variant], rows.get("NoSCAM", []), files, pairwise=True, left_out=left_out)


TYPOGRAPHIC_SETS: dict[str, Callable[[str], TypographicSet]] = {
    "rta-100": partial(_named, "rta-100"),
    "paint": partial(_named, "paint"),
    "disentangling": _disentangling,
    "scam": partial(_scam, "scam", "SCAM"),
    "synth-scam": partial(_scam, "synth-scam", "SynthSCAM"),
}


def _set(
    name: str,
    attacked: Sequence[_Row],
    clean: Sequence[_Row],
    files: Iterable[File],
    *,
    first: Iterable[str] = (),
    pairwise: bool = False,
    left_out: Iterable[str] = (),
) -> TypographicSet:
    """Numbers the classes: ``first``, then objects, then words, each as it is first spelled."""

    def has_own_name(row: _Row) -> bool:
        return _normal(row.word) == _normal(row.label)

    attacks = [row for row in attacked if not has_own_name(row)]
    photos = [row for row in clean if not has_own_name(row)]  # between equal labels it is always right
    if not attacks:
        raise DataError(f"{name} has no photo with a word that is not the name of its object")
    rows = (*attacks, *photos)
    spelled: dict[str, str] = {}
    for each in (*first, *(row.label for row in rows), *(row.word for row in rows)):
        spelled.setdefault(_normal(each), _tidy(each))
    spelled.pop("", None)  # no word
    index = {normal: i for i, normal in enumerate(spelled)}

    def image(row: _Row) -> AttackedImage:
        return AttackedImage(row.key, index[_normal(row.label)], index.get(_normal(row.word), -1), row.load)

    own_name, twins = ([row.key for row in some if has_own_name(row)] for some in (attacked, clean))
    # Clean twins were once among the photos, and their sets must be prepared anew.
    listing = "\n".join([*sorted(f"{file.name}:{file.stamp}" for file in files), *twins])
    return TypographicSet(
        name=name,
        classes=tuple(spelled.values()),
        attacked=tuple(map(image, attacks)),
        clean=tuple(map(image, photos)),
        pairwise=pairwise,
        fingerprint=f"{name}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}",
        left_out=(*sorted(left_out), *own_name, *twins),
    )


def _tidy(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def _normal(name: str) -> str:
    return _tidy(name).casefold()


# ---- files


def _json(path: str) -> Any:
    try:
        return json.loads(read(path).decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None


def _scam_rows(file: File) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
    """Row group, row in it, and the columns but the picture, which is not read."""
    with _parquet(file.path, pre_buffer=True) as parquet:  # one request for neighbouring columns
        there = parquet.schema_arrow.names
        if missing := [column for column in (*_SCAM_COLUMNS, "image") if column not in there]:
            raise DataError(f"{file.path} lacks SCAM's column {missing[0]!r}; it has {', '.join(there)}")
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=list(_SCAM_COLUMNS))
            columns = [table[name].to_pylist() for name in _SCAM_COLUMNS]
            yield from ((group, i, row) for i, row in enumerate(zip(*columns, strict=True)))


def _cell(file: File, group: int, row: int) -> Image.Image:
    cell = _pictures(file, group)[row].as_py()
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None:
        raise DataError(f"row {row} of row group {group} of {file.path} has no picture")
    return decoded(data)


# Rows are asked for in the file's order. Less than a row group cannot be read, as pictures fill one page.
@lru_cache(maxsize=2)
def _pictures(file: File, group: int) -> pa.ChunkedArray:
    with _parquet(file.path, pre_buffer=False) as parquet:
        return parquet.read_row_group(group, columns=["image"])["image"]


@contextmanager
def _parquet(path: str, *, pre_buffer: bool) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(_Ranges(path) if is_remote(path) else path, pre_buffer=pre_buffer) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error


class _Ranges(io.RawIOBase):
    """A remote file of which nothing is read but the ranges asked for.

    What fsspec reads ahead would be the pictures that lie between the columns.
    """

    def __init__(self, path: str) -> None:
        self._path, self._at = path, 0
        with reading(path), open_file(path) as file:
            self._size = file.seek(0, io.SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = read(self._path, self._at, end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
