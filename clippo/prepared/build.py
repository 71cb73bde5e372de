"""Builds a prepared set: pictures, attacked copies, activations at the cut, the reference's embeddings.

A prepared set is a folder named after a digest of all that went into it, so the same inputs are never
prepared twice. Its pictures are written in shards, one Arrow IPC file per set and shard, by as many processes
as asked for; ``manifest.json`` is written last, and a folder without it is unfinished and built again.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clippo.config import DataConfig, ModelConfig, digest
from clippo.errors import DataError
from clippo.model import ClipModel, Policy, load_clip, policy_of
from clippo.tasks import TASKS, TypographicTask
from clippo.tasks.typographic import Row

FORMAT = 2
BATCH = 64
SHARD = 128  # pictures of a part that are prepared together
UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)


@dataclass(frozen=True)
class _Shard:
    """Pictures ``start`` to ``stop`` of one part, and all that a process needs to prepare them."""

    task_name: str
    data: DataConfig
    model: ModelConfig
    part: str
    start: int
    stop: int
    folder: Path


@dataclass(frozen=True)
class _Written:
    """What a shard became: per set the file, its rows, and the shape and dtype of an input."""

    shard: _Shard
    sets: dict[str, dict[str, Any]]
    left_out: list[str]


def prepare(
    task_name: str, data: DataConfig, model: ModelConfig, cache: Path, *, processes: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Builds the prepared set of a task and a model below ``cache`` unless it is there; returns its folder.

    Args:
        processes: worker processes; 1 builds it in this one.
        on_progress: called with the number of pictures done and the number of all.

    Raises:
        DataError: more pictures than ``data.max_unreadable`` cannot be decoded, or a part has none.
    """
    task = TASKS[task_name](data)
    clip, _ = _model(model)
    # The prompt is left out: text features are cheap, and a changed prompt must not rebuild the pictures.
    model_digest = weights_digest(clip)
    data_digest = digest(task_name, data, task.source.fingerprint)
    folder = cache / digest(FORMAT, model_digest, model.trainable, data_digest)
    if (folder / "manifest.json").exists():
        return folder
    building = folder.with_suffix(f".{uuid.uuid4().hex}")
    building.mkdir(parents=True)

    shards = []
    for part in task.parts.values():
        if not part.pictures:
            raise DataError(
                f"{data.source} has no pictures for {part.name}; add some or change data.seen_share"
            )
        starts = range(0, len(part.pictures), SHARD)
        ends = [min(s + SHARD, len(part.pictures)) for s in starts]
        shards += [
            _Shard(task_name, data, model, part.name, s, e, building)
            for s, e in zip(starts, ends, strict=True)
        ]
    total, done, written = sum(s.stop - s.start for s in shards), 0, []
    with _executor(min(processes, len(shards))) as run:
        for result in run(shards):
            written.append(result)
            done += result.shard.stop - result.shard.start
            on_progress(done, total)
    written.sort(key=lambda w: (w.shard.part, w.shard.start))
    left_out = [key for w in written for key in w.left_out]
    if len(left_out) > data.max_unreadable * total:
        shutil.rmtree(building)
        raise DataError(
            f"{len(left_out)} of {total} pictures cannot be decoded (data.max_unreadable "
            f"allows {data.max_unreadable:.1%}); mend or remove them, the first is {left_out[0]}"
        )
    manifest = {
        "format": FORMAT,
        "digest": folder.name,
        "model_digest": model_digest,
        "data_digest": data_digest,
        "data": asdict(data),
        "classes": list(task.classes),
        "left_out": left_out,
        "sets": {
            name: {
                "candidates": list(part.candidates),
                "shards": [w.sets[name] for w in written if name in w.sets],
            }
            for part in task.parts.values()
            for name in part.sets
        },
    }
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if folder.exists() and not (folder / "manifest.json").exists():
        shutil.rmtree(folder)  # somebody took the manifest away
    try:
        building.rename(folder)
    except OSError:  # another process was first; its set is the same
        if not (folder / "manifest.json").exists():
            raise
        shutil.rmtree(building)
    return folder


@contextmanager
def _executor(processes: int) -> Iterator[Callable[[list[_Shard]], Iterator[_Written]]]:
    """Prepares shards here or in worker processes, in any order."""
    if processes <= 1:
        yield lambda shards: map(_prepare_shard, shards)
        return
    # Forking a process that has started torch's or Arrow's threads can hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield lambda shards: (
            f.result() for f in as_completed([pool.submit(_prepare_shard, s) for s in shards])
        )


# A process prepares many shards of one set, and need not load the model or list the pictures for each.


@lru_cache(maxsize=1)
def _model(model: ModelConfig) -> tuple[ClipModel, Policy]:
    clip = load_clip(model.name, model.pretrained)
    return clip, policy_of(clip, model.trainable)


@lru_cache(maxsize=1)
def _task(task_name: str, data: DataConfig, folder: Path) -> TypographicTask:
    return TASKS[task_name](data)  # by the folder that is built: next time the pictures may be others


def _prepare_shard(shard: _Shard) -> _Written:
    torch.set_num_threads(1)
    clip, policy = _model(shard.model)
    task = _task(shard.task_name, shard.data, shard.folder)
    part = task.parts[shard.part]
    rows: list[Row] = []
    left_out = []
    for index in range(shard.start, shard.stop):
        try:
            rows += list(task.rows(part, index, clip.pixels))
        except UNREADABLE as error:
            left_out.append(f"{part.pictures[index].key}: {type(error).__name__}")
    sets = {}
    for name in part.sets:
        if mine := [row for row in rows if row.set_name == name]:
            path = shard.folder / f"{name.replace('/', '-')}-{shard.start:06d}.arrow"
            sets[name] = _write(path, mine, policy)
    return _Written(shard, sets, left_out)


def weights_digest(clip: ClipModel) -> str:
    """A digest of the model's weights, since a name and a tag can come to mean other weights."""
    sums = [
        f"{n}:{w.double().sum().item():.6e}:{w.double().abs().sum().item():.6e}"
        for n, w in clip.model.state_dict().items()
    ]
    return digest(sums)


def _write(path: Path, rows: list[Row], policy: Policy) -> dict[str, Any]:
    """Writes the rows of one set as one record batch."""
    inputs, embeddings = [], []
    for start in range(0, len(rows), BATCH):
        pixels = np.stack([np.asarray(row.image) for row in rows[start : start + BATCH]])
        entering, embedding = _frozen_part(torch.from_numpy(pixels), policy)
        inputs.append(entering)
        embeddings.append(embedding)
    entering = torch.cat(inputs)
    record = pa.record_batch({
        "label": pa.array([row.label for row in rows], pa.int32()),
        "attack_label": pa.array([row.attack_label for row in rows], pa.int32()),
        "input": _fixed_size(entering),
        "reference": _fixed_size(torch.cat(embeddings)),
    })  # fmt: skip
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, record.schema) as writer:
        writer.write_batch(record)
    dtype = str(entering.dtype).removeprefix("torch.")
    return {"file": path.name, "rows": len(rows), "shape": list(entering.shape[1:]), "dtype": dtype}


@torch.no_grad()
def _frozen_part(pixels_BHWC: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """What enters the cut, and the reference's embedding; activations are kept as bfloat16."""
    entering = policy.frozen(pixels_BHWC)
    return entering, policy.embed(entering)


def _fixed_size(values: Tensor) -> pa.Array:
    data = values.contiguous().view(len(values), -1).view(torch.uint8).numpy()
    buffer = pa.py_buffer(data.tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(data.shape[1]), len(data), [None, buffer])
