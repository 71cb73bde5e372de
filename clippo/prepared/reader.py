"""Reads a prepared set: memory-mapped inputs, the rest in memory.

B batch, C classes, D embedding, N pictures of a set
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clippo.data.prompts import templates_of
from clippo.errors import ConfigError, DataError
from clippo.prepared.location import is_whole
from clippo.tasks import task_named
from clippo.tasks.base import PairTable, Queries, TrainRows, joined_name

NARROW = 4096  # bytes of an input up to which a set is held in memory


class InputType(NamedTuple):
    """What the input of one picture is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool

    @classmethod
    def of(cls, described: dict[str, Any]) -> InputType:
        """The one that a manifest describes."""
        return cls(getattr(torch, described["dtype"]), tuple(described["shape"]), described["channels_last"])


class Rows:
    """The pictures of one set.

    Attributes:
        input_type: what the input of each is.
        chunks: these inputs as they lie in mapped files, uint8 (rows, bytes of one).
        labels: int64 (N,).
        attack_labels: int64 (N,), -1 where no class is written.
        groups: int64 (N,), -1 where there is none.
        reference: the reference's unit-length embeddings, float32 (N, D).
    """

    def __init__(self, folder: Path, described: dict[str, Any]) -> None:
        batches = [b for f in described["files"] for b in _mapped_batches(folder / f["file"])]
        self.input_type = InputType.of(described)
        self.chunks = [_bytes_of(b.column("input")) for b in batches]
        labels, attack_labels = (
            np.concatenate([b.column(name).to_numpy() for b in batches]) for name in ("label", "attack_label")
        )
        groups = [  # of an earlier version: none
            b.column("group").to_numpy() if "group" in b.schema.names else np.full(len(b), -1)
            for b in batches
        ]
        self.groups = torch.from_numpy(np.concatenate(groups).astype(np.int64))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.attack_labels = torch.from_numpy(attack_labels.astype(np.int64))
        reference = np.concatenate([_bytes_of(b.column("reference")) for b in batches])
        self.reference = torch.from_numpy(reference).view(torch.float32)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def inputs(self) -> Inputs:
        """What the policy takes."""
        return Inputs([self])


