"""Result rows on a local directory, ``s3://`` or another object store that fsspec knows.

    sweeps/<sweep>.json                                        the config; whoever creates it owns the name
    started/sweep=<sweep>/<trial_id>-<attempt>.json            settings of a trial that has begun
    {trials,metrics,evals}/sweep=<sweep>/<trial_id>-<attempt>.parquet
    examples/sweep=<sweep>/examples.parquet

Every object is written whole under a key that follows from its content, so a retry is harmless and a reader
never sees half of one. A trial counts once its object below ``trials/`` exists; of several attempts the
highest counts. Objects named ``part-*`` are reserved for sealed sweeps.
"""

import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from clippo.errors import ConfigError, StoreError
from clippo.results import schema

logger = logging.getLogger(__name__)

# The endpoint and the credentials come from where botocore looks for them: the AWS_* variables, ~/.aws, the
# instance. Three attempts of 3 s and their pauses report a dead endpoint in less than 15 s.
_S3_CONFIG = {
    "connect_timeout": 3,
    "read_timeout": 15,
    "retries": {"mode": "standard", "total_max_attempts": 3},
    "max_pool_connections": 64,  # the objects of many trials are read at once
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_OBJECT = re.compile(r".*/sweep=([^/]+)/(?!part-)([^/]+)-(\d+)\.(?:parquet|json)")


class _Object(NamedTuple):
    sweep: str
    trial_id: str
    attempt: int
    path: str


class ResultStore:
    """Results of any number of sweeps, below one path or URL.

    Args:
        uri: a path, ``file://``, ``s3://bucket/prefix``, or the URL of another fsspec object store. Nothing
            is read or written until a method is called; :meth:`check` tells whether it will work.

    Raises:
        ConfigError: the URL is of no known kind, lacks its bucket, or carries a password.

    Every method raises StoreError, in one line and without secrets, when the store cannot be used, and
    ConfigError for a sweep name or trial id of other than letters, digits, ``-``, ``_`` and ``.``.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        uri = os.fspath(uri)
        parts = urlsplit(uri)
        if parts.password is not None:
            raise ConfigError(
                f"the URL of the result store at {parts.hostname} carries a password; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        if parts.scheme in ("s3", "s3a") and not parts.netloc:
            raise ConfigError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        options = {"config_kwargs": _S3_CONFIG} if parts.scheme in ("s3", "s3a") else {}
        try:
            # No caches: other processes write too, and credentials may change while this one lives.
            self._fs, root = fsspec.core.url_to_fs(
                uri, use_listings_cache=False, skip_instance_cache=True, **options
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{uri!r} is no result store: {error}; use s3://bucket/prefix") from error
        if options:
            self._fs.retries = 2  # on top of botocore's; the default of 5 would make 15 attempts
        self._root: str = root.rstrip("/")
        local = isinstance(self._fs, LocalFileSystem)
        self.uri: str = self._root if local else self._fs.unstrip_protocol(self._root)

    def __repr__(self) -> str:
        return f"ResultStore({self.uri!r})"

    def __reduce__(self) -> tuple[type["ResultStore"], tuple[str]]:
        return ResultStore, (self.uri,)  # a worker takes the credentials of its own environment

    # ---- writing

    def write_trial(
        self,
        sweep: str,
        trial_id: str,
        attempt: int,
        trial: Mapping[str, Any],
        metrics: Iterable[Mapping[str, Any]],
        evals: Iterable[Mapping[str, Any]],
    ) -> None:
        """Keep the rows of one finished trial, which need not repeat ``sweep``, ``trial_id`` and ``attempt``.

        Raises:
            StoreError: also for an unknown column, a value of the wrong type, or an unknown status.
        """
        if trial.get("status") not in schema.STATUSES:
            raise StoreError(f"trial status is {trial.get('status')!r}; one of {', '.join(schema.STATUSES)}")
        key = {"trial_id": trial_id, "attempt": attempt}
        # Encoded before the first write, and trials written last: it is what makes a trial count.
        objects = {
            name: schema.encode(name, [{**row, **key} for row in rows])
            for name, rows in (("metrics", metrics), ("evals", evals), ("trials", [trial]))
        }
        for name, data in objects.items():
            self._put(_trial_key(name, sweep, trial_id, attempt, "parquet"), data)

    def write_examples(self, sweep: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep the pictures of the report's gallery, in place of those kept before."""
        self._put(f"examples/sweep={_name('sweep', sweep)}/examples.parquet", schema.encode("examples", rows))

    def write_started(self, sweep: str, trial_id: str, attempt: int, settings: Mapping[str, Any]) -> None:
        """Note that a trial has begun, so that a resumed sweep knows what ran when its driver died."""
        row = {"trial_id": trial_id, "attempt": attempt, "started_at": _now(), "settings": settings}
        self._put(_trial_key("started", sweep, trial_id, attempt, "json"), _json(row))

    def write_config(self, sweep: str, config: Mapping[str, Any]) -> None:
        """Keep the config of a new sweep and thereby take its name.

        Raises:
            StoreError: also when the name is taken; of several processes that try, one succeeds.
        """
        key = f"sweeps/{_name('sweep', sweep)}.json"
        # The id tells our own object from another's: a PUT whose answer was lost is retried and then refused.
        data = _json({"id": uuid.uuid4().hex, "created_at": _now(), "config": config})
        if not self._put(key, data, create=True) and self.read_bytes(key) != data:
            raise StoreError(f"sweep {sweep!r} is already in {self.uri}; resume it or choose another name")

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Keep any other object, such as a checkpoint."""
        self._put(_relative(relative), data)

    # ---- reading

    def trials(self, sweep: str | None = None) -> pa.Table:
        """One row per finished trial: its highest attempt."""
        return self._rows("trials", self._latest("trials", sweep))

    def metrics(self, sweep: str | None = None) -> pa.Table:
        """The training curves of the attempts that :meth:`trials` lists."""
        return self._rows("metrics", self._counted("metrics", sweep))

    def evals(self, sweep: str | None = None) -> pa.Table:
        """The evaluation counts of the attempts that :meth:`trials` lists."""
        return self._rows("evals", self._counted("evals", sweep))

    def examples(self, sweep: str | None = None) -> pa.Table:
        """Pictures with what the models made of them."""
        paths = [path for path in self._find("examples", sweep) if path.endswith("/examples.parquet")]
        sweeps = [path.split("/")[-2].removeprefix("sweep=") for path in paths]
        return self._read("examples", sweeps, paths)

    def started(self, sweep: str) -> list[dict[str, Any]]:
        """``trial_id``, ``attempt``, ``started_at`` and ``settings`` of each trial begun, highest attempt."""
        found = self._get([item.path for item in self._latest("started", sweep)])
        return [json.loads(data) for data in found if data is not None]

    def config(self, sweep: str) -> dict[str, Any] | None:
        """The config a sweep was started with, or None if there is no such sweep."""
        [data] = self._get([self._path(f"sweeps/{_name('sweep', sweep)}.json")])
        return None if data is None else dict(json.loads(data)["config"])

    def sweeps(self) -> list[str]:
        """Names of all sweeps, sorted, with or without finished trials."""
        configs = [path.rpartition("/")[2] for path in self._find("sweeps", None) if path.endswith(".json")]
        finished = {item.sweep for item in self._objects("trials", None)}
        return sorted(finished.union(name.removesuffix(".json") for name in configs))

    def read_bytes(self, relative: str) -> bytes:
        """An object kept by :meth:`write_bytes`; StoreError if there is none."""
        [data] = self._get([self._path(_relative(relative))])
        if data is None:
            raise StoreError(f"{self.uri_of(relative)} does not exist")
        return data

    def exists(self, relative: str) -> bool:
        """Whether there is such an object."""
        with self._reporting("read"):
            return bool(self._fs.exists(self._path(_relative(relative))))

    def uri_of(self, relative: str) -> str:
        """The absolute path or URL of an object, for others to read it by."""
        return f"{self.uri}/{_relative(relative)}"

    def check(self) -> None:
        """List, write, read and delete a probe object.

        Raises:
            StoreError: what failed and what to do about it.
        """
        key = f".probe-{uuid.uuid4().hex}"
        path = self._path(key)
        with self._reporting("list"):
            self._fs.find(path)  # first, as some servers make a missing bucket at the first PUT
        self._put(key, b"probe")
        if self._get([path]) != [b"probe"]:
            raise StoreError(f"{self.uri} does not give back what was written to it; check the server")
        with self._reporting("delete from"):
            self._fs.rm_file(path)

    # ---- objects

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"

    def _find(self, folder: str, sweep: str | None) -> list[str]:
        with self._reporting("list"):
            below = folder if sweep is None else f"{folder}/sweep={_name('sweep', sweep)}"
            return sorted(self._fs.find(self._path(below)))

    def _objects(self, folder: str, sweep: str | None) -> list[_Object]:
        matches = (_OBJECT.fullmatch(path) for path in self._find(folder, sweep))
        return [_Object(m[1], m[2], int(m[3]), m[0]) for m in matches if m]

    def _latest(self, folder: str, sweep: str | None) -> list[_Object]:
        by_attempt = sorted(self._objects(folder, sweep), key=lambda item: item.attempt)
        return sorted({(item.sweep, item.trial_id): item for item in by_attempt}.values())

    def _counted(self, folder: str, sweep: str | None) -> list[_Object]:
        # Trials first: what they list is then sure to be there, as they are written last.
        counted = {item[:3] for item in self._latest("trials", sweep)}
        return sorted(item for item in self._objects(folder, sweep) if item[:3] in counted)

    def _rows(self, name: str, objects: list[_Object]) -> pa.Table:
        return self._read(name, [item.sweep for item in objects], [item.path for item in objects])

    def _read(self, name: str, sweeps: list[str], paths: list[str]) -> pa.Table:
        tables = []
        for sweep, path, data in zip(sweeps, paths, self._get(paths), strict=True):
            try:
                tables += [] if data is None else [schema.decode(data, sweep)]
            except (pa.ArrowException, OSError) as error:
                # Not from here, where objects appear whole; a copy in progress, perhaps.
                logger.warning("%s is left out, as it is no Parquet file: %s", path, error)
        return schema.merge(name, tables)

    def _get(self, paths: list[str]) -> list[bytes | None]:
        """The objects, or None for one that does not exist; at once where the file system can."""
        with self._reporting("read"):
            found: list[bytes | Exception] = self._fs.cat_ranges(paths, None, None, on_error="return")
            for data in found:
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
        return [None if isinstance(data, Exception) else bytes(data) for data in found]

    def _put(self, relative: str, data: bytes, *, create: bool = False) -> bool:
        """Write an object whole; with ``create`` only where there is none, else return False."""
        path = self._path(relative)
        with self._reporting("write to"):
            try:
                if isinstance(self._fs, LocalFileSystem):
                    _put_local(path, data, create)
                else:
                    self._fs.pipe_file(path, data, mode="create" if create else "overwrite")
            except OSError as error:
                if create and _is_taken(error):
                    return False
                raise
        return True

    @contextmanager
    def _reporting(self, action: str) -> Iterator[None]:
        try:
            yield
        except (ConfigError, StoreError):
            raise
        except Exception as error:  # each file system has exceptions of its own
            # Without its cause, as that may show the request and whatever it was signed with.
            raise StoreError(f"cannot {action} {self.uri}: {_reason(error)}") from None


def _put_local(path: str, data: bytes, create: bool) -> None:
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
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _is_taken(error: OSError) -> bool:
    # s3fs makes a FileExistsError of a refused conditional PUT only if the server names the condition.
    response = getattr(error.__cause__, "response", {})
    return isinstance(error, FileExistsError) or response.get("Error", {}).get("Code") == "PreconditionFailed"


def _reason(error: Exception) -> str:
    kind = type(error).__name__  # by name, so that a local store need not import botocore
    endpoint = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url", "")))
    server = f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}" if endpoint.netloc else "the server"
    said = " ".join(str(error).split())
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return f"no connection to {server}; check AWS_ENDPOINT_URL and the network"
    if kind in ("ReadTimeoutError", "ConnectionClosedError", "FSTimeoutError"):
        return f"{server} does not answer; check that it is up, and try again"
    if isinstance(error, PermissionError):
        return f"access denied ({said}); check the credentials and their rights, or the directory's mode"
    if isinstance(error, FileNotFoundError):
        return f"not found ({said}); create the bucket or directory, or mend the URL"
    return f"{kind}: {said}; check the URL, the space that is left, and the server"


def _name(kind: str, value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ConfigError(
            f"{kind} {value!r}: use up to 128 letters, digits, '-', '_' and '.', the first no '-' or '.'"
        )
    return value


def _trial_key(folder: str, sweep: str, trial_id: str, attempt: int, suffix: str) -> str:
    assert attempt >= 0
    if f"{_name('trial id', trial_id)}-".startswith("part-"):
        raise ConfigError(f"trial id {trial_id!r}: 'part' and 'part-...' are reserved; choose another")
    return f"{folder}/sweep={_name('sweep', sweep)}/{trial_id}-{attempt}.{suffix}"


def _relative(relative: str) -> str:
    if any(part in ("", ".", "..") for part in relative.split("/")):
        raise ConfigError(f"{relative!r} is no key in a store; write it like checkpoints/a.safetensors")
    return relative


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()
