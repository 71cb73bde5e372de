"""Whole sweeps whose store goes away: every row arrives, once, and what is wrong is said once."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clippo.prepared import PreparedSet
from clippo.results import ResultStore, spooled
from tests.conftest import SMALL_SWEEP, on_small_disk, running_sweep, sweep
from tests.results.server import OwnS3Server

pytestmark = pytest.mark.timeout(600)

OUTAGE = 30.0  # how long the server does not answer, and how long it is gone [s]
TRIALS = 8
IMPATIENT = """
import runpy, sys
from clippo.results import spooled
spooled.WORKER_PATIENCE = 3.0  # trials get it with the store, which the driver hands to them
sys.argv[0] = "sweeps/typo_sweep.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


FILLING = (
    """
import pathlib, sys, threading, time
disk = pathlib.Path(sys.argv.pop(1))
def fill():
    while not list(disk.glob("results/checkpoints/*/00000/[!.]*")):
        time.sleep(0.05)
    with (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
threading.Thread(target=fill, daemon=True).start()
"""
    + IMPATIENT
)
Mend = Callable[[OwnS3Server], None]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnS3Server]:
    """A running S3 server that the test may stop; ``s3://`` means it."""
    own = OwnS3Server(tmp_path)
    for name, value in own.environment().items():
        monkeypatch.setenv(name, value)
    own.start()
    try:
        own.wait()
        yield own
    finally:
        own.kill()


@pytest.fixture
def root(server: OwnS3Server, small_cache: Path, small_set: PreparedSet) -> str:
    """Where a sweep's results go, which has its prepared set."""
    prefix = f"{server.bucket}/outage"
    server.filesystem().put(f"{small_cache / small_set.digest}", f"{prefix}/prepared/", recursive=True)
    return prefix


def test_a_sweep_outlives_its_store(
    server: OwnS3Server, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    fs = server.filesystem()

    def rows() -> list[str]:
        return [key for key in fs.find(f"{root}/trials") if key.endswith(".parquet")]

    def more_than(count: int) -> bool:
        return len([key for key in rows() if not key.endswith("reference-0.parquet")]) > count

    flags = ["--name", "away", "--search.trials", str(TRIALS), "--search.confirm", "0"]
    with running_sweep(f"s3://{root}", lambda: more_than(0), *flags) as driver:
        server.pause()
        time.sleep(OUTAGE)
        assert driver.poll() is None, driver.communicate()
        server.go_on()
        server.wait()
        server.refuse()  # as if the credential had expired
        time.sleep(2 * spooled.LOOK)
        assert driver.poll() is None, driver.communicate()
        server.accept()
        deadline = time.monotonic() + 120
        while not more_than(TRIALS // 2):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert driver.poll() is None, "it must still run when the server dies"
        server.kill()
        time.sleep(OUTAGE)
        server.start()
        server.wait()
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, out + err
    said = [line for line in (out + err).splitlines() if "; until then " in line]
    refused = [line for line in said if "access denied" in line]
    assert len(refused) == 1, out + err
    assert 1 <= len(said) - len(refused) <= 2, out + err  # one if the store was never seen well in between

    expected = sorted(["reference", "cross_entropy", *(f"{i:05d}" for i in range(TRIALS))])
    store = ResultStore(f"s3://{root}", patience=30)
    trials = store.trials("away").to_pylist()
    assert [t["trial_id"] for t in trials] == expected
    assert {t["status"] for t in trials} == {"completed"}
    assert sorted(key.rpartition("/")[2] for key in rows()) == [f"{i}-0.parquet" for i in expected]
    evals = Counter(
        (row["trial_id"], row["epoch"], row["eval_set"], row["variant"])
        for row in store.evals("away").to_pylist()
    )
    assert {key[0] for key in evals} == set(expected)
    assert set(evals.values()) == {1}
    assert list((tmp_path / "cache" / "spool").rglob("*.object")) == [], "nothing waits on local disk"

    secrets = [s.encode() for s in (server.key, server.secret, server.reader_key, server.reader_secret)]
    kept = [fs.cat_file(key) for key in fs.find(root) if fs.isfile(key)]
    kept += [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) > 40
    assert not [secret for secret in secrets for data in (*kept, (out + err).encode()) if secret in data]


def start_again(server: OwnS3Server) -> None:
    server.start()
    server.wait()


@pytest.mark.parametrize(
    ("workers", "end", "mend", "why"),
    [
        pytest.param(2, OwnS3Server.kill, start_again, "no connection", id="gone", marks=pytest.mark.soak),
        pytest.param(0, OwnS3Server.refuse, OwnS3Server.accept, "access denied", id="refused"),
    ],
)
def test_a_trial_whose_store_stays_away_is_not_lost(
    workers: int, end: Mend, mend: Mend, why: str,
    server: OwnS3Server, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    fs = server.filesystem()
    flags = ["--name", "away", "--workers", str(workers), "--search.epochs", "4", "4"]
    flags += ["--search.trials", "1", "--search.baselines", "--search.concurrency", "1"]

    def first_trial_runs() -> bool:
        return bool(fs.find(f"{root}/checkpoints/sweep=away/00000"))

    with running_sweep(f"s3://{root}", first_trial_runs, *flags, program=("-c", IMPATIENT)) as driver:
        end(server)
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 2, out + err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "trial 00000 could not go on: cannot " in line, err
    assert why in line
    assert "the same command goes on" in line
    assert server.secret not in out + err

    mend(server)
    again = sweep("--results", f"s3://{root}", *flags)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = ResultStore(f"s3://{root}", patience=30).trials("away").to_pylist()
    assert {r["trial_id"] for r in rows} == {"reference", "00000"}
    assert {r["status"] for r in rows} == {"completed"}
    (first,) = (r for r in rows if r["trial_id"] == "00000")
    assert first["attempt"] == 1, "it went on"
    assert first["preemptions"] == 1, "of which the outage is one, however long"


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    flags = [*SMALL_SWEEP, "--name", "full", "--results", str(disk / "results")]
    flags += ["--search.epochs", "4", "4", "--search.trials", "1", "--search.baselines"]
    script = """
"$PYTHON" -c "$FULL" "$DISK" "$@" && exit 1
test $? = 2 || exit 1
rm "$DISK/filler"
"$PYTHON" sweeps/typo_sweep.py "$@" || exit 1
cp -r "$DISK/results" "$KEPT"
"""
    for name, value in {"PYTHON": sys.executable, "FULL": FILLING, "DISK": disk, "KEPT": kept}.items():
        monkeypatch.setenv(name, str(value))
    done = on_small_disk(disk, "sh", "-c", script, "sh", *flags, mib=128)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "trial 00000 could not go on: cannot write to " in line
    assert "no room" in line
    rows = ResultStore(kept).trials("full").to_pylist()
    assert {r["trial_id"]: r["status"] for r in rows} == dict.fromkeys(("reference", "00000"), "completed")
    (first,) = (r for r in rows if r["trial_id"] == "00000")
    assert first["attempt"] == 1, "it went on"
