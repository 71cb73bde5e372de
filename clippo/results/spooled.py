"""A result store for the driver of a sweep: what the store does not take waits on local disk.

A thread tries again until the store has everything, in the order in which it was written. What still waits
when a driver ends or dies is found and delivered by the next one with the same store. Keys are deterministic
and an object is always written whole, so one that is delivered twice is there once.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from clippo.errors import StoreError
from clippo.remote import node_cache
from clippo.results.objects import Objects, StoreUnavailableError
from clippo.results.spool import Item, Spool
from clippo.results.store import ResultStore

logger = logging.getLogger(__name__)

WORKER_PATIENCE = 300.0  # a worker holds its accelerator while it waits for the store [s]
DRIVER_PATIENCE = 30.0  # of reads, and of taking a name [s]
SWEEP_PATIENCE = 300.0  # of reads once a sweep runs, and when it ends [s]
ANSWER = 5.0  # a write that takes longer [s] goes to local disk, so that the driver can go on
PAUSE, LONGEST_PAUSE = 0.5, 15.0  # between attempts [s]
FLUSH = 60.0  # how long a sweep waits for the store at its end [s]
LOOK = 10.0  # between two looks at the store of a sweep that runs [s]


class SpooledStore(ResultStore):
    """A result store that never loses a row, and never makes its writer wait long.

    What the store does not take is kept on local disk, or in memory where that cannot be written either, and
    delivered later. Reads show it as if it were in the store. Only :meth:`write_config` is not put off, as it
    decides whether a name is free.

    A pickled one is a plain :class:`ResultStore` that waits WORKER_PATIENCE for a store that is away: workers
    may run on machines that nobody would deliver from later.

    Args:
        uri, endpoint_url: as of :class:`ResultStore`.
        report: gets one line when results, or trials, begin to wait for the store, and one when that is
            over; from any thread.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        endpoint_url: str | None = None,
        report: Callable[[str], object] = logger.warning,
    ) -> None:
        super().__init__(uri, endpoint_url=endpoint_url, patience=DRIVER_PATIENCE)
        self._objects = _Overlaid(uri, endpoint_url, self._waiting)
        self._target = self._impatient()
        self._spool = Spool(spool_folder(self.uri, endpoint_url), self.uri)
        self._report = report
        self._changed = threading.Condition()  # guards what follows and the spool
        self._thread: threading.Thread | None = None
        self._closing = False
        self._delivered = 0
        self._said: set[type[Exception]] = set()  # what has been reported since the store was last well
        self._hurry = threading.Event()
        self._ended: threading.Event | None = None  # of a sweep that runs
        if self._spool.items:
            report(f"{len(self._spool.items)} objects of an earlier sweep wait in {self._spool.root}")
            with self._changed:
                self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ResultStore, endpoint_url=self.endpoint_url, patience=WORKER_PATIENCE), (self.uri,)

    def __enter__(self) -> "SpooledStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(FLUSH if error is None else ANSWER)

    def check(self) -> None:
        """As of :class:`ResultStore`; also delivers what earlier sweeps left, and tries the local disk."""
        super().check()
        with self._changed:
            failure = self._spool.probe()
        if failure:
            self._report(
                f"{self._spool.root} cannot be written ({failure}): what the store does not take would wait "
                "in memory only; set CLIPPO_CACHE to another folder"
            )
        self.flush()

    def sweep_began(self) -> None:
        """From now on reads wait longer: hours of training are not ended for a store that is away.

        And a thread writes and deletes an object every LOOK seconds, and reports when that fails: trials may
        be waiting for the store while the driver has nothing to write, and only the driver is heard.
        """
        self._objects.patience = SWEEP_PATIENCE
        if self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._watch, args=[self._ended], name="clippo-store", daemon=True).start()

    def compact(self, sweep: str) -> int:
        """As of :class:`ResultStore`, once everything has arrived."""
        if waiting := self.flush(DRIVER_PATIENCE):
            raise StoreError(f"{waiting} objects wait in {self._spool.root}; compact when they have arrived")
        return super().compact(sweep)

    def flush(self, timeout: float = FLUSH) -> int:
        """Waits until the store has everything, at most so long [s]; returns how many objects still wait."""
        end = time.monotonic() + timeout
        with self._changed:
            while self._spool.items and (left := end - time.monotonic()) > 0:
                self._hurry.set()
                self._changed.wait(min(left, 1.0))
            return len(self._spool.items)

    def close(self, timeout: float = FLUSH) -> int:
        """Waits like :meth:`flush`, and reports what still waits and where: the next start delivers it.

        Raises:
            StoreError: something is lost, as neither the store nor the local disk could be written.
        """
        if self._ended is not None:
            self._ended.set()
            self._ended = None
        self.flush(timeout)
        with self._changed:
            self._closing, thread = True, self._thread
        self._hurry.set()
        if thread is not None:
            thread.join()
        with self._changed:
            self._closing = False
            waiting, failure = len(self._spool.items), self._spool.settle()
            self._spool.close()
        if failure:
            raise StoreError(
                f"results are lost: neither {self.uri} nor {self._spool.root} could be written ({failure}); "
                "free some room and resume the sweep"
            )
        if waiting:
            self._report(
                f"{waiting} objects wait in {self._spool.root}; the next sweep with results in {self.uri} on "
                "this machine delivers them"
            )
        return waiting

    # ---- delivery

    def _write(self, key: str, data: bytes) -> None:
        self._now_or_later(key, data, lambda: self._target.put(key, data))

    def _take(self, key: str, data: bytes) -> bool:
        # While the store is away nobody can tell whether another has it.
        return self._now_or_later(key, data, lambda: self._target.take(key, data)) is not False

    def _now_or_later(self, key: str, data: bytes, now: Callable[[], bool | None]) -> bool | None:
        with self._changed:
            direct = not self._spool.items
        if direct:
            try:
                return now()
            except StoreError as error:
                self._say(type(error), f"{error}; until then results wait in {self._spool.root}")
        with self._changed:
            self._spool.add(key, data)
            self._start()
        return None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, name="clippo-spool", daemon=True)
            self._thread.start()

    def _deliver(self) -> None:
        pause = PAUSE
        while (item := self._next()) is not None:
            try:
                if (data := item.read()) is not None:
                    self._target.put(item.key, data)
                elif item.key in self._waiting():
                    self._tell(f"{item.key} has gone from {self._spool.root} and is lost")
            except StoreError as error:
                self._say(type(error), f"{error}; until then results wait in {self._spool.root}")
                if not isinstance(error, StoreUnavailableError):
                    self._target = self._impatient()  # with credentials that were renewed meanwhile
                self._hurry.wait(pause)
                self._hurry.clear()
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = PAUSE
                self._done(item)

    def _watch(self, ended: threading.Event) -> None:
        key, objects = f".probe-{uuid.uuid4().hex}", self._impatient()

        def failure() -> StoreError | None:
            try:
                objects.put(key, b"probe")
                objects.delete([key])
            except StoreError as error:
                return error
            return None

        while not ended.wait(LOOK):
            error = failure()
            if error is not None and not ended.wait(PAUSE):
                error = failure()  # a single one is no outage
            if ended.is_set():
                return
            if error is not None:
                waits = f"trials wait for it, and results in {self._spool.root}"
                self._say(type(error), f"{error}; until then {waits}")
                if not isinstance(error, StoreUnavailableError):
                    objects = self._impatient()  # with credentials that were renewed meanwhile
                continue
            with self._changed:
                over = bool(self._said) and not self._spool.items  # or its delivery is reported
                if over:
                    self._said.clear()
            if over:
                self._tell(f"{self.uri} answers again")

    def _next(self) -> Item | None:
        with self._changed:
            item = next(iter(self._spool.items.values()), None)
            if item is None or self._closing:
                self._thread = None
                return None
            failure = self._spool.settle()
        if failure:
            self._say(
                MemoryError, f"{self._spool.root} cannot be written ({failure}); results wait in memory, too"
            )
        return item

    def _done(self, item: Item) -> None:
        with self._changed:
            self._spool.remove(item)
            self._delivered += 1
            delivered, left = self._delivered, len(self._spool.items)
            if not left:
                self._delivered = 0
                self._said.clear()
            self._changed.notify_all()
        if not left:
            self._tell(f"{delivered} objects that had to wait are in {self.uri} now")

    def _say(self, kind: type[Exception], line: str) -> None:
        """Reports the first failure of each kind since the store was last well."""
        with self._changed:
            known = kind in self._said
            self._said.add(kind)
        if not known:
            self._tell(line)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever listened has gone, which must not end a thread
            self._report(line)

    def _waiting(self) -> dict[str, Item]:
        with self._changed:
            return dict(self._spool.items)

    def _impatient(self) -> Objects:
        return Objects(self.uri, endpoint_url=self.endpoint_url, answer=ANSWER, attempts=1)


