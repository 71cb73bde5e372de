"""A whole sweep whose S3 server stops answering, and later dies: every row arrives, once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from clippo.results import ResultStore
from tests.conftest import running_sweep, sweep
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


def test_a_sweep_outlives_its_store(
    server: OwnS3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    fs, root = server.filesystem(), f"{server.bucket}/outage"

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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trial_whose_store_stays_away_is_not_lost(
    workers: int, server: OwnS3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    fs, root = server.filesystem(), f"{server.bucket}/outage"
    flags = ["--name", "away", "--workers", str(workers), "--search.epochs", "4", "4"]
    flags += ["--search.trials", "1", "--search.baselines", "--search.concurrency", "1"]

    def first_trial_runs() -> bool:
        return bool(fs.find(f"{root}/checkpoints/sweep=away/00000"))

    with running_sweep(f"s3://{root}", first_trial_runs, *flags, program=("-c", IMPATIENT)) as driver:
        server.kill()
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 2, out + err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "trial 00000 could not go on: cannot " in line, err
    assert "the same command goes on" in line
    assert server.secret not in out + err

    server.start()
    server.wait()
    again = sweep("--results", f"s3://{root}", *flags)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = ResultStore(f"s3://{root}", patience=30).trials("away").to_pylist()
    assert {r["trial_id"] for r in rows} == {"reference", "00000"}
    assert {r["status"] for r in rows} == {"completed"}
    (first,) = (r for r in rows if r["trial_id"] == "00000")
    assert first["attempt"] == 1, "it went on"
    assert first["preemptions"] == 1, "of which the outage is one, however long"
