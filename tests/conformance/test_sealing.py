"""What sealing must do, on local disk and on a real S3 server: nothing is lost and nothing seen twice."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from clippo.errors import StoreError
from clippo.results import TABLES, ResultStore, View, sealing
from tests.results.sample import EVALS, SETTINGS, TRIAL, content, keys, listed, objects, write, write_sweep

SEALED = ("trials", "metrics", "evals", "started")


@pytest.fixture
def store(store_uri: str) -> ResultStore:
    return ResultStore(store_uri)


@pytest.fixture
def local(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path)


def names(store: ResultStore, sweep: str = "s1") -> dict[str, list[str]]:
    """What lies in the folder of each table, with the digests of parts cut off."""
    found: dict[str, list[str]] = {table: [] for table in SEALED}
    for key in listed(store):
        table, folder, name = key.split("/")
        if folder == f"sweep={sweep}" and table in found:
            found[table].append("part" if name.startswith("part-") else name)
    return {table: sorted(each) for table, each in found.items()}


ALL_SEALED = {table: ["_manifest.json", "part"] for table in SEALED}


def before_each_step(store: ResultStore, act: Callable[[str, str], object]) -> None:
    """Calls ``act`` with ``put``, ``swap`` or ``delete`` and a key before each write and each deletion."""

    def wrapped(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name != "delete":
                act(name, args[0])
                return step(*args)
            for key in args[0]:
                act(name, key)
                step([key])
            return None

        return call

    for name in ("put", "swap", "delete"):
        setattr(store._objects, name, wrapped(name, getattr(store._objects, name)))


class Killed(BaseException):
    """What a process that dies in the middle leaves behind."""


# ---- what is sealed


def test_sealed_sweep_reads_the_same(store: ResultStore) -> None:
    write_sweep(store, "s1", range(3))
    store.write_trial("s1", "failed", 0, {"status": "failed", "error": "loss is nan at step 3"}, [], [])
    write_sweep(store, "s2", range(1))
    before, trials = content(store), store.trials()
    assert store.compact("s1") == 4
    assert content(store) == before
    assert store.trials().equals(trials)
    assert names(store) == ALL_SEALED
    assert {len(each) for each in names(store, "s2").values()} == {1}  # of another sweep nothing is touched
    for name, schema in TABLES.items():
        assert getattr(store, name)().schema.equals(schema, check_metadata=True)
    assert store.sweeps() == ["s1", "s2"]


def test_trials_after_sealing_are_added(store: ResultStore) -> None:
    write_sweep(store, "s1", range(3))
    store.compact("s1")
    write_sweep(store, "s1", range(3, 5))
    before = content(store)
    assert len(before["trials"]) == 5
    assert store.compact("s1") == 5
    assert content(store) == before
    assert names(store) == ALL_SEALED  # small parts are joined


def test_sealing_again_changes_nothing(local: ResultStore) -> None:
    write_sweep(local, "s1", range(3))
    local.compact("s1")
    before = objects(local)
    assert local.compact("s1") == 3
    assert objects(local) == before


def test_nothing_to_seal(local: ResultStore) -> None:
    local.write_started("s1", "00000", 0, SETTINGS)
    assert local.compact("s1") == local.compact("unknown") == 0
    assert names(local)["started"] == ["00000-0.json"]


def test_only_finished_trials_are_sealed(local: ResultStore) -> None:
    write_sweep(local, "s1", range(2))
    local.write_started("s1", "00002", 0, SETTINGS)  # still running
    write(local, trial_id="00003")
    local._objects.delete(["trials/sweep=s1/00003-0.parquet"])  # its driver died before it wrote this one
    before = content(local)
    assert local.compact("s1") == 2
    assert content(local) == before
    assert names(local)["started"] == ["00002-0.json", "_manifest.json", "part"]
    assert names(local)["evals"] == ["00003-0.parquet", "_manifest.json", "part"]


def test_highest_attempt_counts_before_and_after(store: ResultStore) -> None:
    for attempt in (0, 9):
        write(store, attempt=attempt, seed=attempt)
    write(store, trial_id="t2")
    store.compact("s1")
    assert keys(store.trials()) == [("s1", "t1", 9), ("s1", "t2", 0)]
    for attempt in (10, 3):
        write(store, attempt=attempt, seed=attempt)
    for _ in range(2):
        assert keys(store.trials()) == [("s1", "t1", 10), ("s1", "t2", 0)]
        assert set(keys(store.evals())) == set(keys(store.metrics())) == set(keys(store.trials()))
        assert len(store.evals()) == 2 * len(EVALS)
        store.compact("s1")
    assert names(store)["evals"] == ["_manifest.json", "part"]


def test_large_parts_stay_as_they_are(local: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "PART_ROWS", 4)
    monkeypatch.setattr(sealing, "BATCH", 2)
    write_sweep(local, "s1", range(6))
    local.compact("s1")
    first = {key for key in listed(local) if "evals/" in key and "part-" in key}
    assert len(first) == 3
    write_sweep(local, "s1", range(6, 8))
    before = content(local)
    local.compact("s1")
    assert content(local) == before
    assert len({key for key in listed(local) if "evals/" in key and "part-" in key} - first) == 1


def test_damaged_object_is_neither_sealed_nor_deleted(
    local: ResultStore, caplog: pytest.LogCaptureFixture
) -> None:
    write_sweep(local, "s1", range(2))
    local.write_bytes("trials/sweep=s1/00002-0.parquet", b"PAR1")
    assert local.compact("s1") == 3
    assert len(local.trials()) == 2
    assert names(local)["trials"] == ["00002-0.parquet", "_manifest.json", "part"]
    assert "trials/sweep=s1/00002-0.parquet is left out" in caplog.text


def test_damaged_part_is_an_error(local: ResultStore) -> None:
    write_sweep(local, "s1", range(2))
    local.compact("s1")
    [part] = [key for key in listed(local) if "trials/" in key and "part-" in key]
    data = objects(local)[part]
    local.write_bytes(part, data[:40] + bytes(8) + data[48:])
    with pytest.raises(StoreError, match=r"part-\w+\.parquet is damaged"):
        local.trials()


# ---- views


@pytest.mark.parametrize("sealed", [False, True])
def test_views(local: ResultStore, sealed: bool) -> None:
    for sweep in ("s1", "s2"):
        write_sweep(local, sweep, range(3))
    if sealed:
        local.compact("s1")
        write_sweep(local, "s1", range(3, 4))
    rows = local.evals().to_pylist()
    some = View(
        columns=["trial_id", "n_correct"],
        where={"variant": ["alpha=0.5", "none"], "sweep": ["s1"]},
    )
    expected = sorted(
        (row["trial_id"], row["n_correct"])
        for row in rows
        if row["variant"] == "alpha=0.5" and row["sweep"] == "s1"
    )
    assert len(expected) == 3 + sealed
    for view in (some, View(columns=some.columns, where=some.where, dictionary=True)):
        table = local.evals(view=view)
        assert table.column_names == ["trial_id", "n_correct"]
        assert pa.types.is_dictionary(table.schema.field("trial_id").type) == view.dictionary
        assert sorted(zip(*table.to_pydict().values(), strict=True)) == expected
    everything = local.evals(view=View(dictionary=True))
    assert everything.schema.field("sweep").type == pa.dictionary(pa.int32(), pa.string())
    assert sorted(map(repr, everything.to_pylist())) == sorted(map(repr, rows))
    assert len(local.trials("s1", View(where={"seed": [2, 3]}, dictionary=True))) == 1 + sealed
    with pytest.raises(StoreError, match="no column n_right"):
        local.evals(view=View(columns=["n_right"]))


# ---- others at the same time


def test_a_reader_between_any_two_steps(store: ResultStore) -> None:
    for attempt in (0, 1):
        write(store, trial_id="zebra", attempt=attempt)  # sorts after the manifest and the parts
    write_sweep(store, "s1", range(1))
    reader, steps = ResultStore(store.uri), list[str]()
    before = content(reader)

    def read(step: str, key: str) -> None:
        steps.append(step)
        table = key.partition("/")[0]
        rows = reader.started("s1") if table == "started" else getattr(reader, table)("s1").to_pylist()
        assert Counter(map(repr, rows)) == before[table]

    before_each_step(store, read)
    store.compact("s1")
    assert steps.count("put") == steps.count("swap") == len(SEALED)
    assert steps.count("delete") == 3 * 3 + 1  # both attempts of zebra; started knows none


def test_rows_in_portions_while_they_are_sealed(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "BATCH", 2)
    write_sweep(store, "s1", range(3))
    store.compact("s1")
    write_sweep(store, "s1", range(3, 7))
    before, begun = content(store)["evals"], 0

    def use(portions: Iterator[pa.Table]) -> list[list[dict[str, Any]]]:
        nonlocal begun
        begun += 1
        found = []
        for portion in portions:
            found.append(portion.to_pylist())
            if begun == len(found) == 1:
                store.compact("s1")
        return found

    whole = ResultStore(store.uri).through_evals("s1", View(), use)
    assert begun == 2
    assert Counter(repr(row) for rows in whole for row in rows) == before
    write_sweep(store, "s1", range(7, 10))
    apart = store.through_evals("s1", View(), use)
    assert [len({row["trial_id"] for row in rows}) for rows in apart] == [7, 2, 1]
    assert sum(map(len, apart)) == 10 * len(EVALS)
    assert store.through_evals("none", View(), list) == []


@pytest.mark.parametrize("table", ["trials", "evals"])
def test_sealing_while_a_reader_reads(store: ResultStore, table: str) -> None:
    """A reader has listed the objects, or the manifest, and has not read them yet."""
    for moment in range(2 if table == "trials" else 3):
        sweep = f"s{moment}"
        write_sweep(store, sweep, range(2))
        reader, gets = ResultStore(store.uri), []
        get = reader._objects.get

        def sealing_first(keys: Any, sweep: str = sweep, moment: int = moment) -> Any:
            gets.append(keys)  # noqa: B023
            if len(gets) == moment + 1:  # noqa: B023
                store.compact(sweep)
            return get(keys)  # noqa: B023

        reader._objects.get = sealing_first  # type: ignore[method-assign]
        found = getattr(reader, table)(sweep)["trial_id"].to_pylist()
        assert len(gets) > moment
        assert sorted(found) == sorted(["00000", "00001"] * (len(EVALS) if table == "evals" else 1))


@pytest.mark.parametrize(("step", "number"), [("put", 0), ("swap", 0), ("swap", 3), ("delete", 7)])
def test_killed_while_sealing(store: ResultStore, step: str, number: int) -> None:
    write_sweep(store, "s1", range(2))
    before, steps = content(store), list[str]()

    def die(now: str, key: str) -> None:
        steps.append(now)
        if steps.count(step) > number:
            raise Killed

    victim = ResultStore(store.uri)
    before_each_step(victim, die)
    with pytest.raises(Killed):
        victim.compact("s1")
    assert content(store) == before
    write_sweep(store, "s1", range(2, 3))
    assert store.compact("s1") == 3
    assert content(store)["trials"].total() == 3
    assert content(store)["evals"].total() == 3 * len(EVALS)
    assert names(store) == ALL_SEALED


@pytest.mark.parametrize("step", ["put", "swap", "delete"])
def test_two_that_seal_at_once(store: ResultStore, step: str) -> None:
    write_sweep(store, "s1", range(2))
    other, done = ResultStore(store.uri), False

    def overtake(now: str, key: str) -> None:
        nonlocal done
        if now == step and not done:
            done = True
            write_sweep(other, "s1", range(2, 3))
            other.compact("s1")

    before_each_step(store, overtake)
    store.compact("s1")
    assert done
    assert keys(store.trials()) == [("s1", f"{n:05d}", 0) for n in range(3)]
    assert len(store.evals()) == 3 * len(EVALS)
    store.compact("s1")
    assert names(store) == ALL_SEALED


def test_sealing_while_trials_are_written_and_read(store: ResultStore) -> None:
    done = threading.Event()
    failures: list[BaseException] = []

    def writing() -> None:
        writer = ResultStore(store.uri)
        try:
            for number in range(10):
                writer.write_trial("s1", f"{number:05d}", 0, TRIAL, [], EVALS)
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    def reading() -> None:
        reader, seen = ResultStore(store.uri), 0
        try:
            while not done.is_set():
                trials = keys(reader.trials())
                evals = reader.evals()
                assert len(set(trials)) == len(trials) >= seen
                assert set(trials) <= set(keys(evals))
                assert len(evals) == len(set(keys(evals))) * len(EVALS)
                seen = len(trials)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=writing), threading.Thread(target=reading)]
    for thread in threads:
        thread.start()
    while not done.is_set():
        store.compact("s1")
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.compact("s1") == 10
    assert len(store.evals()) == 10 * len(EVALS)


# ---- readers that know nothing of clippo


def test_plain_readers_with_distinct_at_any_moment(store: ResultStore) -> None:
    import duckdb

    write_sweep(store, "s1", range(2))
    write_sweep(store, "s2", range(1))
    query = f"""
        select distinct * from read_parquet('{store.uri}/evals/*/*.parquet',
            hive_partitioning = true, union_by_name = true)
    """
    with duckdb.connect() as connection:
        connection.execute("set threads = 1")
        if store.uri.startswith("s3://"):
            s3 = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
            connection.register_filesystem(s3)

        def read() -> None:
            assert len(connection.sql(query).fetchall()) == 3 * len(EVALS)

        before_each_step(store, lambda step, key: step == "delete" and read())
        read()
        store.compact("s1")
        read()
        rows = connection.sql(query.replace("distinct", "")).fetchall()
        assert len(rows) == 3 * len(EVALS)  # sealed, nothing is there twice
