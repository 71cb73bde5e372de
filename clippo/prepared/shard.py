"""Builds one shard of a prepared set: some pictures of one part, streamed into an Arrow file per set.

B batch, D embedding, H height, W width
"""

from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clippo.config import DataConfig, ModelConfig, digest
from clippo.errors import ClippoError, DataError
from clippo.model import ClipModel, load_clip, policy_of
from clippo.prepared.location import Location, move_into_place, sha256_of
from clippo.tasks import Task, task_named
from clippo.tasks.base import Part, Row

BATCH = 64  # rows that are computed and written together: what bounds the memory of a builder

Summary = dict[str, Any]
"""What a shard became: ``key``, ``part``, ``start``, ``stop``, ``left_out``, and a description per set."""

Compute = Callable[[np.ndarray], tuple[Tensor, Tensor]]
"""Pixels (B, H, W, 3) to what is stored of them, and to the reference's embeddings (B, D)."""


@dataclass(frozen=True)
class Recipe:
    """All that a process must know to build shards of a set; ``digest`` names the set."""

    task_name: str
    data: DataConfig
    model: ModelConfig
    location: Location
    digest: str
    model_digest: str
    data_digest: str
    on_gpu: bool


class ShardBuilder:
    """Builds shards one after the other, in a process that keeps the model and the list of pictures.

    Args:
        task, clip: what the process has already; None loads them with the first shard.
    """

    def __init__(self, recipe: Recipe, task: Task | None = None, clip: ClipModel | None = None) -> None:
        self._recipe, self._opened = recipe, (task, clip)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """What a worker calls; an error for the user comes back as a value, as Ray would change its type."""
        try:
            return {"summary": json.dumps(self.build(shard)), "error": b""}
        except ClippoError as error:
            return {"summary": "", "error": pickle.dumps(error)}

    def build(self, shard: dict[str, Any]) -> Summary:
        """Writes the files of a shard and then its summary, unless nothing changed since it was ``known``.

        Raises:
            DataError: this process does not have the pictures that the set is named after.
            StoreError: the files cannot be written.
        """
        part = self._task.parts[shard["part"]]
        known: Summary | None = json.loads(shard["known"])
        if known and not any(self._is_readable(part, entry["index"]) for entry in known["left_out"]):
            return known
        left_out: list[dict[str, Any]] = []
        location, set_folder = self._recipe.location, self._recipe.location.cache / self._recipe.digest
        with ExitStack() as stack:
            files: dict[str, SetFile] = {}
            for index in range(shard["start"], shard["stop"]):
                try:
                    rows = self._rows(part, index)
                except DataError as error:
                    left_out.append({"index": index, "key": part.pictures[index].key, "reason": str(error)})
                    continue
                for row, pixels in rows:
                    if row.set_name not in files:
                        path = set_folder / "sets" / row.set_name / f"{shard['start']:07d}"
                        files[row.set_name] = stack.enter_context(SetFile(path, location, self._compute))
                    files[row.set_name].add(row, pixels)
            written = {name: file.finish() for name, file in files.items()}
        for described in written.values():
            described["file"] = str(described["file"].relative_to(set_folder))
            location.publish(f"{self._recipe.digest}/{described['file']}")
        summary = {k: shard[k] for k in ("key", "part", "start", "stop")}
        summary |= {"left_out": left_out, "sets": written}
        location.write(shard["key"], json.dumps(summary, indent=1).encode())
        return summary

    @cached_property
    def _task(self) -> Task:
        if self._opened[0] is not None:
            return self._opened[0]
        task = task_named(self._recipe.task_name)(self._recipe.data)
        if data_digest_of(self._recipe.task_name, self._recipe.data, task) != self._recipe.data_digest:
            raise DataError(
                f"the pictures of {self._recipe.data.source}, or the fonts, are not the same on every node; "
                "use object storage or a shared folder, or copy them with their times (rsync -a)"
            )
        return task

    @cached_property
    def _clip(self) -> ClipModel:
        torch.set_num_threads(1)  # workers share the machine
        return self._opened[1] or load_clip(self._recipe.model.name, self._recipe.model.pretrained)

    @cached_property
    def _compute(self) -> Compute:
        device = torch.device("cuda" if self._recipe.on_gpu and torch.cuda.is_available() else "cpu")
        policy = policy_of(self._clip, self._recipe.model.trainable).to(device).eval()
        self._clip.model.visual.to(device)  # a trained transform leaves the tower where it is

        @torch.no_grad()
        def compute(pixels_BHWC: np.ndarray) -> tuple[Tensor, Tensor]:
            stored = policy.frozen(torch.from_numpy(pixels_BHWC).to(device))
            return stored.cpu(), policy.embed(stored).float().cpu()

        return compute

    def _rows(self, part: Part, index: int) -> list[tuple[Row, np.ndarray]]:
        """All rows of a picture with their pixels (H, W, 3), or none if something of it cannot be decoded."""
        rows = self._task.rows(part, index, self._clip.pixels)
        return [(row, np.asarray(self._clip.pixels(row.image))) for row in rows]

    def _is_readable(self, part: Part, index: int) -> bool:
        try:
            self._rows(part, index)
        except DataError:
            return False
        return True


