"""Reads a prepared set: memory-mapped inputs, the rest in memory.

B batch, C classes, D embedding, N pictures of a set
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clippo.errors import DataError


class Rows:
    """The pictures of one set.

    Attributes:
        labels: int64 (N,).
        attack_labels: int64 (N,), -1 where no class is written.
        reference: the reference's unit-length embeddings, float32 (N, D).
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        self._dtype: torch.dtype = getattr(torch, shards[0]["dtype"])
        self._shape: tuple[int, ...] = tuple(shards[0]["shape"])
        # A map lives as long as the arrays that point into it.
        batches = [pa.ipc.open_file(pa.memory_map(str(folder / s["file"]))).get_batch(0) for s in shards]
        self._chunks = [_bytes_of(b.column("input")) for b in batches]
        self._starts = np.cumsum([0, *(len(c) for c in self._chunks)])
        table = pa.Table.from_batches(batches)
        self.labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
        self.attack_labels = torch.from_numpy(table["attack_label"].to_numpy().astype(np.int64))
        reference = np.concatenate([_bytes_of(b.column("reference")) for b in batches])
        self.reference = torch.from_numpy(reference).view(torch.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, indices: Sequence[int] | range) -> Tensor:
        """What the policy takes, for some pictures: uint8 pixels or bfloat16 activations."""
        chunk = np.searchsorted(self._starts, indices, side="right") - 1
        rows = np.stack([self._chunks[c][i - self._starts[c]] for c, i in zip(chunk, indices, strict=True)])
        return torch.from_numpy(rows).view(self._dtype).reshape(len(rows), *self._shape)


@dataclass(frozen=True)
class EvalData:
    """One evaluation set: ``candidates`` are the classes that the model chooses among."""

    name: str
    rows: Rows
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class PreparedSet:
    """Everything that the trials of a sweep share.

    Attributes:
        model_digest, data_digest: of the weights, and of the pictures and how they are split and attacked.
        clean: the train pictures; ``attacked`` holds ``copies`` attacked twins of each, in the same order.
        seen: the classes that tuning tells apart.
        evaluation: the sets of ``validation/`` and ``test/``.
    """

    digest: str
    model_digest: str
    data_digest: str
    classes: tuple[str, ...]
    seen: tuple[int, ...]
    copies: int
    clean: Rows
    attacked: Rows
    evaluation: tuple[EvalData, ...]

    def evaluation_of(self, split: str) -> list[EvalData]:
        return [s for s in self.evaluation if s.name.startswith(f"{split}/")]


def open_prepared(folder: Path) -> PreparedSet:
    """Opens a finished prepared set.

    Raises:
        DataError: the folder has no manifest.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise DataError(f"{folder} is no finished prepared set; prepare it again")
    manifest: dict[str, Any] = json.loads(path.read_text())
    rows = {n: Rows(folder, s["shards"]) for n, s in manifest["sets"].items()}
    return PreparedSet(
        digest=manifest["digest"],
        model_digest=manifest["model_digest"],
        data_digest=manifest["data_digest"],
        classes=tuple(manifest["classes"]),
        seen=tuple(manifest["sets"]["train/clean"]["candidates"]),
        copies=manifest["data"]["attacked_copies"],
        clean=rows["train/clean"],
        attacked=rows["train/attacked"],
        evaluation=tuple(
            EvalData(n, rows[n], tuple(s["candidates"]))
            for n, s in manifest["sets"].items()
            if not n.startswith("train/")
        ),
    )


def _bytes_of(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    return np.frombuffer(column.buffers()[1], np.uint8).reshape(len(column), column.type.byte_width)
