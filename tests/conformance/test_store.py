"""What every result store must do, on local disk and on a real S3 server.

The writer processes of one test import this file, so what is slow to import is imported where it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clippo.errors import ConfigError, StoreError
from clippo.results import ENDED, RUNNING, SCHEMA_VERSION, TABLES, ResultStore, View
from tests.results.sample import (
    EVALS,
    EXAMPLE,
    METRICS,
    RANKINGS,
    SETTINGS,
    START,
    TRIAL,
    content,
    keys,
    listed,
    objects,
    parquet,
    write,
    write_sweep,
)

if TYPE_CHECKING:
    from tests.conftest import S3Server


@pytest.fixture
def store(store_uri: str) -> ResultStore:
    return ResultStore(store_uri)


def failure(action: Callable[[], object], *secrets: str) -> str:
    """The message of the StoreError that ``action`` raises: one line, and no secret in its traceback."""
    with pytest.raises(StoreError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert not [secret for secret in secrets if secret in "".join(traceback.format_exception(caught.value))]
    return message


# ---- rows


def test_round_trip_of_every_table(store: ResultStore) -> None:
    write(store)
    store.write_examples("s1", [EXAMPLE])
    key = {"sweep": "s1", "trial_id": "t1", "attempt": 0}
    assert store.trials().to_pylist() == [{**key, "error": None, **TRIAL}]
    assert store.metrics().to_pylist() == [{**key, **row} for row in METRICS]
    assert store.evals().to_pylist() == [{**key, **row, "n_fooled": None} for row in EVALS]
    assert store.examples().to_pylist() == [{"sweep": "s1", **EXAMPLE}]
    for name, table in TABLES.items():
        assert getattr(store, name)().schema.equals(table, check_metadata=True)
        assert getattr(store, name)("s1").equals(getattr(store, name)())


def test_rankings_are_kept_with_their_trial(store: ResultStore) -> None:
    write(store, trial_id="t0")
    before = set(listed(store))
    write(store, rankings=RANKINGS)
    write(store, attempt=1, rankings=[RANKINGS[0] | {"pictures": [0, 1, 2, 3], "majority": None}])
    assert not [key for key in before if key.startswith("rankings/")], "who ranks nothing writes nothing"
    (row,) = store.rankings("s1").to_pylist()
    assert (row["trial_id"], row["attempt"], row["pictures"], row["majority"]) == (
        "t1",
        1,
        [0, 1, 2, 3],
        None,
    )
    found = content(store)
    store.compact("s1")
    assert content(store) == found
    assert not [key for key in listed(store) if "/t1-" in key]
    write(store, trial_id="t2", rankings=RANKINGS)
    view = View(columns=["trial_id", "groups"], where={"variant": ["averaged"]})
    assert sorted(r["trial_id"] for r in store.rankings(view=view).to_pylist()) == ["t1", "t2"]


def test_empty_store_has_empty_tables(store: ResultStore) -> None:
    for name, schema in TABLES.items():
        for sweep in (None, "s1"):
            table = getattr(store, name)(sweep)
            assert len(table) == 0
            assert table.schema == schema
    assert store.sweeps() == []
    assert store.started("s1") == []
    assert store.config("s1") is None


def test_onlookers_see_how_far_a_sweep_is(store: ResultStore) -> None:
    assert store.state("s1") is None
    assert store.finished("s1") == {}
    store.write_state("s1", RUNNING, trials=3)
    write(store, attempt=1)
    write(store, trial_id="t2")
    assert store.finished("s1") == {"t1": 1, "t2": 0}
    store.compact("s1")
    assert store.finished("s1") == {"t1": 1, "t2": 0}
    store.write_state("s1", ENDED, trials=3)
    state = store.state("s1")
    assert state is not None
    assert (state["state"], state["trials"]) == (ENDED, 3)
    assert store.sweeps() == ["s1"]


def test_times_are_kept_in_utc(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    write(store, started_at=START.astimezone(timezone(timedelta(hours=9))))
    assert store.trials()["started_at"].to_pylist() == [START]
    assert store.trials().schema.field("started_at").type == pa.timestamp("us", tz="UTC")


def test_highest_attempt_counts(store: ResultStore) -> None:
    for attempt in (0, 9, 10):
        write(store, attempt=attempt, seed=attempt)
    assert store.trials()["seed"].to_pylist() == [10]
    assert set(keys(store.metrics())) == set(keys(store.evals())) == {("s1", "t1", 10)}
    assert len(store.evals()) == len(EVALS)


def test_trial_counts_only_with_its_trials_object(store: ResultStore) -> None:
    write(store, attempt=0)
    write(store, attempt=1)
    fs, root = fsspec.core.url_to_fs(store.uri, skip_instance_cache=True)
    fs.rm_file(f"{root}/trials/sweep=s1/t1-1.parquet")
    assert keys(store.trials()) == [("s1", "t1", 0)]
    assert set(keys(store.metrics())) == set(keys(store.evals())) == {("s1", "t1", 0)}


def test_rewriting_is_harmless(store: ResultStore) -> None:
    for _ in range(2):
        write(store)
        store.write_examples("s1", [EXAMPLE])
    assert len(store.trials()) == len(store.examples()) == 1
    assert len(store.metrics()) == len(METRICS)
    assert len(objects(store)) == 4


def test_trial_without_metrics_and_evals(store: ResultStore) -> None:
    store.write_trial("s1", "t1", 0, {"status": "failed", "error": "loss is nan at step 3"}, [], [])
    assert store.trials()["error"].to_pylist() == ["loss is nan at step 3"]
    assert len(store.metrics()) == len(store.evals()) == 0


def test_sweeps_never_mix(store: ResultStore) -> None:
    for sweep in ("s1", "s1-b", "s1.b", "S2"):
        write(store, sweep=sweep, rankings=RANKINGS)
        store.write_examples(sweep, [EXAMPLE])
        store.write_started(sweep, "t1", 0, SETTINGS)
    store.write_config("waiting", {})
    for name in TABLES:
        assert set(getattr(store, name)("s1")["sweep"].to_pylist()) == {"s1"}
        assert set(getattr(store, name)()["sweep"].to_pylist()) == {"s1", "s1-b", "s1.b", "S2"}
    assert len(store.started("s1")) == 1
    assert store.sweeps() == ["S2", "s1", "s1-b", "s1.b", "waiting"]


def test_started_trials(store: ResultStore) -> None:
    before = datetime.now(timezone.utc)
    for trial_id, attempt in (("t1", 0), ("t1", 1), ("t2", 0)):
        store.write_started("s1", trial_id, attempt, {**SETTINGS, "seed": attempt})
    started = store.started("s1")
    assert [(row["trial_id"], row["attempt"], row["settings"]["seed"]) for row in started] == [
        ("t1", 1, 1),
        ("t2", 0, 0),
    ]
    assert before <= datetime.fromisoformat(started[0]["started_at"]) <= datetime.now(timezone.utc)
    assert len(store.trials()) == 0


def test_an_attempt_is_begun_by_one_driver(store: ResultStore) -> None:
    other = ResultStore(store.uri, endpoint_url=store.endpoint_url)
    store.write_started("s1", "t1", 0, SETTINGS)
    with pytest.raises(
        StoreError, match=r"^another driver of sweep 's1' has begun trial t1; let one of them end"
    ):
        other.write_started("s1", "t1", 0, SETTINGS)
    other.write_started("s1", "t1", 1, SETTINGS)
    other.write_started("s2", "t1", 0, SETTINGS)
    assert [row["attempt"] for row in store.started("s1")] == [1]


def test_object_of_an_older_schema(store: ResultStore) -> None:
    old = {"trial_id": ["old"], "attempt": pa.array([0], pa.int32()), "status": ["completed"], "dropped": [1]}
    store.write_bytes("trials/sweep=s1/old-0.parquet", parquet(pa.table(old)))
    assert store.trials().schema == TABLES["trials"]
    write(store)
    for _ in range(2):
        assert store.trials().schema == TABLES["trials"]
        assert store.trials().select(["trial_id", "beta"]).to_pylist() == [
            {"trial_id": "old", "beta": None},
            {"trial_id": "t1", "beta": 0.1},
        ]
        store.compact("s1")


@pytest.mark.parametrize("sealed", [False, True])
def test_object_of_an_unreadable_newer_schema(tmp_path: Path, sealed: bool) -> None:
    store = ResultStore(tmp_path)
    new = parquet(pa.table({"trial_id": ["new"], "attempt": [0], "beta": ["adaptive"]}))
    name = f"part-{hashlib.sha256(new).hexdigest()[:16]}.parquet" if sealed else "new-0.parquet"
    store.write_bytes(f"trials/sweep=s1/{name}", new)
    if sealed:
        manifest = {"parts": [{"name": name, "rows": 1, "trials": {"new": 0}}]}
        store.write_bytes("trials/sweep=s1/_manifest.json", json.dumps(manifest).encode())
    assert "upgrade clippo" in failure(store.trials)


def test_schema_version_is_in_the_parquet_metadata(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    write(store)
    data = store.read_bytes("trials/sweep=s1/t1-0.parquet")
    assert (
        pq.read_metadata(io.BytesIO(data)).metadata[b"clippo.schema_version"] == str(SCHEMA_VERSION).encode()
    )


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        ({"leraning_rate": 0.1}, "leraning_rate"),
        ({"beta": "a lot"}, "does not fit table trials"),
        ({"seed": 2**64}, "does not fit table trials"),
        ({"status": "fine"}, "'fine'"),
    ],
)
def test_rows_that_do_not_fit_write_nothing(tmp_path: Path, trial: dict[str, Any], said: str) -> None:
    store = ResultStore(tmp_path)
    assert said in failure(lambda: write(store, **trial))
    assert objects(store) == {}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../s1", "a/b", "a b", "a=b", ".hidden", "-a", "é", "a" * 129]
)
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    store = ResultStore(tmp_path)
    with pytest.raises(ConfigError):
        write(store, sweep=name)
    with pytest.raises(ConfigError):
        write(store, trial_id=name)
    with pytest.raises(ConfigError):
        store.trials(name)
    with pytest.raises(ConfigError):
        store.write_config(name, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trial_id", ["part", "part-0"])
def test_names_of_sealed_objects_are_reserved(tmp_path: Path, trial_id: str) -> None:
    with pytest.raises(ConfigError, match="reserved"):
        write(ResultStore(tmp_path), trial_id=trial_id)


# ---- configs and other objects


def test_name_of_a_sweep_is_taken_once(store: ResultStore) -> None:
    store.write_config("s1", {"trials": 16})
    assert "resume it or choose another" in failure(lambda: store.write_config("s1", {"trials": 16}))
    assert store.config("s1") == {"trials": 16}


def test_lost_answer_to_a_create_is_not_a_taken_name(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store._objects.create

    def create_twice(key: str, data: bytes) -> bool:
        create(key, data)
        return create(key, data)

    monkeypatch.setattr(store._objects, "create", create_twice)
    store.write_config("s1", {"trials": 16})


def test_other_objects(store: ResultStore) -> None:
    assert not store.exists("checkpoints/a.bin")
    assert "does not exist" in failure(lambda: store.read_bytes("checkpoints/a.bin"))
    store.write_bytes("checkpoints/a.bin", b"\x00" * 1000)
    assert store.exists("checkpoints/a.bin")
    assert store.read_bytes("checkpoints/a.bin") == b"\x00" * 1000
    with fsspec.open(store.uri_of("checkpoints/a.bin")) as file:
        assert len(file.read()) == 1000
    for bad in ("", "/etc/passwd", "../a", "a//b", "a/../../b"):
        with pytest.raises(ConfigError):
            store.write_bytes(bad, b"")


def test_pickled_store_is_the_same_store(store: ResultStore) -> None:
    write(store)
    again = pickle.loads(pickle.dumps(store))
    assert keys(again.trials()) == [("s1", "t1", 0)]


def test_other_fsspec_store() -> None:
    store = ResultStore("memory://clippo-test/results")
    store.check()
    write_sweep(store, "s1", range(3))
    store.write_examples("s1", [EXAMPLE])
    store.write_config("s1", {})
    failure(lambda: store.write_config("s1", {}))
    before = content(store)
    assert keys(store.trials("s1")) == [("s1", f"{n:05d}", 0) for n in range(3)]
    assert store.compact("s1") == 3
    assert content(store) == before
    write_sweep(store, "s1", range(3, 4))
    assert store.compact("s1") == 4
    assert len(store.trials()) == 4
    assert store.examples().to_pylist() == [{"sweep": "s1", **EXAMPLE}]
    assert store.sweeps() == ["s1"]


def test_endpoint_as_an_argument(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    uri = f"s3://{s3_env.bucket}/endpoint"
    store = ResultStore(uri, endpoint_url=s3_env.endpoint)
    write(store)
    assert len(pickle.loads(pickle.dumps(store)).trials()) == 1
    with pytest.raises(ConfigError, match="carries a password"):
        ResultStore(uri, endpoint_url="http://me:pass-phrase@localhost")
    with pytest.raises(ConfigError, match="has no endpoint"):
        ResultStore("/tmp/results", endpoint_url=s3_env.endpoint)


def test_file_url_and_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = ResultStore("./results/")
    assert relative.uri == ResultStore(f"file://{tmp_path}/results").uri == str(tmp_path / "results")
    write(relative)
    monkeypatch.chdir("/")
    assert len(relative.trials()) == 1


# ---- several processes


def write_many(uris: list[str], writer: int, barrier: Barrier) -> None:
    for uri in uris:
        store = ResultStore(uri)
        barrier.wait()
        try:
            store.write_config("s1", {"writer": writer})
        except StoreError:
            pass
        else:
            store.write_bytes(f"winners/{writer}", b"")
        for trial in range(3):
            write(store, trial_id=f"w{writer}-{trial}")
            store.trials()  # a reader in the middle never fails
            if writer == trial:
                store.compact("s1")


def test_eight_writers_at_once_lose_nothing(tmp_path: Path, s3_env: S3Server) -> None:
    uris = [str(tmp_path), f"s3://{s3_env.bucket}/writers"]  # in one test, as starting processes is slow
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not eight times
    barrier = context.Barrier(8)
    writers = [context.Process(target=write_many, args=(uris, n, barrier), daemon=True) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8
    for store in map(ResultStore, uris):
        assert keys(store.trials()) == [("s1", f"w{n}-{trial}", 0) for n in range(8) for trial in range(3)]
        assert len(store.metrics()) == 24 * len(METRICS)
        assert len(store.evals()) == 24 * len(EVALS)
        winners = [key for key in listed(store) if key.startswith("winners/")]
        assert winners == [f"winners/{(store.config('s1') or {})['writer']}"]


def test_half_written_objects_are_invisible(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ResultStore(tmp_path)
    write(store)
    folder = tmp_path / "trials" / "sweep=s1"
    whole = (folder / "t1-0.parquet").read_bytes()
    (folder / ".t2-0.parquet.abc.tmp").write_bytes(whole[:100])
    assert keys(store.trials()) == [("s1", "t1", 0)]
    assert caplog.records == []
    for length in (0, 100, len(whole) - 1):  # a copy in progress
        (folder / "t2-0.parquet").write_bytes(whole[:length])
        assert keys(store.trials()) == [("s1", "t1", 0)]
    assert "t2-0.parquet is left out" in caplog.text


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in failure(lambda: write(ResultStore(tmp_path)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---- stores that cannot be used


def test_check_leaves_nothing_behind(store: ResultStore) -> None:
    store.check()
    assert objects(store) == {}


def test_check_of_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path) in failure(ResultStore(tmp_path / "file").check)
    assert str(tmp_path) in failure(ResultStore(tmp_path / "file" / "below").check)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_of_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "access denied" in failure(ResultStore(tmp_path).check)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrong-secret"), ("AWS_ACCESS_KEY_ID", "wrong-key")],
)
def test_wrong_credential(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    store = ResultStore(f"s3://{s3_env.bucket}/results")
    for action in (store.check, store.trials, lambda: store.config("s1"), lambda: write(store)):
        message = failure(action, s3_env.key, s3_env.secret, value)
        assert f"s3://{s3_env.bucket}/results" in message
        assert "access denied" in message


def test_no_credential(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "set AWS_ACCESS_KEY_ID" in failure(ResultStore(f"s3://{s3_env.bucket}/results").check)


def test_read_only_credential(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultStore(f"s3://{s3_env.bucket}/read-only")
    write(store)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_env.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_env.reader_secret)
    reader = ResultStore(store.uri)
    assert len(reader.trials()) == 1
    assert "cannot write" in failure(reader.check, s3_env.reader_key, s3_env.reader_secret)


def test_missing_bucket(s3_env: S3Server) -> None:
    store = ResultStore("s3://no-such-bucket/results")
    for action in (store.check, store.trials, lambda: write(store)):
        message = failure(action, s3_env.key, s3_env.secret)
        assert "s3://no-such-bucket/results" in message
        assert "create the bucket" in message


def test_unreachable_endpoint(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import free_ports

    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    start = time.monotonic()
    message = failure(ResultStore("s3://clippo/results").check, s3_env.key, s3_env.secret)
    assert time.monotonic() - start < 15
    assert endpoint in message
    assert "check AWS_ENDPOINT_URL" in message


@pytest.mark.parametrize("uri", ["s3://", "s3:///prefix", "nonsense://a/b", "s3://me:pass-phrase@bucket/x"])
def test_bad_urls_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ResultStore(uri)
    assert "pass-phrase" not in "".join(traceback.format_exception(caught.value))


def test_no_secret_in_the_store(store: ResultStore, s3_env: S3Server) -> None:
    write(store)
    store.write_examples("s1", [EXAMPLE])
    store.write_config("s1", {"trials": 16})
    store.write_started("s1", "t1", 0, SETTINGS)
    store.write_trial("s1", "t2", 0, TRIAL, [], [])
    seen = [repr(store).encode(), pickle.dumps(store), *objects(store).values()]
    store.compact("s1")
    seen += objects(store).values()
    seen += [repr(getattr(store, name)().to_pylist()).encode() for name in TABLES]
    for secret in (s3_env.key, s3_env.secret):
        assert not [data for data in seen if secret.encode() in data]


# ---- readers that know nothing of clippo


def test_duckdb_reads_the_store(store: ResultStore) -> None:
    import duckdb

    write(store, sweep="s1")
    write(store, sweep="s2", trial_id="t2")
    with duckdb.connect() as connection:
        if store.uri.startswith("s3://"):
            s3 = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
            connection.register_filesystem(s3)
        query = f"""
            select sweep, trial_id, sum(n_correct) / sum(n_total) as accuracy
            from read_parquet('{store.uri}/evals/**/*.parquet', hive_partitioning=true, union_by_name=true)
            group by all order by all
        """
        for _ in range(2):  # open, and one of them sealed
            assert connection.sql(query).fetchall() == [("s1", "t1", 0.8), ("s2", "t2", 0.8)]
            store.compact("s1")


def test_polars_reads_the_store(store: ResultStore) -> None:
    import polars as pl

    write(store, sweep="s1")
    write(store, sweep="s2", trial_id="t2")
    options = {"aws_allow_http": "true"} if store.uri.startswith("s3://") else None
    for _ in range(2):  # open, and one of them sealed
        frame = pl.scan_parquet(
            f"{store.uri}/trials/**/*.parquet",
            hive_partitioning=True,
            missing_columns="insert",
            extra_columns="ignore",
            storage_options=options,
        )
        rows = frame.select("sweep", "trial_id", "beta").sort("sweep").collect().rows()
        assert rows == [("s1", "t1", 0.1), ("s2", "t2", 0.1)]
        store.compact("s1")
