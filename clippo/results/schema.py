"""The result tables: one schema each, and how rows become Parquet and back.

The schema only grows. A reader fills a column that an older object lacks with nulls, so raise
``SCHEMA_VERSION`` with every new column and never rename or retype one.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clippo.errors import StoreError

SCHEMA_VERSION = 1
STATUSES = ("completed", "stopped_early", "failed")

_TIME = pa.timestamp("us", tz="UTC")

_TRIAL_KEY = {"sweep": pa.string(), "trial_id": pa.string(), "attempt": pa.int64()}
_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "trials": {
        **_TRIAL_KEY,
        "status": pa.string(),  # one of STATUSES
        "error": pa.string(),
        "started_at": _TIME,
        "finished_at": _TIME,
        # Settings. Those of a new loss or task go to params_json until they deserve a column.
        "loss": pa.string(),
        "beta": pa.float64(),
        "kl_weight": pa.float64(),
        "learning_rate": pa.float64(),
        "epochs": pa.int64(),
        "batch_size": pa.int64(),
        "seed": pa.int64(),
        "workers": pa.int64(),
        "trainable": pa.string(),
        "optimizer": pa.string(),
        "precision": pa.string(),
        "params_json": pa.string(),
        # Cost
        "wall_s": pa.float64(),
        "device_s": pa.float64(),  # wall_s times the number of devices
        "device_type": pa.string(),
        "preemptions": pa.int64(),
        # Provenance
        "code_version": pa.string(),
        "git_commit": pa.string(),
        "packages_json": pa.string(),
        "model_digest": pa.string(),
        "data_digest": pa.string(),
        "prepared_digest": pa.string(),
        "checkpoint_uri": pa.string(),
    },
    "metrics": {
        **_TRIAL_KEY,
        "epoch": pa.int64(),
        "step": pa.int64(),
        "name": pa.string(),
        "value": pa.float64(),
    },
    "evals": {
        **_TRIAL_KEY,
        "epoch": pa.int64(),
        "eval_set": pa.string(),
        "variant": pa.string(),  # last, averaged, alpha=0.5, t=2.0
        "seed": pa.int64(),
        "n_correct": pa.int64(),
        "n_total": pa.int64(),
        "n_fooled": pa.int64(),
    },
    "examples": {
        "sweep": pa.string(),
        "picture": pa.binary(),  # an encoded image
        "label": pa.string(),
        "attack_word": pa.string(),
        "predictions_json": pa.string(),  # {"reference": class, "recommended": class, baseline: class}
    },
}

TABLES: dict[str, pa.Schema] = {
    name: pa.schema(list(columns.items()), metadata={"clippo.schema_version": str(SCHEMA_VERSION)})
    for name, columns in _COLUMNS.items()
}


def encode(name: str, rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows of table ``name`` as one Parquet object; ``sweep`` is left out, as it is part of the key.

    Raises:
        StoreError: a column that the schema does not know, or a value that does not fit its type.
    """
    schema = TABLES[name].remove(0)
    rows = list(rows)
    unknown = set().union(*rows) - set(TABLES[name].names)
    if unknown:
        raise StoreError(
            f"table {name} has no column {', '.join(sorted(unknown))}; it has {', '.join(schema.names)}"
        )
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, OverflowError) as error:
        raise StoreError(f"a row does not fit table {name}: {error}") from error
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def decode(data: bytes, sweep: str) -> pa.Table:
    """The rows of one object as they were written, with ``sweep`` put back."""
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).replace_schema_metadata(None)
    if "sweep" in table.column_names:
        table = table.drop_columns(["sweep"])
    return table.append_column("sweep", pa.repeat(pa.scalar(sweep), len(table)))


def merge(name: str, tables: list[pa.Table]) -> pa.Table:
    """Objects of any schema version as one table of the current schema; what one lacks is null.

    Raises:
        StoreError: an object's column has another type than here, so a newer clippo wrote it.
    """
    schema = TABLES[name]
    if not tables:
        return schema.empty_table()
    try:
        merged = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        columns = [
            merged[field.name].cast(field.type)
            if field.name in merged.column_names
            else pa.nulls(len(merged), field.type)
            for field in schema
        ]
    except pa.ArrowException as error:
        raise StoreError(
            f"table {name} has rows that schema version {SCHEMA_VERSION} cannot read; upgrade clippo: {error}"
        ) from error
    return pa.Table.from_arrays(columns, schema=schema)
