"""Places of pictures, prepared sets and results: one set-up of their clients, one wording of their failures.

Endpoint and credentials of S3 come from where botocore looks for them: the AWS_* variables, ~/.aws, the
instance.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from clippo.errors import ConfigError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LONGEST_PAUSE = 10.0  # between two attempts [s]
_EREMOTEIO = getattr(errno, "EREMOTEIO", errno.EIO)  # Linux has it


def node_cache() -> Path:
    """The folder in which this machine keeps what it can get again: CLIPPO_CACHE, or the user's."""
    return Path(os.environ.get("CLIPPO_CACHE") or Path.home() / ".cache" / "clippo").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process of this machine at a time pass; the system frees the lock of a dead one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_s3(url: str) -> bool:
    return urlsplit(url).scheme in ("s3", "s3a")


def refuse_password(url: str, what: str) -> None:
    """Refuses a URL with a password in it, as URLs are printed.

    Raises:
        ConfigError: it has one.
    """
    parts = urlsplit(url)
    if parts.password is not None:
        raise ConfigError(
            f"the URL of {what} at {parts.hostname} carries a password; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )


def connect(url: str, *, answer: float = 60.0, attempts: int = 3, **s3: Any) -> tuple[Any, str]:
    """A new client of a path or URL, and the path there.

    Nothing is cached, as other processes write too.

    Args:
        answer: how long an S3 server may take for an answer [s].
        attempts: how often botocore tries; with the default a dead endpoint is reported in less than 15 s.
        s3: more arguments of s3fs.S3FileSystem, left out where it is another file system.

    Raises:
        ValueError, ImportError: fsspec knows no such kind of URL, or lacks a package for it.
    """
    options: dict[str, Any] = {}
    if is_s3(url):
        config = {
            "connect_timeout": 3,
            "read_timeout": answer,
            "retries": {"mode": "standard", "total_max_attempts": attempts},
            "max_pool_connections": 64,  # the objects of many trials are read at once
        }
        options = {"config_kwargs": config, "session": _session(), **s3}
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    if options:
        fs.retries = min(2, attempts)  # on top of botocore's; the default of 5 would make 15 attempts
    return fs, str(path).rstrip("/")


def client(url: str, **s3: Any) -> Any:
    """This process's client of a place, which is made anew when credentials or the endpoint change."""
    parts = urlsplit(url)
    environment = tuple(item for item in sorted(os.environ.items()) if item[0].startswith("AWS_"))
    # By process, as a client does not survive a fork.
    return _client(f"{parts.scheme}://{parts.netloc}", os.getpid(), environment, tuple(sorted(s3.items())))


@functools.lru_cache(maxsize=8)
def _client(
    url: str, pid: int, environment: tuple[tuple[str, str], ...], s3: tuple[tuple[str, Any], ...]
) -> Any:
    return connect(url, **dict(s3))[0]


def reason(error: Exception) -> str:
    """Why a place cannot be used, and what to do, in one line without secrets."""
    kind = type(error).__name__  # by name, so that local files need not import botocore
    endpoint = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url", "")))
    server = f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}" if endpoint.netloc else "the server"
    said = " ".join(str(error).split())
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return f"no connection to {server}; check AWS_ENDPOINT_URL and the network"
    if kind in ("ReadTimeoutError", "ConnectionClosedError", "FSTimeoutError", "TimeoutError"):
        return f"{server} does not answer; check that it is up, and try again"
    if isinstance(error, PermissionError):
        return f"access denied ({said}); check the credentials and their rights, or the directory's mode"
    if isinstance(error, FileNotFoundError):
        return f"not found ({said}); create the bucket or directory, or mend the URL"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room ({said}); free some on its disk"
    return f"{kind}: {said}; check the path or URL, the space that is left, and the server"


def passes(error: Exception) -> bool:
    """Whether the same call may succeed a little later although nobody mends anything."""
    kinds = {c.__name__ for c in type(error).__mro__}  # by name: a local store need not import botocore
    if kinds & {"HTTPClientError", "EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError",
                "ResponseParserError", "TimeoutError", "FSTimeoutError", "ConnectionError"}:  # fmt: skip
        return True
    # What s3fs makes of 500, 503 and others, and what a network disk says.
    return isinstance(error, OSError) and error.errno in (_EREMOTEIO, errno.EBUSY, errno.EIO, errno.ESTALE)


def patiently(
    call: Callable[[], Result],
    patience: float,
    *,
    worth_another: Callable[[Exception], bool] = passes,
    telling: Callable[[Exception], object] = str,
) -> Result:
    """What ``call`` returns; while it fails, it is called again for so long [s], and then its error raised.

    Args:
        worth_another: whether an error may be gone the next time; it may mend something.
        telling: what the log is told of the first failure.
    """
    end, pause, told = time.monotonic() + patience, 0.5, False
    while True:
        try:
            return call()
        except Exception as error:  # each file system has exceptions of its own
            if time.monotonic() + pause > end or not worth_another(error):
                raise
            if not told:
                logger.warning("%s; trying again for %.0f s", telling(error), patience)
                told = True
        time.sleep(pause * random.uniform(0.5, 1.0))  # not all workers at the same moment
        pause = min(2 * pause, LONGEST_PAUSE)


def _session() -> Any:
    """A new session, with credentials of this moment, but not with megabytes of JSON that are read anew."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]  # it comes with s3fs

    session = AioSession()
    session.register_component("data_loader", _loader())
    return session


@functools.cache
def _loader() -> Any:
    from botocore.loaders import create_loader  # type: ignore[import-untyped]

    return create_loader()
