"""Builds a prepared set: pictures, attacked copies, the activations at the cut and the reference's embeddings.

A prepared set is a folder named after a digest of all that went into it, so the same inputs are never
prepared twice. Each set of pictures is one Arrow IPC file, and ``manifest.json`` is written last: a folder
without it is unfinished and is built again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clippo.config import DataConfig, ModelConfig, digest
from clippo.data.datasets import LabelledImage
from clippo.errors import DataError
from clippo.model import ClipModel, Policy
from clippo.tasks import TypographicTask
from clippo.tasks.typographic import EvaluationSet

FORMAT = 1
BATCH = 64
MAX_UNREADABLE = 0.01

Row = tuple[Image.Image, int, int]  # picture, label, attack label


def prepare(
    task: TypographicTask, clip: ClipModel, config: ModelConfig, cache: Path, *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Builds the prepared set of a task and a model below ``cache`` unless it is there; returns its folder.

    Args:
        on_progress: called with the number of pictures done and the number of all.

    Raises:
        DataError: more than 1 % of the train pictures cannot be decoded.
    """
    data: DataConfig = task.config
    # The prompt is left out: text features are cheap, and a changed prompt must not rebuild the pictures.
    model_key = [config.name, config.pretrained, config.trainable, weights_digest(clip)]
    folder = cache / digest(FORMAT, data, model_key, task.source.fingerprint)
    if (folder / "manifest.json").exists():
        return folder
    building = folder.with_suffix(f".{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)

    policy = Policy(clip, config.trainable)
    train = task.train_pictures()
    evaluation = [*task.evaluation_sets("validation"), *task.evaluation_sets("test")]
    total = len(train) * (1 + data.attacked_copies) + sum(s.size for s in evaluation)
    done = 0

    def count(rows: Iterable[Row]) -> Iterator[Row]:
        nonlocal done
        for row in rows:
            yield row
            done += 1
            if done % BATCH == 0:
                on_progress(done, total)

    clean, left_out = _decoded(train, clip, len(train))
    kept = [picture for picture, _ in clean]
    sets = {
        "train/clean": (count((image, p.label, -1) for p, image in clean), task.seen),
        "train/attacked": (
            count((pair.attacked, pair.label, pair.attack_label) for p, image in clean for pair in task.pairs(image, p)),
            task.seen,
        ),
        **{s.name: (count(s.pictures(clip.pixels)), s.candidates) for s in evaluation},
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "digest": folder.name,
        "model": model_key,
        "data": task.source.fingerprint,
        "classes": list(task.classes),
        "attacked_copies": data.attacked_copies,
        "left_out": left_out,
        "sets": {},
    }
    for name, (rows, candidates) in sets.items():
        path = building / f"{name.replace('/', '-')}.arrow"
        shape, dtype, size = _write(path, rows, clip, policy)
        manifest["sets"][name] = {
            "file": path.name, "size": size, "shape": shape, "dtype": dtype, "candidates": list(candidates),
        }  # fmt: skip
    manifest["train_keys"] = [p.key for p in kept]
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
    on_progress(total, total)
    try:
        building.rename(folder)
    except OSError:  # another process was first; its set is the same
        if not (folder / "manifest.json").exists():
            raise
        shutil.rmtree(building)
    return folder


def weights_digest(clip: ClipModel) -> str:
    """A digest of the model's weights, since a name and a tag can come to mean other weights."""
    sums = [f"{n}:{w.double().sum().item():.6e}:{w.double().abs().sum().item():.6e}" for n, w in clip.model.state_dict().items()]
    return digest(sums)


def _decoded(
    pictures: list[LabelledImage], clip: ClipModel, total: int
) -> tuple[list[tuple[LabelledImage, Image.Image]], list[str]]:
    """Pictures as the model takes them, and the keys of those that cannot be decoded."""
    good, bad = [], []
    for picture in pictures:
        try:
            good.append((picture, clip.pixels(picture.load())))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            bad.append(f"{picture.key}: {type(error).__name__}")
    if len(bad) > MAX_UNREADABLE * total:
        raise DataError(
            f"{len(bad)} of {total} train pictures cannot be decoded (at most {MAX_UNREADABLE:.0%} may be left out); "
            f"mend or remove them, the first is {bad[0]}"
        )
    return good, bad


def _write(path: Path, rows: Iterable[Row], clip: ClipModel, policy: Policy) -> tuple[list[int], str, int]:
    """Writes one set; returns the shape of an input, its dtype and the number of rows."""
    iterator, writer, size, shape, dtype = iter(rows), None, 0, [], ""
    with pa.OSFile(str(path), "wb") as sink:
        while batch := list(islice(iterator, BATCH)):
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _, _ in batch]))
            inputs, embeddings = _frozen_part(pixels, clip, policy)
            shape, dtype = list(inputs.shape[1:]), str(inputs.dtype).removeprefix("torch.")
            columns = {
                "label": pa.array([label for _, label, _ in batch], pa.int32()),
                "attack_label": pa.array([attack for _, _, attack in batch], pa.int32()),
                "input": _fixed_size(inputs),
                "reference": _fixed_size(embeddings),
            }
            record = pa.record_batch(columns)
            writer = writer or pa.ipc.new_file(sink, record.schema)
            writer.write_batch(record)
            size += len(batch)
        if writer is None:
            raise DataError(f"the set {path.stem} has no pictures; add some or lower data.seen_share")
        writer.close()
    return shape, dtype, size


@torch.no_grad()
def _frozen_part(pixels_BHWC: Tensor, clip: ClipModel, policy: Policy) -> tuple[Tensor, Tensor]:
    """What enters the cut, and the reference's embedding; activations are kept as bfloat16."""
    inputs = policy.frozen(pixels_BHWC)
    if inputs.is_floating_point():
        inputs = inputs.bfloat16()
    # The reference goes through the same rounding as the policy, so an untouched policy gives it exactly.
    return inputs, F.normalize(policy(inputs.float() if inputs.is_floating_point() else inputs), dim=-1)


def _fixed_size(values: Tensor) -> pa.Array:
    flat = values.contiguous().view(len(values), -1)
    data = flat.view(torch.uint8) if flat.dtype != torch.uint8 else flat
    width = data.shape[1]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data), [None, pa.py_buffer(data.numpy().tobytes())])
