"""The result tables: one schema each, and how rows become Parquet and back.

The schema only grows. A reader fills a column that an older object lacks with nulls, so raise
``SCHEMA_VERSION`` with every new column and never rename or retype one.

    version 3    the table rankings; a store without it has none
    version 2    trials.orthogonality
    version 1    the beginning
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clippo.errors import StoreError
from clippo.results.arrow import is_in, repeated

SCHEMA_VERSION = 3
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
        "orthogonality": pa.float64(),
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
        "device_s": pa.float64(),  # of all workers and attempts
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
    "rankings": {
        **_TRIAL_KEY,
        "epoch": pa.int64(),
        "eval_set": pa.string(),
        "variant": pa.string(),
        "seed": pa.int64(),
        "query": pa.string(),  # the caption that was asked for
        "k": pa.int64(),  # the top that is looked at
        "pictures": pa.list_(pa.int32()),  # rows of the evaluation set, best first, 4 k of them
        "groups": pa.list_(pa.int8()),  # theirs, indices of group_names
        "group_names": pa.list_(pa.string()),
        "pool": pa.list_(pa.int64()),  # pictures of each group that were ranked
        "majority": pa.int8(),  # the group whose share is shown; null where none is
    },
    "examples": {
        "sweep": pa.string(),
        "picture": pa.binary(),  # an encoded image
        "label": pa.string(),
        "attack_word": pa.string(),
        "predictions_json": pa.string(),  # {"reference": class, "recommended": class, baseline: class}
    },
}
# Not a table of its own: a note that is kept until its trial has rows, JSON while the sweep is open.
_STARTED = {**_TRIAL_KEY, "started_at": pa.string(), "settings_json": pa.string()}


def _schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema(list(columns.items()), metadata={"clippo.schema_version": str(SCHEMA_VERSION)})


TABLES: dict[str, pa.Schema] = {name: _schema(columns) for name, columns in _COLUMNS.items()}
_SCHEMAS = {**TABLES, "started": _schema(_STARTED)}

SEALED_ORDER = {
    "trials": ("trial_id",),
    "metrics": ("name", "trial_id", "epoch", "step"),
    "evals": ("eval_set", "variant", "trial_id", "epoch"),
    "rankings": ("eval_set", "variant", "trial_id", "epoch"),
    "started": ("trial_id",),
}
"""How a sealed file is sorted. What is read together lies together: the text that repeats becomes long runs,
and the statistics of a row group tell which evaluation sets it holds, so that the others are skipped."""
_GROUP_ROWS, _LEAST_ROWS = 1 << 17, 1 << 14


@dataclass(frozen=True, kw_only=True)
class View:
    """What is wanted of a table.

    Attributes:
        columns: their names; None: all.
        where: column and the values that are wanted in it, such as ``{"loss": ["dpo", "ipo"]}``.
        dictionary: texts as dictionary columns, which hold each distinct text once.
    """

    columns: Sequence[str] | None = None
    where: Mapping[str, Sequence[object]] = field(default_factory=dict)
    dictionary: bool = False

    def of(self, schema: pa.Schema) -> tuple[pa.Schema, pa.Schema]:
        """The columns that are shown, and those that must be read for it.

        Raises:
            StoreError: the schema has no such column.
        """
        shown = schema.names if self.columns is None else list(self.columns)
        read = [*shown, *(name for name in self.where if name not in shown)]
        if unknown := set(read) - set(schema.names):
            raise StoreError(f"no column {', '.join(sorted(unknown))}; there are {', '.join(schema.names)}")
        fields = [schema.field(name) for name in read]
        if self.dictionary:
            fields = [f.with_type(_DICTIONARY) if f.type == pa.string() else f for f in fields]
        return pa.schema(fields[: len(shown)], schema.metadata), pa.schema(fields, schema.metadata)


ALL = View()
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


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
    pq.write_table(table, sink)  # for a few rows Snappy takes half the time of Zstandard, and no more room
    return sink.getvalue()


def encode_sealed(name: str, table: pa.Table) -> bytes:
    """The rows of many trials as one Parquet object, for readers of all trials at once."""
    order = SEALED_ORDER[name]
    table = table.sort_by([(column, "ascending") for column in order]).drop_columns(["sweep"])
    sink = io.BytesIO()
    # The dictionary pages have room for the ids of all trials of a row group.
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", dictionary_pagesize_limit=8 << 20
    ) as writer:
        for start, end in _groups(table[order[0]].combine_chunks()):
            writer.write_table(table.slice(start, end - start), row_group_size=_GROUP_ROWS)
    return sink.getvalue()


def _groups(column: pa.Array) -> list[tuple[int, int]]:
    """Where the row groups of a sorted table begin and end: where its first column changes.

    Where that would make small ones, it is one group for all.
    """
    ends = pc.run_end_encode(column).run_ends.to_pylist()
    if len(column) <= _LEAST_ROWS * len(ends):
        return [(0, len(column))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def decode(name: str, data: bytes, sweep: str) -> pa.Table:
    """The rows of one trial's object as they were written, with ``sweep`` put back."""
    if name == "started":
        row = json.loads(data)
        row["settings_json"] = json.dumps(row.pop("settings"))
        return pa.Table.from_pylist([{**row, "sweep": sweep}], schema=_SCHEMAS[name])
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).replace_schema_metadata(None)
    if "sweep" in table.column_names:
        table = table.drop_columns(["sweep"])
    return table.append_column("sweep", pa.repeat(pa.scalar(sweep), len(table)))


