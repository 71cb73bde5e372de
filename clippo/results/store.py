"""Result rows on a local directory, ``s3://`` or another object store that fsspec knows.

    sweeps/<sweep>.json                                        the config; whoever creates it owns the name
    state/<sweep>.json                                         whether it runs; says nothing of its results
    started/sweep=<sweep>/<trial_id>-<attempt>.json            settings of a trial that has begun
    {trials,metrics,evals}/sweep=<sweep>/<trial_id>-<attempt>.parquet
    rankings/sweep=<sweep>/<trial_id>-<attempt>.parquet        of trials that ranked something
    examples/sweep=<sweep>/examples.parquet
    reports/<sweep>.html                                       what came of it

Every object is written whole under a key that follows from its content, so a retry is harmless and a reader
never sees half of one. A trial counts once its object below ``trials/`` exists; of several attempts the
highest counts. :meth:`ResultStore.compact` puts the rows of all trials of a sweep into a few objects
(clippo/results/sealing.py).
"""

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from clippo.errors import ConfigError, StoreError
from clippo.results import schema
from clippo.results.objects import Objects
from clippo.results.schema import ALL, View
from clippo.results.sealing import MovedError, decoded, find_folders, read_rows, seal

Result = TypeVar("Result")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_CONFIG = re.compile(r"sweeps/([^/]+)\.json")
_EXAMPLES = re.compile(r"examples/sweep=([^/]+)/examples\.parquet")
STATES = (RUNNING, ENDED, INTERRUPTED) = ("running", "ended", "interrupted")
_ROUNDS = 10  # of reading what is being sealed; one is rare