class SetFile:
    """The rows of one set and shard, streamed into an Arrow IPC file in record batches of ``BATCH`` rows.

    What cannot be written is a StoreError.

    Args:
        path: what the file's name begins with; a part of its digest follows, since two processes that build
            the same shard on different hardware may differ in the last bits.
    """

    def __init__(self, path: Path, location: Location, compute: Compute) -> None:
        self._path, self._location, self._compute = path, location, compute
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        with location.reporting("write to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._waiting: list[tuple[Row, np.ndarray]] = []
        self._kind: dict[str, Any] = {}
        self._n_rows = 0

    def __enter__(self) -> SetFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._sink.close()
        with suppress(OSError):  # it has its name by now; or nothing can be written, and that is said
            self._temporary.unlink()

    def add(self, row: Row, pixels: np.ndarray) -> None:
        self._waiting.append((row, pixels))
        if len(self._waiting) == BATCH:
            self._write_batch()

    def finish(self) -> dict[str, Any]:
        """Closes the file and gives it its name.

        Returns:
            ``file``, ``rows``, ``size``, ``sha256``, and of an input ``shape``, ``dtype``, ``channels_last``.
        """
        if self._waiting:
            self._write_batch()
        assert self._writer is not None
        with self._location.reporting("write to"):
            self._writer.close()
            self._sink.close()
            sha256 = sha256_of(self._temporary)
            path = self._path.with_name(f"{self._path.name}-{sha256[:8]}.arrow")
            move_into_place(self._temporary, path)
            size = path.stat().st_size
        return {"file": path, "rows": self._n_rows, "size": size, "sha256": sha256, **self._kind}

    def _write_batch(self) -> None:
        rows = [row for row, _ in self._waiting]
        stored, reference_BD = self._compute(np.stack([pixels for _, pixels in self._waiting]))
        self._waiting = []
        # Convolutions want their activations this way round; torch keeps the order through a permutation.
        channels_last = stored.ndim == 4 and stored.is_floating_point()
        self._kind = {
            "shape": list(stored.shape[1:]),
            "dtype": str(stored.dtype).removeprefix("torch."),
            "channels_last": channels_last,
        }
        record = pa.record_batch({
            "label": pa.array([row.label for row in rows], pa.int32()),
            "attack_label": pa.array([row.attack_label for row in rows], pa.int32()),
            "group": pa.array([row.group for row in rows], pa.int32()),
            "input": _fixed_size(stored.permute(0, 2, 3, 1) if channels_last else stored),
            "reference": _fixed_size(reference_BD),
        })  # fmt: skip
        with self._location.reporting("write to"):
            if self._writer is None:
                self._writer = pa.ipc.new_file(self._sink, record.schema)
            self._writer.write_batch(record)
        self._n_rows += len(rows)


def data_digest_of(task_name: str, data: DataConfig, task: Task) -> str:
    """A digest of the pictures and of what is done with them."""
    # A file of class names or a font may change while its path does not. How many broken pictures are
    # tolerated changes nothing in the set.
    files = [_content(f) for f in task.files]
    asked = asdict(replace(data, max_unreadable=0))
    if not data.mirrored_words:  # as before there were any, or no earlier sweep would go on
        del asked["mirrored_words"]
    return digest(task_name, asked, task.fingerprint, task.classes, files)


def _content(file: str) -> str:
    path = Path(file).expanduser()
    return sha256_of(path) if path.is_file() else file  # what is bundled goes by name


def _fixed_size(values: Tensor) -> pa.Array:
    data = values.contiguous().view(len(values), -1).view(torch.uint8).numpy()
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(data.shape[1]), len(data), [None, pa.py_buffer(data)]
    )
