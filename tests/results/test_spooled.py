"""Outages of the store in the middle of a sweep: it goes on, everything arrives, and nothing twice.

CLIPPO_TEST_OUTAGE is how long the server is away [s]; 30 is what the design asks for, 5 is quicker.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from clippo.errors import StoreError
from clippo.results import ResultStore, SpooledStore, spooled
from clippo.results.spool import Spool
from tests.conftest import free_ports, on_small_disk
from tests.results.sample import EVALS, METRICS, content, keys, listed, write, write_sweep
from tests.results.server import OwnS3Server

OUTAGE = float(os.environ.get("CLIPPO_TEST_OUTAGE", 5))


def waiting_files(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(cache.rglob("*.object"))]


@contextmanager
def opened(uri: str) -> Iterator[tuple[SpooledStore, list[str]]]:
    """A store and the lines that it reports."""
    lines: list[str] = []
    with SpooledStore(uri, report=lines.append) as store:
        yield store, lines


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that fit a short outage."""
    monkeypatch.setattr(spooled, "LONGEST_PAUSE", 2.0)


# ---- the server is away


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_sweep_goes_on_while_the_server_is_away(
    server: OwnS3Server, uri: str, cache: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooled, "ANSWER", min(spooled.ANSWER, OUTAGE / 2))
    checkpoint = b"weights" * 100_000
    with opened(uri) as (store, lines):
        store.check()
        store.write_config("s1", {"trials": 16})
        write_sweep(store, "s1", range(3))
        copy = pickle.loads(pickle.dumps(store))  # what a worker process gets
        assert type(copy) is ResultStore
        worker = threading.Thread(target=copy.write_bytes, args=("checkpoints/a.bin", checkpoint))
        server.pause() if how == "stopped" else server.kill()
        worker.start()
        began, number, seconds = time.monotonic(), 3, list[float]()
        while time.monotonic() - began < OUTAGE or number < 7:
            before = time.monotonic()
            write_sweep(store, "s1", [number])
            seconds.append(time.monotonic() - before)
            number += 1
            time.sleep(0.2)
        assert len(waiting_files(cache)) == 4 * (number - 3)
        assert max(seconds) < spooled.ANSWER + 3  # the first, which finds out
        server.go_on() if how == "stopped" else server.start()
        assert store.flush() == 0
        server.wait()  # or it may look as if it were away once more
        write_sweep(store, "s1", [number])
        worker.join()
    assert waiting_files(cache) == []
    assert len(lines) == 2  # one when it began, one when it was over
    assert "until then results wait in" in lines[0]
    assert lines[1].endswith(f"are in {uri} now")
    fresh = ResultStore(uri, patience=30)  # SeaweedFS cannot read for some seconds after a start
    assert keys(fresh.trials()) == [("s1", f"{n:05d}", 0) for n in range(number + 1)]
    assert len(fresh.evals()) == len(EVALS) * (number + 1)
    assert len(fresh.metrics()) == len(METRICS) * (number + 1)
    assert [row["settings"]["seed"] for row in fresh.started("s1")] == list(range(number + 1))
    assert fresh.read_bytes("checkpoints/a.bin") == checkpoint
    assert len(listed(fresh)) == 2 + 4 * (number + 1)  # and nothing under a second key


