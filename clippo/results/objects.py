"""Objects below one path or URL: each written whole under its key, and every failure one line.

A key is relative to the root and has ``/`` between its parts. Local directories, S3 and whatever else fsspec
knows behave alike, with one difference: a conditional write (:meth:`Objects.create`, :meth:`Objects.swap`) is
atomic only where the store has such a thing, as local directories, AWS and SeaweedFS do.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem

from clippo.errors import ConfigError, StoreError
from clippo.remote import connect, is_s3, passes, patiently, reason, refuse_password

Result = TypeVar("Result")

MIN_FREE = 64 << 20  # a local store with less room [bytes] is refused before the first trial
SLOWEST = 250_000  # an upload slower than this [bytes/s] counts as one that the server does not take


class StoreUnavailableError(StoreError):
    """The store does not answer, or answers that it cannot now; trying again may help."""


class Objects:
    """What lies below one path or URL.

    Args:
        uri: a path, ``file://``, ``s3://bucket/prefix``, or the URL of another fsspec file system.
        endpoint_url: of an S3 server that is not AWS; default: AWS_ENDPOINT_URL.
        patience: how long an operation that fails is tried again [s].
        answer: how long the server may take for an answer [s].
        attempts: how often botocore tries; its own retries come before those of ``patience``.

    Raises:
        ConfigError: the URL is of no known kind, lacks its bucket, or carries a password.

    Methods raise StoreError, of which StoreUnavailableError may pass by itself; no message, cause or
    context of one shows a secret.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        endpoint_url: str | None = None,
        patience: float = 0.0,
        answer: float = 15.0,
        attempts: int = 3,
    ) -> None:
        uri = os.fspath(uri)
        for url in (uri, endpoint_url or ""):
            refuse_password(url, "the result store")
        s3 = is_s3(uri)
        if s3 and not urlsplit(uri).netloc:
            raise ConfigError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        if endpoint_url and not s3:
            raise ConfigError(f"{uri!r} has no endpoint ({endpoint_url}); write s3://bucket/prefix")
        self.patience, self._answer = patience, answer
        self._s3 = s3
        # No caches: other processes write too, and credentials may change while this one lives.
        self._client = partial(connect, uri, answer=answer, attempts=attempts, endpoint_url=endpoint_url)
        self._uri = uri
        self._root = self._connect()
        self.local = isinstance(self._fs, LocalFileSystem)
        self.uri: str = self._root if self.local else self._fs.unstrip_protocol(self._root)

    # ---- reading

    def find(self, folder: str) -> list[str]:
        """The keys of all objects below a folder, sorted; none if there is no such folder."""
        return self._try("list", lambda: self._find(folder))

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder."""

        def names() -> list[str]:
            try:
                found = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
            return [path.rstrip("/").rpartition("/")[2] for path in found]

        return self._try("list", names)

    def get(self, keys: Sequence[str]) -> list[bytes | None]:
        """The objects, or None for one that does not exist; all at once where the file system can."""
        paths = [self._path(key) for key in keys]

        def read() -> list[bytes | None]:
            found: list[bytes | Exception] = self._fs.cat_ranges(paths, None, None, on_error="return")
            for data in found:
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
            return [None if isinstance(data, Exception) else bytes(data) for data in found]

        return self._try("read", read)

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return self._try("read", lambda: bool(self._fs.exists(self._path(key))))

    def get_version(self, key: str) -> tuple[bytes, str] | None:
        """An object, and the version that :meth:`swap` compares; None if it does not exist."""

        def read() -> tuple[bytes, str] | None:
            try:
                # Its version first: were it replaced in between, the swap would rightly fail.
                version = self._version(key)
                return bytes(self._fs.cat_file(self._path(key))), version
            except FileNotFoundError:
                return None

        return self._try("read", read)

    # ---- writing

    def put(self, key: str, data: bytes) -> None:
        """Writes an object, in place of the one that was there."""
        self._try("write to", lambda: self._put(key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Writes an object where there is none; returns whether there was none.

        An attempt whose answer was lost is repeated, and then finds its own object: see :meth:`take`.
        """
        return self._try("write to", lambda: _taken(lambda: self._put(key, data, mode="create")))

    def take(self, key: str, data: bytes) -> bool:
        """Like :meth:`create`, but finding this very object is no refusal; so its bytes must be unique."""
        return self.create(key, data) or self.get([key]) == [data]

    def swap(self, key: str, data: bytes, version: str | None) -> bool:
        """Replaces an object if it still has this version (None: if it does not exist); returns whether."""
        if version is None:
            return self.create(key, data)
        return self._try("write to", lambda: _taken(lambda: self._swap(key, data, version)))

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; one that does not exist is no error."""
        paths = [self._path(key) for key in keys]

        def delete() -> None:
            if self._s3:
                self._call("rm", paths, within=self._answer + len(paths) / 50)  # 1,000 in each request
                return
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

        if keys:
            self._try("delete from", delete)

    def probe(self) -> None:
        """Lists, writes, reads and deletes an object, and looks for room on a local disk."""
        key = f".probe-{uuid.uuid4().hex}"
        self.find(key)  # first, as some servers make a missing bucket at the first PUT
        self.put(key, b"probe")
        if self.get([key]) != [b"probe"]:
            raise StoreError(f"{self.uri} does not give back what was written to it; check the server")
        self.delete([key])
        if self.local and (free := shutil.disk_usage(self._root).free) < MIN_FREE:
            raise StoreError(
                f"{self.uri} has {free >> 20} MiB left; free at least {MIN_FREE >> 20} MiB on its disk"
            )

    # ---- the file system

    def _connect(self) -> str:
        try:
            self._fs, root = self._client()
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{self._uri!r} is no result store: {error}; use s3://bucket/prefix") from error
        return root

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _find(self, folder: str) -> list[str]:
        path = self._path(folder)
        if not self.local:
            found = self._fs.find(path)
        else:
            # fsspec asks for the status of each file and takes a folder for empty when one has just gone.
            def refused(error: OSError) -> None:
                if not isinstance(error, FileNotFoundError):
                    raise error

            found = [os.path.join(at, n) for at, _, names in os.walk(path, onerror=refused) for n in names]
        return sorted(path.removeprefix(f"{self._root}/") for path in found)

    def _put(self, key: str, data: bytes, **conditions: str) -> None:
        path, mode = self._path(key), conditions.get("mode", "overwrite")
        if self.local:
            write_whole(path, data, create=mode == "create")
        elif self._s3:
            # aiohttp waits for "100 Continue", and for room to send, without any limit of its own.
            within = self._answer + len(data) / SLOWEST
            self._call("pipe_file", path, data, within=within, **conditions)
        else:
            self._fs.pipe_file(path, data, mode=mode)

    def _swap(self, key: str, data: bytes, version: str) -> None:
        if self._s3:
            self._put(key, data, IfMatch=version)
        elif self.local:
            folder = os.open(os.path.dirname(self._path(key)), os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                self._compare(key, version)
                self._put(key, data)
            finally:
                os.close(folder)
        else:
            self._compare(key, version)
            self._put(key, data)

    def _compare(self, key: str, version: str) -> None:
        if self._version(key) != version:
            raise FileExistsError(key)

    def _version(self, key: str) -> str:
        if self._s3:
            return str(self._fs.info(self._path(key))["ETag"])
        return hashlib.sha256(self._fs.cat_file(self._path(key))).hexdigest()

    def _call(self, method: str, *args: Any, within: float, **options: Any) -> None:
        """An asynchronous method of the file system, given up and cancelled after ``within`` seconds."""

        async def limited() -> None:
            await asyncio.wait_for(getattr(self._fs, f"_{method}")(*args, **options), within)

        fsspec.asyn.sync(self._fs.loop, limited)

    def _try(self, action: str, call: Callable[[], Result]) -> Result:
        def failure(error: Exception) -> StoreError:
            kind = StoreUnavailableError if passes(error) else StoreError
            return kind(f"cannot {action} {self.uri}: {reason(error)}")

        def worth_another(error: Exception) -> bool:
            if not passes(error):
                self._connect()  # with credentials that were renewed meanwhile
            return True

        try:
            return patiently(call, self.patience, worth_another=worth_another, telling=failure)
        except Exception as error:  # each file system has exceptions of its own
            failed = failure(error)
        # Out here without cause and context, which may show the request and whatever it was signed with.
        raise failed


def write_whole(path: str | Path, data: bytes, *, create: bool = False) -> None:
    """Writes a local file that is either whole and on disk, or not there.

    Raises:
        FileExistsError: with ``create``, there is one.
        OSError: it cannot be written; nothing is left behind.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if create:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)  # or the name may be gone after a power failure
        finally:
            os.close(directory)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _taken(put: Callable[[], None]) -> bool:
    """False where a conditional write was refused."""
    try:
        put()
    except OSError as error:
        # s3fs makes a FileExistsError of a refused conditional PUT only if the server names the condition.
        response = getattr(error.__cause__, "response", {})
        code = response.get("Error", {}).get("Code")
        if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        raise
    return True