class ResultStore:
    """Results of any number of sweeps, below one path or URL.

    Args:
        uri: a path, ``file://``, ``s3://bucket/prefix``, or the URL of another fsspec object store. Nothing
            is read or written until a method is called; :meth:`check` tells whether it will work.
        endpoint_url: of an S3 server that is not AWS; default: AWS_ENDPOINT_URL.
        patience: how long a method tries again when the store fails [s].

    Raises:
        ConfigError: the URL is of no known kind, lacks its bucket, or carries a password.

    Every method raises StoreError, in one line and without secrets, when the store cannot be used, and
    ConfigError for a sweep name or trial id of other than letters, digits, ``-``, ``_`` and ``.``.
    """

    def __init__(
        self, uri: str | os.PathLike[str], *, endpoint_url: str | None = None, patience: float = 0.0
    ) -> None:
        self._objects = Objects(uri, endpoint_url=endpoint_url, patience=patience)
        self._patience = patience
        self.endpoint_url = endpoint_url
        self.uri: str = self._objects.uri

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker takes the credentials of its own environment.
        return partial(ResultStore, endpoint_url=self.endpoint_url, patience=self._patience), (self.uri,)

    # ---- writing

    def write_trial(
        self,
        sweep: str,
        trial_id: str,
        attempt: int,
        trial: Mapping[str, Any],
        metrics: Iterable[Mapping[str, Any]],
        evals: Iterable[Mapping[str, Any]],
        rankings: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Keep the rows of one finished trial, which need not repeat ``sweep``, ``trial_id`` and ``attempt``.

        Raises:
            StoreError: also for an unknown column, a value of the wrong type, or an unknown status.
        """
        if trial.get("status") not in schema.STATUSES:
            raise StoreError(f"trial status is {trial.get('status')!r}; one of {', '.join(schema.STATUSES)}")
        key = {"trial_id": trial_id, "attempt": attempt}
        # Encoded before the first write, and trials written last: it is what makes a trial count.
        tables = [("metrics", metrics), ("evals", evals), ("trials", [trial])]
        if ranked := list(rankings):
            tables.insert(0, ("rankings", ranked))
        objects = {name: schema.encode(name, [{**row, **key} for row in rows]) for name, rows in tables}
        for name, data in objects.items():
            self._write(_trial_key(name, sweep, trial_id, attempt, "parquet"), data)

    def write_examples(self, sweep: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep the pictures of the report's gallery, in place of those kept before."""
        key = f"examples/sweep={_name('sweep', sweep)}/examples.parquet"
        self._write(key, schema.encode("examples", rows))

    def write_started(self, sweep: str, trial_id: str, attempt: int, settings: Mapping[str, Any]) -> None:
        """Note that a trial has begun, so that a resumed sweep knows what ran when its driver died.

        Raises:
            StoreError: also when another driver has begun this attempt, whose rows would be overwritten.
        """
        row = {"id": uuid.uuid4().hex, "trial_id": trial_id, "attempt": attempt, "started_at": _now()}
        key = _trial_key("started", sweep, trial_id, attempt, "json")
        if not self._take(key, _json(row | {"settings": settings})):
            raise StoreError(
                f"another driver of sweep {sweep!r} has begun trial {trial_id}; let one of them end, then "
                "run this command again"
            )

    def write_config(self, sweep: str, config: Mapping[str, Any]) -> None:
        """Keep the config of a new sweep and thereby take its name.

        Raises:
            StoreError: also when the name is taken; of several processes that try, one succeeds.
        """
        key = f"sweeps/{_name('sweep', sweep)}.json"
        data = _json({"id": uuid.uuid4().hex, "created_at": _now(), "config": config})
        if not self._objects.take(key, data):
            raise StoreError(f"sweep {sweep!r} is already in {self.uri}; resume it or choose another name")

    def write_state(self, sweep: str, state: str, trials: int) -> None:
        """Note for onlookers how it stands with a sweep and how many trials it shall have."""
        assert state in STATES
        row = {"state": state, "trials": trials, "at": _now()}
        self._write(f"state/{_name('sweep', sweep)}.json", _json(row))

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Keep any other object, such as a checkpoint."""
        self._write(_relative(relative), data)

    def compact(self, sweep: str) -> int:
        """Seals a sweep: the rows of its finished trials go into a few objects, which are quick to read.

        It may be done at any time and again, also while the sweep runs: later trials are added. Readers see
        every trial once all the while.

        Returns:
            How many trials are sealed now, earlier ones included.

        Raises:
            StoreError: also when others have sealed the sweep at the same time, again and again.
        """
        name = _name("sweep", sweep)

        def sealed() -> int:
            counted = find_folders(self._objects, "trials", name)[name].latest()
            for table in ("metrics", "evals", "rankings", "started", "trials"):
                seal(self._objects, table, name, counted)
            return len(counted)

        return self._steadily(sealed)

    # ---- reading

    def trials(self, sweep: str | None = None, view: View = ALL) -> pa.Table:
        """One row per finished trial, its highest attempt, sorted by sweep and trial."""
        table = self._table("trials", sweep, view)
        if not {"sweep", "trial_id"} <= set(table.column_names):
            return table
        keys = pa.schema([("sweep", pa.string()), ("trial_id", pa.string())])
        order = [(name, "ascending") for name in keys.names]
        return table.take(pc.sort_indices(table.select(keys.names).cast(keys), sort_keys=order))

    def metrics(self, sweep: str | None = None, view: View = ALL) -> pa.Table:
        """The training curves of the attempts that :meth:`trials` lists, in no particular order."""
        return self._table("metrics", sweep, view)

    def evals(self, sweep: str | None = None, view: View = ALL) -> pa.Table:
        """The evaluation counts of the attempts that :meth:`trials` lists, in no particular order.

        A sweep of 100,000 trials has millions of them; take of them what is needed::

            columns = ["trial_id", "variant", "eval_set", "n_correct", "n_total"]
            sets = ["validation/attacked/seen", "validation/attacked/held_out"]
            store.evals(sweep, View(columns=columns, where={"eval_set": sets}, dictionary=True))
        """
        return self._table("evals", sweep, view)

    def through_evals(self, sweep: str, view: View, use: Callable[[Iterator[pa.Table]], Result]) -> Result:
        """What ``use`` makes of the same rows, which come in portions: for more than should be held at once.

        All rows of a trial are in one portion. If the sweep is sealed meanwhile, ``use`` is called again and
        gets them all.
        """
        return self._read("evals", sweep, view, use)

    def rankings(self, sweep: str | None = None, view: View = ALL) -> pa.Table:
        """The rankings of the attempts that :meth:`trials` lists, in no particular order."""
        return self._table("rankings", sweep, view)

    def examples(self, sweep: str | None = None) -> pa.Table:
        """Pictures with what the models made of them."""

        def rows() -> pa.Table:
            below = "examples" if sweep is None else f"examples/sweep={_name('sweep', sweep)}"
            found = [_EXAMPLES.fullmatch(key) for key in self._objects.find(below)]
            tables = decoded(self._objects, "examples", [(m[1], m[0]) for m in found if m])
            return schema.merge("examples", [t for t in tables if t is not None], ALL)

        return self._steadily(rows)

    def started(self, sweep: str) -> list[dict[str, Any]]:
        """``trial_id``, ``attempt``, ``started_at`` and ``settings`` of each trial begun, highest attempt."""

        def rows() -> pa.Table:
            folders = find_folders(self._objects, "started", _name("sweep", sweep))
            wanted = {name: folder.latest() for name, folder in folders.items()}
            tables = read_rows(self._objects, "started", folders, wanted, ALL)
            return schema.concatenated("started", tables, ALL)

        found = self._steadily(rows).sort_by("trial_id").drop_columns(["sweep"]).to_pylist()
        return [{**row, "settings": json.loads(row.pop("settings_json"))} for row in found]

    def config(self, sweep: str) -> dict[str, Any] | None:
        """The config a sweep was started with, or None if there is no such sweep."""
        [data] = self._objects.get([f"sweeps/{_name('sweep', sweep)}.json"])
        return None if data is None else dict(json.loads(data)["config"])

    def known_config(self, sweep: str) -> dict[str, Any]:
        """The same of a sweep that must be there.

        Raises:
            StoreError: there is none; with the names of those that there are.
        """
        if (config := self.config(sweep)) is None:
            if sweep in (names := self.sweeps()):
                raise StoreError(f"{self.uri} has rows of {sweep!r}, but not what it was started with")
            known = ", ".join(names) or "none"
            raise StoreError(f"{self.uri} has no sweep {sweep!r}; its sweeps are: {known}")
        return config

    def state(self, sweep: str) -> dict[str, Any] | None:
        """``state``, ``trials`` and ``at`` as noted last; a killed driver leaves its sweep running."""
        [data] = self._objects.get([f"state/{_name('sweep', sweep)}.json"])
        return None if data is None else dict(json.loads(data))

    def finished(self, sweep: str) -> dict[str, int]:
        """The highest attempt of each trial that has rows, from a listing alone."""
        return find_folders(self._objects, "trials", _name("sweep", sweep))[sweep].latest()

    def sweeps(self) -> list[str]:
        """Names of all sweeps, sorted, with or without finished trials."""
        names = {match[1] for key in self._objects.find("sweeps") if (match := _CONFIG.fullmatch(key))}
        folders = self._objects.folders("trials")
        return sorted(names.union(n.removeprefix("sweep=") for n in folders if n.startswith("sweep=")))

    def read_bytes(self, relative: str) -> bytes:
        """An object kept by :meth:`write_bytes`; StoreError if there is none."""
        [data] = self._objects.get([_relative(relative)])
        if data is None:
            raise StoreError(f"{self.uri_of(relative)} does not exist")
        return data

    def exists(self, relative: str) -> bool:
        """Whether there is such an object."""
        return self._objects.exists(_relative(relative))

    def uri_of(self, relative: str) -> str:
        """The absolute path or URL of an object, for others to read it by."""
        return f"{self.uri}/{_relative(relative)}"

    def check(self) -> None:
        """List, write, read and delete a probe object, and look for room on a local disk.

        Raises:
            StoreError: what failed and what to do about it.
        """
        Objects(self.uri, endpoint_url=self.endpoint_url).probe()

    # ---- objects

    def _write(self, key: str, data: bytes) -> None:
        self._objects.put(key, data)

    def _take(self, key: str, data: bytes) -> bool:
        return self._objects.take(key, data)

    def _table(self, name: str, sweep: str | None, view: View) -> pa.Table:
        return self._read(name, sweep, view, lambda tables: schema.concatenated(name, tables, view))

    def _read(
        self, name: str, sweep: str | None, view: View, use: Callable[[Iterator[pa.Table]], Result]
    ) -> Result:
        def used() -> Result:
            # Trials first: what they list is then sure to be there, as they are written last.
            one = None if sweep is None else _name("sweep", sweep)
            trials = find_folders(self._objects, "trials", one)
            folders = trials if name == "trials" else find_folders(self._objects, name, one)
            wanted = {found: folder.latest() for found, folder in trials.items()}
            return use(read_rows(self._objects, name, folders, wanted, view))

        return self._steadily(used)

    def _steadily(self, call: Callable[[], Result]) -> Result:
        """Calls again when what was listed has been sealed or deleted before it was read."""
        for _ in range(_ROUNDS):
            try:
                return call()
            except MovedError as error:
                moved = error
        raise StoreError(f"{self.uri} changes while it is read ({moved}); try again")


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