class Inputs:
    """What the policy takes, as ``Policy.frozen`` gave it, of the pictures of some sets, counted through.

    Attributes:
        bytes_of_one: of one picture.
        in_memory: whether they were read when this was made, as they are narrow; if not, whenever asked for.
    """

    def __init__(self, sets: Sequence[Rows]) -> None:
        (input_type,) = {rows.input_type for rows in sets}  # a policy takes one
        self._dtype, shape, self._channels_last = input_type
        self._shape = (*shape[1:], shape[0]) if self._channels_last else shape
        self._chunks = [chunk for rows in sets for chunk in rows.chunks]
        self._starts = np.cumsum([0, *(len(c) for c in self._chunks)])
        self.bytes_of_one = int(self._chunks[0].shape[1])
        # Embeddings are a few kilobytes a picture, and are held in memory as the reference's are.
        self.in_memory = self.bytes_of_one <= NARROW and not self._channels_last
        self._small: Tensor | None = None
        if self.in_memory:
            self._small = self._seen_as(torch.from_numpy(np.concatenate(self._chunks)))

    def __call__(self, numbers: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The inputs of some pictures; a copy."""
        if self._small is not None:
            return self._small.index_select(0, torch.as_tensor(numbers, dtype=torch.int64))
        wanted = np.asarray(numbers, np.int64)
        chunk = np.searchsorted(self._starts, wanted, side="right") - 1
        within = wanted - self._starts[chunk]
        # One copy a row is as fast as memory; grouping the rows by chunk first costs more than it saves.
        copied = np.empty((len(wanted), self.bytes_of_one), np.uint8)
        for target, c, i in zip(copied, chunk.tolist(), within.tolist(), strict=True):
            target[:] = self._chunks[c][i]
        return self._seen_as(torch.from_numpy(copied))

    def _seen_as(self, copied: Tensor) -> Tensor:
        inputs = copied.view(self._dtype).view(len(copied), *self._shape)
        return inputs.permute(0, 3, 1, 2) if self._channels_last else inputs


@dataclass(frozen=True)
class EvalData:
    """One set.

    Attributes:
        candidates: the classes that the model chooses among.
        pairwise: it chooses only between a picture's own label and its attack label.
        queries: what its pictures are ranked for, if they are; ``asked``: names of its captions.
        folds: of a train set: of each candidate the fold that it is in; -1: of none.
        fold: it is measured by weights tuned without this fold; the sets of all folds have one name.
    """

    name: str
    rows: Rows
    candidates: tuple[int, ...]
    pairwise: bool = False
    queries: Queries | None = None
    asked: tuple[str, ...] = ()
    folds: tuple[int, ...] = ()
    fold: int | None = None


@dataclass(frozen=True)
class PreparedSet:
    """Everything that the trials of a sweep share.

    Attributes:
        model_digest, data_digest: of the weights, and of the pictures and how they are split and attacked.
        templates: the prompt, or the name of ready ones, that each class uses; "" is ``model.prompt``.
        left_out: key and reason of each picture that could not be decoded.
        train: the sets of ``train/`` by name; their rows are counted through in this order.
        evaluation: the sets of ``validation/`` and ``test/``.
    """

    task: str
    digest: str
    model_digest: str
    data_digest: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    train: Mapping[str, EvalData]
    evaluation: tuple[EvalData, ...]

    @cached_property
    def train_inputs(self) -> Inputs:
        """What the policy takes of all train rows."""
        return Inputs([data.rows for data in self.train.values()])

    def evaluation_of(self, split: str) -> list[EvalData]:
        return [s for s in self.evaluation if s.name.startswith(f"{split}/")]

    @property
    def folds(self) -> int:
        """How many folds trials are cross-validated with; 0: they are not."""
        return 1 + max((fold for data in self.train.values() for fold in data.folds), default=-1)

    def pairs(self, kind: str = "", without: int | None = None) -> PairTable:
        """The preference pairs of a kind; '': the task's first.

        Args:
            without: a fold whose pictures and captions are in none of them.

        Raises:
            ConfigError: the task has no such pairs.
        """
        task, first, rows = task_named(self.task), 0, {}
        for name, data in self.train.items():
            known = (data.rows.labels.numpy(), data.rows.attack_labels.numpy(), data.rows.groups.numpy())
            rows[name] = TrainRows(first, *known, data.candidates)
            if without is not None:
                rows[name] = rows[name].without(without, data.folds)
            first += len(data.rows)
        kind = kind or task.pair_kinds[0]
        if kind not in task.pair_kinds:
            raise ConfigError(f"pairs are {kind!r}; they must be one of: {', '.join(task.pair_kinds)}")
        return task.pairs(kind, rows)

    def templates_per_class(self, prompt: str) -> list[tuple[str, ...]]:
        """The templates of each class, which are those of ``prompt`` where the class has none of its own.

        Raises:
            ConfigError: a prompt that is none.
        """
        resolved = {name: templates_of(name or prompt) for name in set(self.templates)}
        return [resolved[name] for name in self.templates]


def open_prepared(folder: Path) -> PreparedSet:
    """Opens a finished prepared set on this machine.

    Raises:
        DataError: the folder has no manifest, or lacks some of its files.
    """
    if not is_whole(folder):
        raise DataError(f"{folder} is no whole prepared set; prepare it again")
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    rows = {name: Rows(folder, described) for name, described in manifest["sets"].items()}
    sets = {}
    for name, described in manifest["sets"].items():
        folds, fold = tuple(described.get("folds", ())), described.get("fold")
        data = EvalData(
            joined_name(name, fold), rows[name], tuple(described["candidates"]), described["pairwise"],
            folds=folds, fold=fold,
        )  # fmt: skip
        if found := described.get("queries"):
            queries = Queries(
                tuple(found["captions"]), found["k"], tuple(found["groups"]), tuple(found["majority"])
            )
            asked = tuple(manifest["classes"][c] for c in queries.captions)
            data = replace(data, queries=queries, asked=asked)
        sets[name] = data
    return PreparedSet(
        task=manifest["task"],
        digest=manifest["digest"],
        model_digest=manifest["model_digest"],
        data_digest=manifest["data_digest"],
        classes=tuple(manifest["classes"]),
        templates=tuple(manifest["templates"]),
        left_out=tuple((entry["key"], entry["reason"]) for entry in manifest["left_out"]),
        train={name: data for name, data in sets.items() if name.startswith("train/")},
        evaluation=tuple(data for name, data in sets.items() if not name.startswith("train/")),
    )


def _mapped_batches(path: Path) -> list[pa.RecordBatch]:
    with pa.memory_map(
        str(path)
    ) as mapped:  # the map outlives the open file, as long as arrays point into it
        reader = pa.ipc.open_file(mapped)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _bytes_of(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    return np.frombuffer(column.buffers()[1], np.uint8).reshape(len(column), column.type.byte_width)
