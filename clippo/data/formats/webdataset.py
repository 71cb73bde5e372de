"""WebDataset: tar files whose members of one name are a picture and its label."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from clippo.data.files import File, find, open_file, read, reading
from clippo.data.formats.listing import (
    DEPTH,
    IMAGE_SUFFIXES,
    Bytes,
    Listing,
    Picture,
    intact,
    load_bytes,
    split_in,
)
from clippo.data.names import lines
from clippo.errors import ConfigError, DataError
from clippo.remote import node_cache

_Index = list[tuple[str, str, int, int]]  # key, label, first byte of the picture, and the one behind its last


def list_webdataset(root: str) -> Listing:
    """Tar shards whose members of one key are a picture and its label (``.cls``, or ``.json`` with a label).

    A ``classnames.txt`` beside the shards, or in the folder, names the classes that are numbers.
    """
    shards, names = _shards(root)
    with ThreadPoolExecutor(8) as pool:
        indices = list(pool.map(_index, shards))
    pictures = [
        Picture(f"{shard.name}/{key}", label, split_in(shard.name), Bytes(shard.path, start, end))
        for shard, index in zip(shards, indices, strict=True)
        for key, label, start, end in index
    ]
    return Listing(
        layout="in .tar files (not compressed), each a 0001.jpg (.png, ...) beside a 0001.cls or 0001.json",
        pictures=pictures,
        load=load_bytes,
        stamps=[f"{shard.name}:{shard.stamp}" for shard in shards],
        names=names,
    )


def _shards(root: str) -> tuple[list[File], dict[str, str]]:
    """The shards of a folder, a file or a pattern, and the names of classes that lie beside them."""
    if "{" in root:
        folder = root.partition("{")[0].rpartition("/")[0] or "."
        wanted = list(_expanded(root.removeprefix(f"{folder}/")))
        files = find(folder, 1 + max(name.count("/") for name in wanted))
        by_name = {file.name: file for file in files}
        if missing := [name for name in wanted if name not in by_name]:
            raise ConfigError(
                f"{len(missing)} of the {len(wanted)} shards {root} do not exist, as {missing[0]}"
            )
        shards = [by_name[name] for name in wanted]
    else:
        files = find(root, DEPTH)
        shards = [file for file in files if file.name.endswith(".tar")]
    for file in files:
        if file.name == "classnames.txt":
            with intact(file.path):
                return shards, {str(i): name for i, name in enumerate(lines(read(file.path)))}
    return shards, {}


def _expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for.

    >>> list(_expanded("{train,val}-{08..10}.tar"))[2:]
    ['train-10.tar', 'val-08.tar', 'val-09.tar', 'val-10.tar']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    choices = found[1].split(",")
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        choices = [f"{i:0{len(ends[1])}}" for i in range(int(ends[1]), int(ends[2]) + 1)]
    for choice in choices:
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _index(shard: File) -> _Index:
    """The samples of a shard; kept in the user's cache, as the whole shard is gone through to find them."""
    cache = node_cache() / "shards"
    kept = cache / f"{hashlib.sha256(f'1:{shard.path}:{shard.stamp}'.encode()).hexdigest()[:32]}.json"
    try:
        return json.loads(kept.read_bytes())
    except (OSError, ValueError):
        index = _index_of(shard)
    temporary = kept.with_suffix(f".{uuid.uuid4().hex}")
    with suppress(OSError):  # where nothing can be kept, it costs time only
        cache.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(index))
        temporary.replace(kept)
    return index


def _index_of(shard: File) -> _Index:
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    with (
        reading(shard.path),
        intact(shard.path),
        open_file(shard.path) as source,
        tarfile.open(fileobj=source, mode="r:") as tar,
    ):
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of a large shard
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if not stem or not member.isreg():
                continue
            key = f"{folder}/{stem}" if folder else stem
            suffix = f".{extension.lower().rpartition('.')[2]}"
            if suffix in IMAGE_SUFFIXES:
                pictures.setdefault(key, (member.offset_data, member.offset_data + member.size))
            elif suffix in (".cls", ".json"):
                file = tar.extractfile(member)
                assert file is not None
                content = file.read().decode()
                if suffix == ".cls":
                    labels[key] = content.strip()
                elif (label := _label_in(json.loads(content))) is not None:
                    labels.setdefault(key, label)
    if unnamed := [key for key in pictures if not labels.get(key)]:
        raise DataError(
            f"{len(unnamed)} of {len(pictures)} samples of {shard.path} have no label, as {unnamed[0]}; each "
            "needs a .cls, or a .json with a label"
        )
    return [(key, labels[key], *place) for key, place in pictures.items()]


def _label_in(sample: Any) -> str | None:
    label = sample.get("label") if isinstance(sample, dict) else None
    return str(label) if isinstance(label, str | int) else None
