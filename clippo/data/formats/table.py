"""CSV and Parquet files with a row per picture."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image

from clippo.data.decode import decoded
from clippo.data.files import File, find, is_remote, joined, open_file, read, reading, stamp
from clippo.data.formats.listing import (
    DEPTH,
    SPLIT_NAMES,
    Bytes,
    Listing,
    Picture,
    intact,
    load_bytes,
    split_in,
)
from clippo.errors import DataError


class _Cell(NamedTuple):
    """A picture in a Parquet file."""

    path: str
    group: int
    row: int


class _Row(NamedTuple):
    label: Any
    split: Any
    picture: Any  # its path, or a cell


def list_table(root: str) -> Listing:
    """A row per picture: ``label``, ``path`` or ``image`` (its bytes), and perhaps ``split``."""
    files = find(root, DEPTH)
    if len(files) != 1 or not files[0].name.lower().endswith((".csv", ".tsv")):
        files = [f for f in files if f.name.lower().endswith(".parquet")]
    pictures: list[Picture] = []
    names: dict[str, str] = {}
    for file in files:
        rows = _parquet_rows(file, names) if file.name.lower().endswith(".parquet") else _csv_rows(file)
        pictures += [_picture(file, number, row) for number, row in enumerate(rows)]
    stamps = [f"{file.name}:{file.stamp}" for file in files]
    # A look at each picture takes seconds on disk, but minutes in a store, where tables are written anew.
    on_disk = [p for p in pictures if isinstance(p.place, Bytes) and not is_remote(p.place.path)]
    stamps += [f"{p.key}:{stamp(p.place.path)}" for p in on_disk]
    return Listing(
        layout="in a CSV file or Parquet files with a row per picture: label, and path or image",
        pictures=pictures,
        load=_load,
        stamps=stamps,
        names=names,
        sequential=any(isinstance(p.place, _Cell) for p in pictures),
    )


def _picture(file: File, number: int, row: _Row) -> Picture:
    label, split, path = ("" if value is None else str(value).strip() for value in row)
    if label in ("", "-1"):  # -1 is how public data sets say that they keep it to themselves
        raise DataError(f"row {number} of {file.path} has no label; every picture needs one")
    if split and split.lower() not in SPLIT_NAMES:
        raise DataError(
            f"row {number} of {file.path} has split {split!r}; known are {', '.join(SPLIT_NAMES)}"
        )
    its_split = SPLIT_NAMES[split.lower()] if split else split_in(file.name)
    if isinstance(row.picture, _Cell):
        return Picture(f"{file.name}/{number}", label, its_split, row.picture)
    if not path:
        raise DataError(f"row {number} of {file.path} has no path; every label needs a picture")
    key = path if "://" in path else posixpath.normpath(path)
    return Picture(key, label, its_split, Bytes(joined(file.path.rpartition("/")[0], key)))


def _csv_rows(file: File) -> Iterator[_Row]:
    with intact(file.path):
        text = io.StringIO(read(file.path).decode("utf-8-sig"), newline="")
        rows = csv.DictReader(text, delimiter="\t" if file.name.lower().endswith(".tsv") else ",")
        _require(file, rows.fieldnames or (), ("path",))
        for row in rows:
            yield _Row(row["label"], row.get("split"), row["path"])


def _require(file: File, columns: Sequence[str], pictures: Sequence[str]) -> str:
    """The column that has the pictures."""
    found = [name for name in pictures if name in columns]
    if "label" not in columns or not found:
        missing = "label" if "label" not in columns else " or ".join(pictures)
        raise DataError(f"{file.path} has no column {missing}; its columns are: {', '.join(columns)}")
    return found[0]


def _parquet_rows(file: File, names: dict[str, str]) -> Iterator[_Row]:
    with reading(file.path), intact(file.path):
        parquet = _parquet_file(file.path)
        schema = parquet.schema_arrow
        column = _require(file, schema.names, ("image", "path"))
        names.update(_names_in(schema.metadata or {}))
        wanted = ("label", "split", "path") if column == "path" else ("label", "split")
        columns = [name for name in wanted if name in schema.names]
        table = parquet.read(columns, use_threads=False)
        groups = range(parquet.num_row_groups)
        cells = [
            _Cell(file.path, g, i) for g in groups for i in range(parquet.metadata.row_group(g).num_rows)
        ]
    labels = table["label"].to_pylist()
    splits = table["split"].to_pylist() if "split" in columns else [None] * len(labels)
    pictures = table["path"].to_pylist() if column == "path" else cells
    yield from map(_Row, labels, splits, pictures)


def _names_in(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """Names that Hugging Face's data sets keep in a Parquet file, by class index."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {str(i): name.replace("_", " ") for i, name in enumerate(names)}


def _load(place: _Cell | Bytes) -> Image.Image:
    if isinstance(place, Bytes):
        return load_bytes(place)
    with reading(place.path), intact(place.path):
        cell = _cursor(place.path, place.group, os.getpid()).cell(place.row)
    if isinstance(cell, dict):  # as Hugging Face's data sets have pictures
        if cell.get("bytes") is None and cell.get("path"):
            return load_bytes(Bytes(joined(place.path.rpartition("/")[0], cell["path"])))
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        raise DataError(f"the cell has no bytes of a picture, but {type(cell).__name__}")
    return decoded(cell)


class _Cursor:
    """Reads the pictures of a row group forwards, a few at a time, as a row group may be the whole file.

    What is held is one page of it: up to 1,024 rows, as Arrow writes them.
    """

    def __init__(self, path: str, group: int) -> None:
        self._parquet, self._group = _parquet_file(path), group
        self._rewind()

    def _rewind(self) -> None:
        self._start = self._stop = 0  # rows of the batch that is held
        self._batches = self._parquet.iter_batches(
            16, row_groups=[self._group], columns=["image"], use_threads=False
        )

    def cell(self, row: int) -> Any:
        if row < self._start:
            self._rewind()
        while row >= self._stop:
            batch = next(self._batches, None)
            if batch is None:  # an earlier one could not be read
                raise DataError("the picture lies behind a damaged one")
            self._batch = batch
            self._start, self._stop = self._stop, self._stop + len(batch)
        return self._batch.column(0)[row - self._start].as_py()


@lru_cache(maxsize=4)
def _cursor(path: str, group: int, pid: int) -> _Cursor:
    return _Cursor(path, group)  # by process, as open files do not survive a fork


def _parquet_file(path: str) -> pq.ParquetFile:
    # Buffered and not ahead, else a column of a row group is read at once.
    source = open_file(path) if is_remote(path) else path
    return pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
