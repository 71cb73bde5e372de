"""Rows of every earlier schema version stay readable, by clippo and by others."""

import shutil
from pathlib import Path

import duckdb
import polars as pl
import pytest

from clippo.results import SCHEMA_VERSION, TABLES, ResultStore
from tests.results.sample import EVALS, EXAMPLE, METRICS, RANKINGS, SETTINGS, TRIAL, content, write

VERSIONS = sorted(path.name for path in Path(__file__).parent.glob("v*"))
NEW_IN: dict[int, dict[str, list[str]]] = {2: {"trials": ["orthogonality"]}, 3: {}}
"""The columns that each version brought; what an older row lacks is null. Version 3 brought a table."""


def test_there_are_files_of_every_earlier_version() -> None:
    assert [f"v{version}" for version in range(1, SCHEMA_VERSION)] == VERSIONS
    assert sorted(NEW_IN) == list(range(2, SCHEMA_VERSION + 1))


@pytest.fixture(params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, ResultStore]:
    """The version of a store that was written by an earlier clippo, and a copy of it."""
    shutil.copytree(Path(__file__).parent / request.param, tmp_path / "store")
    return int(request.param[1:]), ResultStore(tmp_path / "store")


@pytest.mark.parametrize("sealed", [False, True])
def test_old_rows(old: tuple[int, ResultStore], sealed: bool) -> None:
    version, store = old
    if sealed:
        store.compact("old")
    missing = {name for v, new in NEW_IN.items() if v > version for name in new.get("trials", [])}
    expected = {name: None if name in missing else value for name, value in TRIAL.items()}
    trials = store.trials("old").to_pylist()
    assert [(row["trial_id"], row["attempt"]) for row in trials] == [("00000", 0), ("00001", 1), ("00002", 0)]
    for row in trials[:2]:
        assert row == {**row, **expected}
    assert trials[2]["error"] == "loss is nan at step 3"
    for table, rows in (("metrics", METRICS), ("evals", EVALS)):
        found = getattr(store, table)().to_pylist()
        assert len(found) == 2 * len(rows)
        assert all(any(row == {**row, **sent} for row in found) for sent in rows)
    assert store.rankings("old").num_rows == 0
    assert store.examples().to_pylist() == [{"sweep": "old", **EXAMPLE}]
    assert store.config("old") == {"trials": 2}
    assert [(s["trial_id"], s["attempt"], s["settings"]) for s in store.started("old")] == [
        ("00000", 0, SETTINGS),
        ("00001", 1, SETTINGS),
    ]
    for name, schema in TABLES.items():
        assert getattr(store, name)().schema.equals(schema, check_metadata=True)


def test_old_and_new_rows_in_one_sweep(old: tuple[int, ResultStore]) -> None:
    version, store = old
    write(store, sweep="old", trial_id="00003", rankings=RANKINGS)
    known = 0.5 if version >= 2 else None
    expected = [known, known, None, 0.5]
    query = f"""
        select trial_id, orthogonality
        from read_parquet('{store.uri}/trials/*/*.parquet', hive_partitioning = true, union_by_name = true)
        where sweep = 'old' order by trial_id
    """
    trials = f"{store.uri}/trials/**/*.parquet"
    options = {"hive_partitioning": True, "missing_columns": "insert", "extra_columns": "ignore"}
    for sealed in (False, True):
        assert store.trials("old")["orthogonality"].to_pylist() == expected
        with duckdb.connect() as connection:
            assert [row[1] for row in connection.sql(query).fetchall()] == expected
        frame = pl.scan_parquet(trials, **options).filter(sweep="old").sort("trial_id").collect()
        assert frame["beta"].to_list() == [0.1, 0.1, None, 0.1]
        # Polars goes by the columns of the first file.
        assert ("orthogonality" in frame.columns) == (sealed or version >= 2)
        assert [row["query"] for row in store.rankings("old").to_pylist()] == ["a photo of a doctor"]
        before = content(store)
        store.compact("old")
        assert content(store) == before
