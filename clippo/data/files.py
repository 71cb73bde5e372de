"""Files of data sets: on local disk, ``s3://`` or another store that fsspec knows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from clippo.errors import ClippoError, ConfigError, DataError
from clippo.remote import client, reason, refuse_password


class File(NamedTuple):
    """A file below a listed folder.

    Attributes:
        name: its path below that folder, with ``/``.
        path: local path or URL, as :func:`read` takes it.
        stamp: size, and modification time or what the store gives for it (etag): changes with the content.
    """

    name: str
    path: str
    stamp: str


def is_remote(path: str) -> bool:
    """Whether it is a URL of other than the local disk."""
    return "://" in path and not path.startswith("file://")


def joined(folder: str, path: str) -> str:
    """``path`` below ``folder``, unless it is absolute or a URL itself."""
    if "://" in path or os.path.isabs(path):
        return path
    scheme, mark, rest = folder.rpartition("://")
    return scheme + mark + os.path.normpath(f"{rest}/{path}")  # stores know no ".."


def find(root: str, depth: int) -> list[File]:
    """The file ``root``, or all files up to ``depth`` levels below the folder ``root``, sorted by name.

    What begins with a dot is left out; links are followed.

    Raises:
        ConfigError, DataError: there is no such place, or it cannot be listed.
    """
    with reading(root):
        files = _find_remote(root) if is_remote(root) else _find_local(root, depth)
    if files is None:
        raise ConfigError(f"there is no such folder or file: {public(root)}")
    return sorted(f for f in files if f.name.count("/") < depth and not _hidden(f.name))


def read(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file's bytes, or those from ``start`` to ``end``.

    Raises:
        DataError: this one file is missing or cannot be read.
        ConfigError: its store cannot be read (no connection, no access), so that other files fail too.
    """
    with reading(path):
        if is_remote(path):
            return _filesystem(path).cat_file(path, start=start, end=end)
        with open(_local(path), "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))


def open_file(path: str) -> BinaryIO:
    """A file to seek in, opened within :func:`reading`, which also covers what is done with it."""
    return _filesystem(path).open(path, block_size=8 << 20) if is_remote(path) else open(_local(path), "rb")


def chunks(path: str) -> Iterator[bytes]:
    """A file's bytes in order, some megabytes at a time; raises what :func:`read` does."""
    with reading(path), open_file(path) as file:
        while chunk := file.read(8 << 20):
            yield chunk


def stamp(path: str) -> str:
    """The stamp of a file on local disk; empty if there is none."""
    try:
        return _stamp(os.stat(_local(path)))
    except OSError:
        return ""


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what file systems raise into what :func:`read` raises."""
    try:
        yield
    except ClippoError:
        raise
    except FileNotFoundError:
        raise DataError(f"{public(path)} does not exist") from None
    except Exception as error:  # each file system has exceptions of its own
        if is_remote(path):
            # Without its cause, as that may show the request and whatever it was signed with.
            raise ConfigError(f"cannot read {public(path)}: {reason(error)}") from None
        if isinstance(error, OSError):
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        raise


def public(path: str) -> str:
    """A path or URL as it may be printed."""
    return path.partition("?")[0] if is_remote(path) else path  # what follows may be a signature


def _find_local(root: str, depth: int) -> list[File] | None:
    top = _local(root)
    if not os.path.exists(top):
        return None
    if os.path.isfile(top):
        return [File(os.path.basename(top), top, _stamp(os.stat(top)))]

    def below(folder: str, prefix: str, depth: int) -> Iterator[File]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if depth > 1 and not _hidden(entry.name):
                        yield from below(entry.path, f"{prefix}{entry.name}/", depth - 1)
                elif entry.is_file():  # no pipe, no broken link
                    yield File(prefix + entry.name, entry.path, _stamp(entry.stat()))

    return list(below(top, "", depth))


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def _find_remote(root: str) -> list[File] | None:
    fs = _filesystem(root)
    top = fs._strip_protocol(root).rstrip("/")
    entries: dict[str, dict[str, Any]] = fs.find(top, detail=True)
    if not entries:
        return None
    return [
        File(
            path[len(top) + 1 :] or path.rpartition("/")[2],
            fs.unstrip_protocol(path),
            f"{info.get('size')}:{_version(info)}",
        )
        for path, info in entries.items()
        if info["type"] == "file" and not path.endswith("/")
    ]


def _version(info: dict[str, Any]) -> str:
    names = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "mtime", "updated", "created")
    return str(next((info[name] for name in names if info.get(name)), ""))


def _hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _local(path: str) -> str:
    return os.path.join(os.getcwd(), os.path.expanduser(path.removeprefix("file://")))


def _filesystem(path: str) -> Any:
    refuse_password(path, "data")
    return client(path, max_concurrency=1)  # a picture is read by one request
