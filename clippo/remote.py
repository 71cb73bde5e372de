"""Places of pictures, prepared sets and results: one set-up of their clients, one wording of their failures.

Endpoint and credentials of S3 come from where botocore looks for them: the AWS_* variables, ~/.aws, the
instance.
"""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from clippo.errors import ConfigError


def node_cache() -> Path:
    """The folder in which this machine keeps what it can get again: CLIPPO_CACHE, or the user's."""
    return Path(os.environ.get("CLIPPO_CACHE") or Path.home() / ".cache" / "clippo").expanduser()


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