class _Overlaid(Objects):
    """Objects as they will be when everything has arrived.

    What waits is asked for first: what is delivered in between is then found in the store.
    """

    def __init__(
        self, uri: str | os.PathLike[str], endpoint_url: str | None, waiting: Callable[[], dict[str, Item]]
    ) -> None:
        super().__init__(uri, endpoint_url=endpoint_url, patience=DRIVER_PATIENCE)
        self._waiting = waiting

    def find(self, folder: str) -> list[str]:
        waiting = {key for key in self._waiting() if key.startswith(f"{folder}/")}
        return sorted(waiting.union(super().find(folder)))

    def folders(self, folder: str) -> list[str]:
        below = [key.removeprefix(f"{folder}/") for key in self._waiting() if key.startswith(f"{folder}/")]
        return sorted({key.partition("/")[0] for key in below}.union(super().folders(folder)))

    def get(self, keys: Sequence[str]) -> list[bytes | None]:
        waiting = self._waiting()
        found = {key: data for key in keys if key in waiting and (data := waiting[key].read()) is not None}
        rest = [key for key in keys if key not in found]
        stored = dict(zip(rest, super().get(rest), strict=True)) if rest else {}
        return [found[key] if key in found else stored[key] for key in keys]

    def exists(self, key: str) -> bool:
        return key in self._waiting() or super().exists(key)


def spool_folder(uri: str, endpoint_url: str | None = None) -> Path:
    """Where objects for a store wait: in CLIPPO_CACHE or the user's cache folder."""
    cache = node_cache()
    server = ""
    if uri.startswith("s3"):
        variables = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
        server = endpoint_url or next(filter(None, variables), "")
    return cache / "spool" / hashlib.sha256(f"{server} {uri}".encode()).hexdigest()[:16]