def decode_sealed(name: str, data: bytes, sweep: str, view: View, left_out: Sequence[str] = ()) -> pa.Table:
    """What a view shows of a sealed object of any schema version, but for the trials that are left out.

    Raises:
        StoreError: a column has another type than here, so a newer clippo wrote it.
    """
    shown, read = view.of(_SCHEMAS[name])
    if left_out and "trial_id" not in read.names:
        read = read.append(_SCHEMAS[name].field("trial_id"))
    try:
        source, metadata = pa.BufferReader(data), pq.read_metadata(pa.BufferReader(data))
        # By leaf; a column of lists has one, which is called otherwise.
        leaves = (metadata.schema.column(i).path for i in range(metadata.num_columns))
        there = [path.partition(".")[0] for path in leaves]
        texts = [f.name for f in read if f.type == _DICTIONARY and f.name in there]
        file = pq.ParquetFile(source, metadata=metadata, read_dictionary=texts)
        groups, where = set(range(metadata.num_row_groups)), dict(view.where)
        for column in where.keys() & set(there):
            chosen, pure = _chosen(metadata, there.index(column), where[column])
            groups &= chosen
            if pure:
                del where[column]
        columns = [n for n in read.names if n in there]
        table = file.read_row_groups(sorted(groups), columns=columns, use_threads=False)
        return _filtered(_conformed(table, read, sweep), where, left_out).select(shown.names)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, error) from error


def concatenated(name: str, tables: Iterable[pa.Table], view: View) -> pa.Table:
    """Tables of a view as one, also none."""
    return pa.concat_tables([view.of(_SCHEMAS[name])[0].empty_table(), *tables])


def merge(name: str, tables: list[pa.Table], view: View) -> pa.Table:
    """What a view shows of objects of any schema version; what one lacks is null.

    Raises:
        StoreError: an object's column has another type than here, so a newer clippo wrote it.
    """
    shown, read = view.of(_SCHEMAS[name])
    if not tables:
        return shown.empty_table()
    try:
        merged = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        return _filtered(_conformed(merged, read), view.where).select(shown.names)
    except pa.ArrowException as error:
        raise _unreadable(name, error) from error


def _conformed(table: pa.Table, schema: pa.Schema, sweep: str | None = None) -> pa.Table:
    """The columns of a schema; those that the table lacks are null, or the sweep."""
    columns = []
    for wanted in schema:
        if wanted.name in table.column_names:
            found = table[wanted.name]
            columns.append(found if found.type == wanted.type else found.cast(wanted.type))
        elif wanted.name == "sweep" and sweep is not None:
            columns.append(repeated(sweep, len(table)).cast(wanted.type))
        else:
            columns.append(pa.nulls(len(table), wanted.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _filtered(
    table: pa.Table, where: Mapping[str, Sequence[object]], left_out: Sequence[str] = ()
) -> pa.Table:
    masks = [is_in(table[name], values) for name, values in where.items()]
    if left_out:
        masks.append(pc.invert(is_in(table["trial_id"], left_out)))
    if not masks:
        return table
    table = table.filter(reduce(pc.and_, masks))
    for i, column in enumerate(table.schema):
        if column.type == _DICTIONARY:  # of what is left
            table = table.set_column(i, column, table[i].cast(pa.string()).dictionary_encode())
    return table


def _chosen(metadata: pq.FileMetaData, column: int, values: Sequence[Any]) -> tuple[set[int], bool]:
    """The row groups that may have one of these values in a column; whether they have nothing else there."""
    groups, pure = set(), True
    for number in range(metadata.num_row_groups):
        statistics = metadata.row_group(number).column(column).statistics
        if statistics is None or not statistics.has_min_max:
            groups.add(number)
            pure = False
            continue
        lowest, highest = statistics.min, statistics.max
        if any(lowest <= value <= highest for value in values):
            groups.add(number)
            pure &= lowest == highest and statistics.null_count == 0
    return groups, pure


def _unreadable(name: str, error: Exception) -> StoreError:
    said = " ".join(str(error).split())
    return StoreError(
        f"table {name} has rows that schema version {SCHEMA_VERSION} cannot read; upgrade clippo: {said}"
    )
