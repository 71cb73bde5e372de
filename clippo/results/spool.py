"""A queue of objects on local disk that outlives its process.

    <root>/store                        where the objects are to go, for people who look
    <root>/<writer>/lock                held by the process that delivers the objects in this folder
    <root>/<writer>/<number>.object     a key, a line break, the object

A process writes to a folder of its own, and takes over the folders of processes that have died.
"""

import fcntl
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from clippo.results.objects import write_whole


@dataclass(eq=False)
class Item:
    """An object that waits: in a file, or in memory while no file can be written."""

    key: str
    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes | None:
        """The object; None if its file has gone."""
        if self.path is None:
            return self.data
        try:
            return self.path.read_bytes().partition(b"\n")[2]
        except FileNotFoundError:
            return None


class Spool:
    """Objects that wait, by key, oldest first. Not safe for several threads.

    Args:
        root: folder for the objects of one store; nothing is written until something waits.
        store: the URL of that store.
    """

    def __init__(self, root: Path, store: str) -> None:
        self.root, self.items = root, dict[str, Item]()
        self._store = store
        self._own: Path | None = None
        self._locks: dict[Path, int] = {}
        self._number = 0
        found = []
        for folder in root.iterdir() if root.is_dir() else ():
            if folder.is_dir() and self._lock(folder):
                found += list(folder.glob("*.object"))
        for path in sorted(found, key=lambda path: path.name):
            with path.open("rb") as file:
                self._queue(Item(file.readline().decode().rstrip("\n"), path))

    def add(self, key: str, data: bytes) -> None:
        """Queues an object, in place of one of the same key."""
        self._queue(Item(key, data=data))
        self.settle()

    def remove(self, item: Item) -> None:
        """Takes an object out, unless another of its key has come in its place."""
        if self.items.get(item.key) is item:
            del self.items[item.key]
        if item.path is not None:
            item.path.unlink(missing_ok=True)

    def settle(self) -> str:
        """Writes to disk what is in memory only; returns why that failed, '' if it did not."""
        for item in self.items.values():
            if item.data is not None:
                try:
                    # Numbers go up over all writers, so that objects are delivered in their order.
                    self._number = max(self._number + 1, time.time_ns())
                    path = self._folder() / f"{self._number:020}.object"
                    write_whole(path, item.key.encode() + b"\n" + item.data)
                except OSError as error:
                    return str(error)
                item.path, item.data = path, None
        return ""

    def probe(self) -> str:
        """Writes a file and deletes it; returns why that failed, '' if it did not."""
        try:
            probe = self._folder() / "probe"
            write_whole(probe, bytes(1 << 16))
            probe.unlink()
        except OSError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Leaves what still waits to the next process."""
        for folder, lock in self._locks.items():
            if not any(folder.glob("*.object")):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
        self._locks.clear()
        self._own = None

    def _queue(self, item: Item) -> None:
        if (old := self.items.pop(item.key, None)) is not None:
            self.remove(old)
        self.items[item.key] = item

    def _folder(self) -> Path:
        if self._own is None:
            folder = self.root / uuid.uuid4().hex
            folder.mkdir(parents=True)
            if not self._lock(folder):
                raise OSError(f"{folder} cannot be locked")
            write_whole(self.root / "store", self._store.encode() + b"\n")
            self._own = folder
        return self._own

    def _lock(self, folder: Path) -> bool:
        """Takes a folder, whose process has died or is this one."""
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        except OSError:  # its process has just delivered everything
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._locks[folder] = lock
        return True
