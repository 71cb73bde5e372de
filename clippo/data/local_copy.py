"""Copies of remote folders, for readers that know local files only."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from clippo.data.files import File, chunks, find, public
from clippo.errors import ConfigError, DataError
from clippo.remote import locked, node_cache, reason

logger = logging.getLogger(__name__)

COPIES = 16  # files that are copied at once
DEPTH = 16  # levels of folders


class LocalCopy(NamedTuple):
    """A remote folder's copy on this machine.

    Attributes:
        folder: where its files are.
        stamps: names and stamps of the files as the store gives them, the same on every machine.
    """

    folder: Path
    stamps: list[str]


def local_copy(root: str) -> LocalCopy:
    """A remote folder as it is now, copied into this machine's cache unless that was done before.

    The copy is named after the place and its stamps, so a folder that changes is copied anew. Any number of
    processes may ask at once: one copies, the others wait for it.

    Raises:
        ConfigError: there is no such folder, it cannot be read, or this machine cannot keep the copy.
        DataError: the folder changed while it was copied.
    """
    files = find(root, DEPTH)
    stamps = [f"{file.name}:{file.stamp}" for file in files]
    name = hashlib.sha256("\n".join([root.rstrip("/"), *stamps]).encode()).hexdigest()[:32]
    cache = node_cache() / "copies"
    folder, unfinished = cache / name, cache / f".{name}.tmp"
    try:
        if not folder.exists():
            with locked(cache / f"{name}.lock"):
                if not folder.exists():  # else somebody else was first
                    logger.warning("copying %d files of %s to %s", len(files), public(root), folder)
                    _copy_all(root, files, unfinished)
                    unfinished.replace(folder)
    except OSError as error:  # what the store raises is a ClippoError by now
        raise ConfigError(
            f"cannot copy {public(root)} to {cache}: {reason(error)}, or set CLIPPO_CACHE"
        ) from None
    return LocalCopy(folder, stamps)


def _copy_all(root: str, files: list[File], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(lambda file: _copy(file, folder), files))
        if find(root, DEPTH) != files:
            raise DataError(f"{public(root)} changed while it was copied; try again")
    except BaseException:  # also Ctrl-C: half a copy is of no use, but may be large
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy(file: File, folder: Path) -> None:
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as written:
        for chunk in chunks(file.path):
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())  # before the folder gets its name
