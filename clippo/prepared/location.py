"""Where prepared sets are kept, and how a node gets them.

    <digest>/manifest.json                          written last; a set without it is unfinished
    <digest>/sets/<set>/<start>-<sha256>.arrow      the rows of one set and shard
    <digest>/shards/<part>/<start>.json             what a shard became, written after its files
    text-<digest>.safetensors                       text features

The same keys are used in a node's cache and below a shared URL. Every object is written whole, so a writer
that is killed leaves nothing that a reader could mistake for finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from clippo.errors import ClippoError, ConfigError, DataError, StoreError
from clippo.remote import client, connect, locked, node_cache, patiently, reason

DOWNLOADS = 8  # files that a node fetches at once
OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR)
STALE = 3600  # age of a temporary file whose writer must have died [seconds]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Location:
    """Where prepared sets are kept.

    Attributes:
        folder: folder of a machine that sets are memory-mapped from; None: each node's own (``node_cache``).
        shared: URL below which all nodes find them, such as ``s3://bucket/prefix/prepared``; None when the
            folder itself is the place.
        patience: how long the shared place is tried again when it does not answer [s].

    Its methods raise StoreError, in one line and without secrets, when a place cannot be used.
    """

    folder: Path | None
    shared: str | None = None
    patience: float = 0.0

    @property
    def cache(self) -> Path:
        """The folder of the machine that asks."""
        return self.folder or node_cache() / "prepared"

    def __str__(self) -> str:
        return self.shared or str(self.cache)

    def read(self, key: str) -> bytes | None:
        """An object of the place where sets are kept, None if there is none."""

        def read(fs: Any, root: str) -> bytes | None:
            try:
                return bytes(fs.cat_file(f"{root}/{key}"))
            except FileNotFoundError:
                return None

        return self._using("read", read)

    def read_below(self, folder: str) -> dict[str, bytes]:
        """All objects below a folder of the place where sets are kept, by key."""

        def read(fs: Any, root: str) -> dict[str, bytes]:
            keys = [k for k in self._listed(fs, root, folder) if not _is_temporary(k)]
            found = fs.cat_ranges([f"{root}/{k}" for k in keys], None, None, on_error="raise")
            return {k: bytes(data) for k, data in zip(keys, found, strict=True)}

        return self._using("read", read)

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of all objects below a folder of the place where sets are kept, by key."""
        return self._using("list", lambda fs, root: self._listed(fs, root, folder))

    def write(self, key: str, data: bytes) -> None:
        """Keeps an object, in the cache and, where there is one, in the shared place."""
        with self.reporting("write to"), whole_file(self.cache / key) as temporary:
            temporary.write_bytes(data)
        self.publish(key)

    def publish(self, key: str) -> None:
        """Copies a file of the cache to the shared place, if there is one."""
        if self.shared is not None:
            self._using("write to", lambda fs, root: fs.put_file(str(self.cache / key), f"{root}/{key}"))

    def download(self, key: str) -> None:
        """Copies an object of the shared place to the cache."""

        def get(fs: Any, root: str) -> None:
            with whole_file(self.cache / key) as temporary:
                fs.get_file(f"{root}/{key}", str(temporary))

        self._using("read", get)

    def _listed(self, fs: Any, root: str, folder: str) -> dict[str, int]:
        if self.shared is not None:
            found = fs.find(f"{root}/{folder}", detail=True)
            return {p.removeprefix(f"{root}/"): i["size"] for p, i in found.items() if i["type"] == "file"}
        sizes = {}
        for path in Path(root, folder).rglob("*"):
            with suppress(FileNotFoundError):  # a temporary file of another process
                if path.is_file():
                    sizes[path.relative_to(root).as_posix()] = path.stat().st_size
        return sizes

    def _using(self, action: str, use: Callable[[Any, str], Result]) -> Result:
        if self.shared is None:
            with self.reporting(action):
                return use(*connect(str(self.cache)))
        try:
            fs = client(self.shared)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{self.shared!r} is no place for prepared sets: {error}") from error
        with self.reporting(action, Exception):  # each file system has exceptions of its own
            root = fs._strip_protocol(self.shared).rstrip("/")
            return patiently(lambda: use(fs, root), self.patience, telling=reason)

    @contextmanager
    def reporting(self, action: str, kind: type[Exception] = OSError) -> Iterator[None]:
        """Makes one line of what a file system raises."""
        try:
            yield
        except ClippoError:
            raise
        except kind as error:
            # Without its cause, as that may show the request and whatever it was signed with.
            if isinstance(error, OSError) and error.errno in OF_THIS_MACHINE:
                raise self.unusable_cache(error) from None
            raise StoreError(f"cannot {action} {self}: {reason(error)}") from None

    def unusable_cache(self, error: OSError) -> StoreError:
        """What is said when this machine cannot keep a set."""
        remedy = "make room there" + (" or set CLIPPO_CACHE" if self.shared is not None else "")
        where = f"{self.cache} of {socket.gethostname()}"
        return StoreError(f"cannot write to {where}: {reason(error)}; {remedy}")


def fetch(digest: str, location: Location) -> Path:
    """The folder of a prepared set on this machine; what of it is only in the shared place is copied, once.

    Any number of processes may ask at once: one copies, the others wait for it. What was copied before an
    interruption is not copied again.

    Raises:
        DataError: there is no such finished set, or a file is not what the manifest says, twice in a row.
        StoreError: the shared place cannot be read, or this machine cannot keep a copy.
    """
    folder = location.cache / digest
    try:
        if is_whole(folder):
            return folder
        if location.shared is None:
            raise DataError(f"{folder} is no whole prepared set; prepare it again")
        location.cache.mkdir(parents=True, exist_ok=True)
        with locked(location.cache / f"{digest}.lock"):
            if is_whole(folder):  # somebody else was first
                return folder
            remove_stale(folder)
            manifest = location.read(f"{digest}/manifest.json")
            if manifest is None:
                raise DataError(f"{location.shared}/{digest} is no finished prepared set; prepare it again")
            files = files_of(json.loads(manifest))
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                list(pool.map(lambda file: _fetch_file(digest, file, location), files))
            with whole_file(folder / "manifest.json") as temporary:
                temporary.write_bytes(manifest)
    except OSError as error:  # what the shared place raises is a StoreError by now
        raise location.unusable_cache(error) from None
    return folder


def _fetch_file(digest: str, file: dict[str, Any], location: Location) -> None:
    key = f"{digest}/{file['file']}"
    path = location.cache / key
    for attempt in range(3):
        if attempt:
            location.download(key)
        if path.exists() and path.stat().st_size == file["size"] and sha256_of(path) == file["sha256"]:
            return
    raise DataError(
        f"{location.shared}/{key} is not what its manifest says, twice in a row; "
        f"remove {location.shared}/{digest} and prepare it again"
    )


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """``file`` (relative to the set's folder), ``size``, ``sha256`` and ``rows`` of each Arrow file."""
    return [file for rows in manifest["sets"].values() for file in rows["files"]]


def is_whole(folder: Path) -> bool:
    """Whether a set on this machine has its manifest, and all files in the sizes that it says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all((folder / f["file"]).stat().st_size == f["size"] for f in files_of(manifest))
    except FileNotFoundError:
        return False


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when it was written without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Renames a file that is complete, after its bytes have reached the disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def remove_stale(folder: Path) -> None:
    """Removes temporary files whose writers have died."""
    for path in folder.rglob("*"):
        if _is_temporary(path.name):
            with suppress(FileNotFoundError):  # its writer is alive after all, or somebody else removes it
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()


def _is_temporary(key: str) -> bool:
    return key.endswith(".tmp")
