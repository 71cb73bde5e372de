"""Sealing: the objects of many trials become a few, and readers see each trial once all the while.

    TABLE/sweep=<sweep>/part-<digest>.parquet    the rows of many trials
    TABLE/sweep=<sweep>/_manifest.json           which parts count, written last

    with trials, metrics, evals, rankings or started as TABLE

A trial is where the manifest says, and else in an object of its own. The parts are written first, then the
manifest, in one conditional PUT, and only then goes what it replaces. A reader lists the folder, reads the
manifest after that, and begins again when an object has gone before it was read. Readers that know nothing of
manifests see a trial twice between the first part and the last deletion; ``select distinct`` helps them.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache, partial
from typing import TypeVar

import pyarrow as pa

from clippo.errors import StoreError
from clippo.results import schema
from clippo.results.objects import Objects

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
PART_ROWS = 1 << 20  # rows of a part, about; bounds the memory that sealing takes
BATCH = 1000  # objects that are read and held at once

_KEY = re.compile(r"[^/]+/sweep=([^/]+)/([^/]+)")
_TRIAL = re.compile(r"(?!part-)([^/]+)-(\d+)\.(?:parquet|json)")
_PART = re.compile(r"part-[^/]+\.parquet")

Attempts = Mapping[str, int]
"""Trial id and attempt."""

Piece = tuple[dict[str, int], pa.Table]
"""Attempts, and the rows of all of them."""

_Item = TypeVar("_Item")


class MovedError(Exception):
    """What was listed has been sealed or deleted since; list again."""


@dataclass(frozen=True)
class Part:
    """A sealed object and the attempts whose rows are in it, also of trials that have no rows."""

    key: str
    rows: int
    trials: Attempts


@dataclass
class Folder:
    """What there is of one table of one sweep.

    Attributes:
        path: of the folder.
        own: keys of the trials' own objects by trial id and attempt, whether sealed already or not.
        parts: what the manifest lists.
        strays: sealed objects that it does not list: their writer has died, or is not done yet.
    """

    path: str
    own: dict[tuple[str, int], str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    def sealed(self) -> dict[str, int]:
        """The attempts that the parts hold."""
        found: dict[str, int] = {}
        for part in self.parts:
            found.update(part.trials)
        return found

    def latest(self) -> dict[str, int]:
        """The highest attempt of each trial."""
        found = self.sealed()
        for trial, attempt in self.own:
            found[trial] = max(attempt, found.get(trial, attempt))
        return found


def find_folders(objects: Objects, table: str, sweep: str | None) -> dict[str, Folder]:
    """What there is of a table, by sweep; always of ``sweep`` where one is named."""
    # A sweep that is sealed during the listing may be missing in it; its folder was there before.
    names = objects.folders(table) if sweep is None else [f"sweep={sweep}"]
    found = {n[len("sweep=") :]: Folder(f"{table}/{n}") for n in names if n.startswith("sweep=")}
    for key in objects.find(table if sweep is None else f"{table}/sweep={sweep}"):
        if not (match := _KEY.fullmatch(key)):
            continue
        folder = found.setdefault(match[1], Folder(f"{table}/sweep={match[1]}"))
        if trial := _TRIAL.fullmatch(match[2]):
            folder.own[trial[1], int(trial[2])] = key
        elif _PART.fullmatch(match[2]):
            folder.strays.append(key)
    # After the listing: what sealing took out of it is in the manifest by now.
    manifests = objects.get([f"{folder.path}/{MANIFEST}" for folder in found.values()])
    for folder, data in zip(found.values(), manifests, strict=True):
        if data is not None:
            folder.parts += [Part(f"{folder.path}/{n}", rows, trials) for n, rows, trials in _listed(data)]
            listed = {part.key for part in folder.parts}
            folder.strays = [key for key in folder.strays if key not in listed]
    return found


@lru_cache(maxsize=2)  # whoever reads rows looks at the same two several times
def _listed(manifest: bytes) -> list[tuple[str, int, Attempts]]:
    """Name, rows and trials of each part."""
    return [(part["name"], part["rows"], part["trials"]) for part in json.loads(manifest)["parts"]]


def read_rows(
    objects: Objects,
    table: str,
    folders: Mapping[str, Folder],
    wanted: Mapping[str, Attempts],
    view: schema.View,
) -> Iterator[pa.Table]:
    """The rows of the wanted attempts, by sweep; sealed ones first, part by part.

    All rows of a trial are in one of the tables.

    Raises:
        MovedError: an object has gone since it was listed.
        StoreError: a part is damaged, or from a newer clippo.
    """
    single: list[tuple[str, str]] = []
    for sweep, folder in sorted(folders.items()):
        attempts, sealed = wanted.get(sweep, {}), folder.sealed()
        single += [
            (sweep, key)
            for (trial, attempt), key in sorted(folder.own.items())
            if attempts.get(trial) == attempt and sealed.get(trial) != attempt
        ]
        # Hardly ever is anything: the comparison of the whole is quicker than one of each trial.
        left_out = set(sealed.items() - attempts.items()) if sealed != attempts else set()
        data = _get(objects, [part.key for part in folder.parts])
        yield from _ahead(
            partial(_rows_of_part, objects, table, sweep, view, left_out, part, of_part)
            for part, of_part in zip(folder.parts, data, strict=True)
        )
    for batch in _batches(single):
        rows = decoded(objects, table, batch)
        yield schema.merge(table, [t for t in rows if t is not None], view)


def _rows_of_part(
    objects: Objects, table: str, sweep: str, view: schema.View, left_out: set[tuple[str, int]], part: Part,
    data: bytes,
) -> pa.Table:  # fmt: skip
    if _digest(data) not in part.key:
        raise StoreError(f"{objects.uri}/{part.key} is damaged: its content has changed; restore a copy")
    gone = [trial for trial, _ in left_out & part.trials.items()]
    return schema.decode_sealed(table, data, sweep, view, gone)


def _ahead(calls: Iterable[Callable[[], _Item]]) -> Iterator[_Item]:
    """What each call returns; a thread is one call ahead of whoever takes the results."""
    coming: list[Future[_Item]] = []
    with ThreadPoolExecutor(1) as thread:
        for call in calls:
            coming.append(thread.submit(call))
            if len(coming) > 1:
                yield coming.pop(0).result()
        yield from (future.result() for future in coming)


def seal(objects: Objects, table: str, sweep: str, counted: Attempts) -> None:
    """Puts the rows of the counted attempts into parts, and deletes what is no longer needed.

    Rows of lower attempts, which no reader takes, are not kept; those of other trials stay as they are.

    Raises:
        MovedError: someone else has sealed the sweep at the same time.
    """
    known = objects.get_version(f"{table}/sweep={sweep}/{MANIFEST}")
    folder = find_folders(objects, table, sweep)[sweep]
    sealed = folder.sealed()
    fresh = [
        (trial, attempt)
        for trial, attempt in sorted(folder.own)
        if counted.get(trial) == attempt and sealed.get(trial) != attempt
    ]

    def superseded(part: Part) -> dict[str, int]:
        return {trial: a for trial, a in part.trials.items() if counted.get(trial, a) > a}

    old = [p for p in folder.parts if superseded(p) or (fresh and p.rows < PART_ROWS // 2)]
    parts = [part for part in folder.parts if part not in old]

    def pieces() -> Iterator[Piece]:
        for part in old:
            trials = dict(part.trials.items() - superseded(part).items())
            alone = {sweep: Folder(folder.path, parts=[part])}
            [rows] = read_rows(objects, table, alone, {sweep: trials}, schema.ALL)
            yield trials, rows
        for batch in _batches(fresh):
            found = decoded(objects, table, [(sweep, folder.own[trial]) for trial in batch])
            good = [(trial, rows) for trial, rows in zip(batch, found, strict=True) if rows is not None]
            yield dict(t for t, _ in good), schema.merge(table, [r for _, r in good], schema.ALL)

    if fresh or old or folder.strays:
        # All are encoded before the first is written: other readers see trials twice for a shorter time.
        new = [encode_part(table, folder.path, piece) for piece in gathered(pieces())]
        for part, data in new:
            objects.put(part.key, data)
        parts += [part for part, _ in new]
        if not objects.swap(f"{folder.path}/{MANIFEST}", manifest_of(parts), known and known[1]):
            raise MovedError(folder.path)
    done = {trial: attempt for part in parts for trial, attempt in part.trials.items()}
    kept = {part.key for part in parts}
    gone = [key for (trial, attempt), key in folder.own.items() if attempt <= done.get(trial, -1)]
    # Only after a swap are there parts here: those of someone who seals at this moment then do not count.
    gone += [key for key in [*(part.key for part in old), *folder.strays] if key not in kept]
    objects.delete(gone)


def manifest_of(parts: Sequence[Part]) -> bytes:
    """The object that makes these parts count, and no others."""
    manifest = {
        "schema_version": schema.SCHEMA_VERSION,
        "sealed_at": datetime.now(timezone.utc).isoformat(),  # also makes each manifest differ from the last
        "parts": [
            {"name": part.key.rpartition("/")[2], "rows": part.rows, "trials": dict(part.trials)}
            for part in parts
        ],
    }
    return json.dumps(manifest, separators=(",", ":")).encode()


def gathered(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Joins pieces to such as make a part."""
    trials: dict[str, int] = {}
    tables: list[pa.Table] = []
    for more, rows in pieces:
        trials |= more
        tables.append(rows)
        if sum(map(len, tables)) >= PART_ROWS:
            yield trials, pa.concat_tables(tables)
            trials, tables = {}, []
    if trials:
        yield trials, pa.concat_tables(tables)


def encode_part(table: str, path: str, piece: Piece) -> tuple[Part, bytes]:
    """A part and its content, which its name is a digest of."""
    trials, rows = piece
    data = schema.encode_sealed(table, rows)
    return Part(f"{path}/part-{_digest(data)}.parquet", len(rows), trials), data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def decoded(objects: Objects, table: str, keys: Sequence[tuple[str, str]]) -> list[pa.Table | None]:
    """The rows of trials' own objects, given by sweep and key; None for one that is damaged.

    Raises:
        MovedError: one has gone since it was listed.
    """
    tables: list[pa.Table | None] = []
    for (sweep, key), data in zip(keys, _get(objects, [key for _, key in keys]), strict=True):
        try:
            tables.append(schema.decode(table, data, sweep))
        except (pa.ArrowException, OSError, ValueError) as error:
            # Not from here, where objects appear whole; a copy in progress, perhaps.
            logger.warning("%s is left out, as it cannot be read: %s", key, error)
            tables.append(None)
    return tables


def _get(objects: Objects, keys: Sequence[str]) -> list[bytes]:
    found: list[bytes] = []
    for key, data in zip(keys, objects.get(keys), strict=True):
        if data is None:
            raise MovedError(key)
        found.append(data)
    return found


def _batches(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))