def test_patience_ends(server: OwnS3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    store = ResultStore("s3://clippo/results", patience=1.5)
    began = time.monotonic()
    with pytest.raises(StoreError, match="no connection"):
        store.write_bytes("checkpoints/a.bin", b"")
    assert 0.8 < time.monotonic() - began < 10


def test_reads_of_a_sweep_that_has_begun_wait_longer(
    server: OwnS3Server, uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooled, "DRIVER_PATIENCE", 0.5)
    monkeypatch.setattr(spooled, "SWEEP_PATIENCE", 60.0)
    monkeypatch.setattr(spooled, "LOOK", 60.0)
    with opened(uri) as (store, lines):
        write_sweep(store, "s1", range(2))
        server.kill()
        with pytest.raises(StoreError, match="no connection"):
            store.trials("s1")
        store.sweep_began()
        with ThreadPoolExecutor(1) as pool:
            trials = pool.submit(store.trials, "s1")
            time.sleep(3.0)
            assert not trials.done()
            server.start()
            assert len(trials.result(timeout=60)) == 2
    assert lines == []


def test_what_trials_wait_for_is_told_once_each_time(
    server: OwnS3Server, uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooled, "LOOK", 0.2)
    monkeypatch.setattr(spooled, "PAUSE", 0.1)

    def awaited(count: int) -> None:
        deadline = time.monotonic() + 60
        while len(lines) < count:
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
        time.sleep(1.0)  # several looks
        assert len(lines) == count, lines

    with opened(uri) as (store, lines):
        store.sweep_began()
        awaited(0)
        server.refuse()
        awaited(1)
        assert "access denied" in lines[0]
        assert "until then trials wait for it, and results in" in lines[0]
        server.accept()
        awaited(2)
        assert lines[1] == f"{uri} answers again"
        server.kill()
        awaited(3)
        assert "no connection" in lines[2]
        server.start()
        awaited(4)
        assert lines[3] == f"{uri} answers again"
    deadline = time.monotonic() + 10
    while "clippo-store" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert listed(ResultStore(uri)) == [], "what was written to look is deleted"


# ---- the store refuses


def deny(server: OwnS3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a new client may read, and no longer write."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.reader_secret)


def allow(server: OwnS3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def test_refused_results_are_read_and_delivered_when_the_credential_is_renewed(
    server: OwnS3Server, uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(ResultStore(uri), "s1", range(2))
    monkeypatch.setattr(spooled, "DRIVER_PATIENCE", 1.2)
    deny(server, monkeypatch)
    with opened(uri) as (store, lines):
        write_sweep(store, "s1", range(2, 4))
        write_sweep(store, "s2", range(1))
        store.write_bytes("other/a.bin", b"a")
        store.write_bytes("other/a.bin", b"b")
        assert len(waiting_files(cache)) == 4 * 3 + 1
        assert keys(store.trials("s1")) == [("s1", f"{n:05d}", 0) for n in range(4)]
        assert keys(store.trials())[-1] == ("s2", "00000", 0)
        assert len(store.evals()) == 5 * len(EVALS)
        assert [row["trial_id"] for row in store.started("s1")] == [f"{n:05d}" for n in range(4)]
        assert store.sweeps() == ["s1", "s2"]
        assert store.exists("other/a.bin")
        assert store.read_bytes("other/a.bin") == b"b"
        before = content(store)
        assert len(ResultStore(uri).trials()) == 2
        for put_off in (lambda: store.compact("s1"), lambda: store.write_config("s3", {}), store.check):
            with pytest.raises(StoreError):
                put_off()
        assert ["access denied" in line for line in lines] == [True]  # however often it was tried
        assert store.flush(0.1) == 13
        allow(server, monkeypatch)
        assert store.flush(30) == 0
        assert content(store) == content(ResultStore(uri)) == before
        assert store.compact("s1") == 4
        assert content(store) == before
    assert len(lines) == 2
    assert lines[1] == f"13 objects that had to wait are in {uri} now"
    assert waiting_files(cache) == []


def test_bucket_that_vanishes(server: OwnS3Server, cache: Path) -> None:
    fs = server.filesystem()
    fs.mkdir("short-lived")
    with opened("s3://short-lived/results") as (store, lines):
        store.check()
        write(store, trial_id="t1")
        fs.rm("short-lived", recursive=True)
        write(store, trial_id="t2")
        write(store, trial_id="t3")
        assert len(waiting_files(cache)) == 6
        assert store.flush(2) == 6
        assert ["create the bucket" in line for line in lines] == [True]
        fs.mkdir("short-lived")
        assert store.flush(30) == 0
        assert keys(ResultStore(store.uri).trials()) == [("s1", "t2", 0), ("s1", "t3", 0)]


def test_next_start_delivers_what_a_dead_driver_left(
    server: OwnS3Server, uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import os, signal
from clippo.results import SpooledStore
from tests.results.sample import write_sweep
write_sweep(SpooledStore({uri!r}), "s1", range(2))
os.kill(os.getpid(), signal.SIGKILL)
"""
    deny(server, monkeypatch)
    subprocess.run([sys.executable, "-c", program], check=False, stderr=subprocess.DEVNULL)
    assert len(waiting_files(cache)) == 8
    allow(server, monkeypatch)
    with opened(uri) as (store, lines):
        assert lines[0].startswith("8 objects of an earlier sweep wait in ")
        assert len(store.trials()) == 2
        store.check()
        assert len(ResultStore(uri).trials()) == len(ResultStore(uri).started("s1")) == 2
    assert waiting_files(cache) == []


def test_what_still_waits_at_the_end(
    server: OwnS3Server, uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(server, monkeypatch)
    lines: list[str] = []
    first = SpooledStore(uri, report=lines.append)
    write_sweep(first, "s1", range(1))
    with opened(uri) as (second, _):  # what a living process delivers is not taken from it
        assert second.flush(0) == 0
    assert first.close(0.5) == 4
    assert lines[1:] == [
        f"4 objects wait in {spooled.spool_folder(uri)}; the next sweep with results in {uri} on this "
        "machine delivers them"
    ]
    allow(server, monkeypatch)
    with opened(uri) as (third, _):
        assert third.flush(30) == 0
    assert len(ResultStore(uri).trials()) == 1


def test_no_secret_in_spool_and_reports(
    server: OwnS3Server,
    uri: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    deny(server, monkeypatch)
    store = SpooledStore(uri)  # reports to the log
    write_sweep(store, "s1", range(1))
    store.flush(1)
    store.close(0)
    files = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    assert len(files) > 4
    seen = [*files, pickle.dumps(store), repr(store).encode(), caplog.text.encode()]
    assert b"access denied" in seen[-1]
    secrets = (server.key, server.secret, server.reader_key, server.reader_secret)
    assert not [data for data in seen for secret in secrets if secret.encode() in data]


# ---- full disks

FULL_DISK = """
import os, sys
from pathlib import Path
from clippo.errors import StoreError
from clippo.results import ResultStore, SpooledStore, spooled
from tests.results.sample import keys, write

disk, elsewhere = Path(sys.argv[1]), Path(sys.argv[2])
lines = []
for name, cache in (("spooled", elsewhere), ("in memory", disk / "cache")):
    os.environ["CLIPPO_CACHE"] = str(cache)
    store = SpooledStore(disk / name, report=lines.append)
    write(store, trial_id="t1")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, __import__("contextlib").suppress(OSError):
        while True:
            file.write(bytes(4096))
    for trial in ("t2", "t3"):
        write(store, trial_id=trial)
    assert len(list(elsewhere.rglob("*.object"))) == (6 if name == "spooled" else 0)
    assert keys(store.trials()) == [("s1", t, 0) for t in ("t1", "t2", "t3")]
    assert store.flush(1.5) == 6
    if name == "in memory":
        other = SpooledStore(disk / "lost", report=lines.append)
        write(other)
        try:
            other.close(0.5)
        except StoreError as error:
            lines.append(str(error))
    filler.unlink()
    assert store.flush(20) == 0
    assert store.close() == 0
    assert keys(ResultStore(disk / name).trials()) == [("s1", t, 0) for t in ("t1", "t2", "t3")]
    assert [p for p in disk.rglob("*.tmp")] == []
try:
    ResultStore(disk / "new").check()
except StoreError as error:
    lines.append(str(error))
for line in lines:
    print(line)
"""


def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    done = on_small_disk(disk, sys.executable, "-c", FULL_DISK, str(disk), str(tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stderr
    said = [
        "no room",
        "are in",
        "no room",
        "wait in memory",
        "no room",
        "wait in memory",
        "are lost",
        "are in",
    ]
    said += ["MiB left; free"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(said)
    assert [words for words, line in zip(said, lines, strict=True) if words not in line] == []


# ---- the queue itself


def test_queue_keeps_its_order_over_processes(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    first = Spool(root, "s3://bucket")
    for number in range(3):
        first.add(f"a/{number}", bytes([number]))
    second = Spool(root, "s3://bucket")
    assert second.items == {}
    second.add("b/0", b"\n\n")
    first.add("a/0", b"new")
    first.close()
    second.close()
    third = Spool(root, "s3://bucket")
    assert [(key, item.read()) for key, item in third.items.items()] == [
        ("a/1", b"\x01"),
        ("a/2", b"\x02"),
        ("b/0", b"\n\n"),
        ("a/0", b"new"),
    ]
    old = third.items["a/0"]
    third.add("a/0", b"newer")
    third.remove(old)
    assert third.items["a/0"].read() == b"newer"
    for item in list(third.items.values()):
        third.remove(item)
    third.close()
    assert [path.name for path in root.iterdir()] == ["store"]
    assert (root / "store").read_text() == "s3://bucket\n"


def test_check_tells_that_nothing_could_wait_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "file"))
    with opened(str(tmp_path / "results")) as (store, lines):
        store.check()
        write(store)
    assert ["set CLIPPO_CACHE" in line for line in lines] == [True]
    assert len(ResultStore(tmp_path / "results").trials()) == 1
