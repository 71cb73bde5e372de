"""Readable names of classes: what is put into a prompt and written on pictures."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clippo.data.files import read
from clippo.errors import ConfigError, DataError

# Two pairs of ImageNet's classes have one name in open_clip's list; these are WordNet's for one of each.
_TOLD_APART = {744: "projectile", 836: "sunglass"}


def names_of(
    labels: Sequence[str], own: Mapping[str, str], names: str, *, indexed: bool = False
) -> tuple[str, ...]:
    """A name for each of the classes ``labels``, which are sorted.

    Args:
        own: the names that the source itself has; a class without one is named as in the source, with blanks
            for underscores, or by ImageNet if all of them are WordNet ids.
        names: ``imagenet``, a file (.txt, .csv, .json) or empty, as in ``data.class_names``.
        indexed: classes that are all numbers are indices, and no names.

    Raises:
        ConfigError: a class has no name, two have the same, or the file is not as it must be.
    """
    said = f"data.class_names is {names!r}" if names else "data.class_names is empty"
    unnamed = [label for label in labels if label not in own]
    if not names and unnamed and all(re.fullmatch(r"n\d{8}", label) for label in labels):
        names, said = "imagenet", "the classes are WordNet ids, which ImageNet names"
    if not names and unnamed and indexed and all(label.isdecimal() for label in labels):
        raise ConfigError(
            f"the classes are numbers as {unnamed[0]}, and nothing names them; give a file of their names "
            "(--class-names), or write names in their place"
        )
    table = imagenet_names() if names == "imagenet" else _file(names, labels) if names else own
    missing = [label for label in labels if not table.get(label)] if names else []
    if missing:
        remedy = "add it"
        if names == "imagenet":
            remedy = "folders must be named n01440764 or 0 to 999; a file can name others (--class-names)"
        raise ConfigError(
            f"{said}; it has no name for {len(missing)} of {len(labels)} classes, "
            f"the first is {missing[0]!r}; {remedy}"
        )
    found = tuple(table.get(label) or label.replace("_", " ") for label in labels)
    first: dict[str, str] = {}
    for label, name in zip(labels, found, strict=True):
        # A text tower reads both as one.
        other = first.setdefault(" ".join(name.casefold().split()), label)
        if other != label:
            raise ConfigError(f"{said}; the classes {other!r} and {label!r} are both named {name!r}")
    return found


def lines(text: bytes) -> list[str]:
    """The lines of a list of names, stripped, without blank ones at the end."""
    return [line.strip() for line in text.decode("utf-8-sig").rstrip().splitlines()]


def imagenet_names() -> dict[str, str]:
    """ImageNet's names by WordNet id and by index."""
    import open_clip  # takes seconds
    from timm.data.imagenet_info import ImageNetInfo

    ids: list[str] = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    names = {i: _TOLD_APART.get(i, name) for i, name in enumerate(open_clip.IMAGENET_CLASSNAMES)}
    return {str(i): name for i, name in names.items()} | {ids[i]: name for i, name in names.items()}


def _file(path: str, labels: Sequence[str]) -> dict[str, str]:
    suffix = path.lower().rpartition(".")[2]
    if suffix not in ("txt", "csv", "json"):
        raise ConfigError(f"data.class_names is {path!r}; it must be imagenet or a .txt, .csv or .json file")
    try:
        data = read(path)
        if suffix == "txt":
            return _by_line(path, lines(data), labels)
        text = data.decode("utf-8-sig")
        if suffix == "csv":
            rows = [tuple(row) for row in csv.reader(io.StringIO(text, newline="")) if row]
            rows = rows[1:] if rows[:1] == [("class", "name")] else rows
        else:
            rows = json.loads(text, object_pairs_hook=list)
        return _table(rows)
    except (DataError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ConfigError(f"data.class_names is {path!r}; {' '.join(str(error).split())}") from error


def _table(rows: Any) -> dict[str, str]:
    table: dict[str, str] = {}
    for row in rows if isinstance(rows, list) else [rows]:
        if not (isinstance(row, tuple) and len(row) == 2 and isinstance(row[1], str)):
            raise DataError(f"it must give one name to each class, but says {row!r}")
        label, name = row[0].strip(), row[1].strip()
        if table.setdefault(label, name) != name:
            raise DataError(f"it names the class {label!r} twice: {table[label]!r} and {name!r}")
    return table


def _by_line(path: str, names: list[str], labels: Sequence[str]) -> dict[str, str]:
    if len(names) == len(labels):
        return dict(zip(labels, names, strict=True))
    # Classes given by number may lack some, of which there are no pictures.
    if all(label.isdecimal() and int(label) < len(names) for label in labels):
        return {label: names[int(label)] for label in labels}
    raise ConfigError(
        f"data.class_names is {path!r}; it has {len(names)} names for {len(labels)} classes; give a name a "
        f"line, the first for {labels[0]!r} and the last for {labels[-1]!r}"
    )
