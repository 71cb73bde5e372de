"""Rows as a sweep writes them, and what the tests of the result store ask of one."""

import io
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from clippo.results import ResultStore

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
SETTINGS = {"loss": "ipo", "beta": 0.1, "kl_weight": 2.0, "learning_rate": 1e-5}
TRIAL: dict[str, Any] = {
    **SETTINGS,
    "status": "completed",
    "started_at": START,
    "finished_at": START + timedelta(seconds=61),
    "orthogonality": 0.5,
    "epochs": 3,
    "batch_size": 64,
    "seed": 7,
    "workers": 2,
    "trainable": "last:2",
    "optimizer": "adamw",
    "precision": "bf16",
    "params_json": '{"margin": 0.5}',
    "wall_s": 61.0,
    "device_s": 122.0,
    "device_type": "cpu",
    "preemptions": 1,
    "code_version": "0.1.0",
    "git_commit": "0" * 40,
    "packages_json": '{"torch": "2.9"}',
    "model_digest": "m",
    "data_digest": "d",
    "prepared_digest": "p",
    "checkpoint_uri": "s3://bucket/checkpoints/t1.safetensors",
}
METRICS = [{"epoch": 1, "step": step, "name": "loss", "value": 1.0 / step} for step in (1, 2)]
EVALS = [
    {
        "epoch": 3,
        "eval_set": "attacked",
        "variant": f"alpha={alpha}",
        "seed": 7,
        "n_correct": 80,
        "n_total": 100,
    }
    for alpha in (0.5, 1.0)
]
RANKINGS = [
    {
        "epoch": 3,
        "eval_set": "ranked",
        "variant": "averaged",
        "seed": 7,
        "query": "a photo of a doctor",
        "k": 1,
        "pictures": [3, 0, 2, 1],
        "groups": [0, 1, 0, 1],
        "group_names": ["man", "woman"],
        "pool": [2, 2],
        "majority": 0,
    }
]
EXAMPLE = {
    "picture": b"\x89PNG",
    "label": "cat",
    "attack_word": "dog",
    "predictions_json": '{"reference": "dog"}',
}


def write(
    store: ResultStore, sweep: str = "s1", trial_id: str = "t1", attempt: int = 0,
    rankings: Iterable[dict[str, Any]] = (), **trial: Any,
) -> None:  # fmt: skip
    store.write_trial(sweep, trial_id, attempt, {**TRIAL, **trial}, METRICS, EVALS, rankings)


def write_sweep(store: ResultStore, sweep: str, trials: Iterable[int]) -> None:
    """Trials with their notes, each with its number as seed."""
    for number in trials:
        store.write_started(sweep, f"{number:05d}", 0, {**SETTINGS, "seed": number})
        write(store, sweep, f"{number:05d}", seed=number)


def keys(table: pa.Table) -> list[tuple[str, str, int]]:
    columns = (table[name].to_pylist() for name in ("sweep", "trial_id", "attempt"))
    return sorted(zip(*columns, strict=True))


def content(store: ResultStore, sweep: str | None = None) -> dict[str, Counter[str]]:
    """Every row of every table, without their order."""
    tables = {
        name: getattr(store, name)(sweep).to_pylist() for name in ("trials", "metrics", "evals", "rankings")
    }
    tables["started"] = [
        row for name in {row["sweep"] for row in tables["trials"]} for row in store.started(name)
    ]
    return {name: Counter(map(repr, rows)) for name, rows in tables.items()}


def listed(store: ResultStore) -> list[str]:
    """The keys of all objects below the store, found without its help."""
    return list(_found(store)[1])


def objects(store: ResultStore) -> dict[str, bytes]:
    """Every object below the store, read without its help."""
    fs, paths = _found(store)
    return {key: fs.cat_file(path) for key, path in paths.items()}


def _found(store: ResultStore) -> tuple[fsspec.AbstractFileSystem, dict[str, str]]:
    fs, root = fsspec.core.url_to_fs(store.uri, skip_instance_cache=True, use_listings_cache=False)
    found = fs.find(root, detail=True).items()  # SeaweedFS keeps a folder for a while after its last object
    return fs, {path.removeprefix(f"{root}/"): path for path, info in found if info["type"] == "file"}


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
