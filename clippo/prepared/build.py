"""Builds a prepared set: pictures, attacked copies, activations at the cut, the reference's embeddings.

A prepared set is named after a digest of all that goes into it, so the same inputs are never prepared twice.
Its pictures are built in shards (``shard.py``), by this process or several (``workers.py``), which are handed
descriptions of shards and give summaries of them. A shard whose summary exists is not built again, so a
preparation that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

import open_clip
import torch

from clippo.config import DataConfig, ModelConfig, digest
from clippo.errors import DataError
from clippo.model import ClipModel, load_clip
from clippo.prepared.location import Location, files_of, remove_stale
from clippo.prepared.shard import Recipe, ShardBuilder, Summary, data_digest_of
from clippo.prepared.workers import built_by_workers
from clippo.tasks import Task, task_named

FORMAT = 3  # of the files and their names; part of the digest
SHARD = 256  # pictures of a part that are built together: what a killed builder repeats

Progress = Callable[[int, int], None]


def prepare(
    task_name: str, data: DataConfig, model: ModelConfig, location: Location, *, workers: int = 1,
    gpus: float = 0.0, verbose: bool = False, on_progress: Progress = lambda done, total: None,
) -> str:  # fmt: skip
    """Builds the prepared set of a task and a model unless it is there; returns its digest.

    Args:
        workers: processes [count]. 1 without a GPU is this one. More are workers of Ray, which is started on
            this machine when this process has not joined a cluster; of a small set this is one of them.
        gpus: of each worker.
        verbose: show the logs of Ray Data.
        on_progress: called with the number of pictures done and the number of all.

    Raises:
        DataError: more pictures than ``data.max_unreadable`` cannot be decoded, or a part has none; or the
            workers have other pictures, or write to another place, than this process.
        StoreError: the location cannot be used.
        ResourceError: a worker died again and again, or the machine lacks the GPUs of one.
    """
    task, clip = task_named(task_name)(data), load_clip(model.name, model.pretrained)
    model_digest, data_digest = weights_digest(clip), data_digest_of(task_name, data, task)
    # The prompt is left out: a changed one must not rebuild the pictures.
    name = digest(FORMAT, model_digest, model.trainable, data_digest)
    recipe = Recipe(task_name, data, model, location, name, model_digest, data_digest, on_gpu=gpus > 0)
    kept = location.read(f"{name}/manifest.json")
    if kept is not None and _has_files(manifest := json.loads(kept), recipe):
        _refuse_many_left_out(manifest, recipe)
        return name
    remove_stale(location.cache / name)
    manifest = _manifest(recipe, task, _build(recipe, task, clip, workers, gpus, verbose, on_progress))
    _refuse_many_left_out(manifest, recipe)
    if not _has_files(manifest, recipe):
        raise DataError(
            f"the workers wrote to another {location} than this process reads; "
            "use results on object storage, or in a folder that all nodes share"
        )
    location.write(f"{name}/manifest.json", json.dumps(manifest, indent=1).encode())
    return name


def weights_digest(clip: ClipModel) -> str:
    """A digest of a model: its weights byte by byte, its architecture, and how it takes pictures.

    A name and a tag can come to mean other weights, and the same weights be loaded into another architecture.
    """
    hashed = hashlib.sha256()
    for name, weights in sorted(clip.model.state_dict().items()):
        hashed.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        hashed.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    architecture = [clip.name, *(type(m).__name__ for m in clip.model.modules())]
    taken = {k: str(v) for k, v in open_clip.get_model_preprocess_cfg(clip.model).items()}
    return digest(architecture, taken, hashed.hexdigest())


# --- the set ----------------------------------------------------------------------------------------------


def _build(
    recipe: Recipe, task: Task, clip: ClipModel, workers: int, gpus: float, verbose: bool,
    on_progress: Progress,
) -> list[Summary]:  # fmt: skip
    """Builds what is missing; returns the summaries of all shards, in the order of their pictures."""
    shards = _shards(recipe, task)
    known = _known(recipe, shards)
    # What could not be decoded may be readable by now, as after a network was down.
    built = [s for s in known.values() if not s["left_out"]]
    done = {s["key"] for s in built}
    todo = [{**s, "known": json.dumps(known.get(s["key"]))} for s in shards if s["key"] not in done]
    total, ready = sum(s["stop"] - s["start"] for s in shards), sum(s["stop"] - s["start"] for s in built)
    on_progress(ready, total)
    here = ShardBuilder(recipe, task, clip)
    if todo and (gpus or min(workers, len(todo)) > 1):
        summaries = built_by_workers(recipe, todo, here, workers=workers, gpus=gpus, verbose=verbose)
    else:
        summaries = (here.build(shard) for shard in todo)
    with closing(summaries):  # at once, also when this is interrupted
        for summary in summaries:
            built.append(summary)
            ready += summary["stop"] - summary["start"]
            on_progress(ready, total)
    by_key = {s["key"]: s for s in built}
    return [by_key[s["key"]] for s in shards]


def _shards(recipe: Recipe, task: Task) -> list[dict[str, Any]]:
    """``key``, ``part``, ``start`` and ``stop`` of each shard: pictures ``start`` to ``stop`` of a part."""
    shards = []
    for part in task.parts.values():
        n = len(part.pictures)
        if not n:
            raise DataError(
                f"{recipe.data.source} has no pictures for {part.name}; add some or change data.seen_share"
            )
        for start in range(0, n, SHARD):
            key = f"{recipe.digest}/shards/{part.name}/{start:07d}.json"
            shards.append({"key": key, "part": part.name, "start": start, "stop": min(start + SHARD, n)})
    return shards


def _known(recipe: Recipe, shards: list[dict[str, Any]]) -> dict[str, Summary]:
    """The summaries of those shards that were built before and whose files are there."""
    stops, sizes = {s["key"]: s["stop"] for s in shards}, recipe.location.sizes(recipe.digest)
    found = {k: json.loads(v) for k, v in recipe.location.read_below(f"{recipe.digest}/shards").items()}
    return {
        key: summary
        for key, summary in found.items()
        if stops.get(key) == summary["stop"]
        and all(sizes.get(f"{recipe.digest}/{f['file']}") == f["size"] for f in summary["sets"].values())
    }


def _has_files(manifest: dict[str, Any], recipe: Recipe) -> bool:
    sizes = recipe.location.sizes(recipe.digest)
    return all(sizes.get(f"{recipe.digest}/{f['file']}") == f["size"] for f in files_of(manifest))


def _manifest(recipe: Recipe, task: Task, built: list[Summary]) -> dict[str, Any]:
    sets = {}
    for part in task.parts.values():
        for name in part.sets:
            files = [s["sets"][name] for s in built if name in s["sets"]]
            if not files:
                raise DataError(
                    f"none of the {len(part.pictures)} pictures for {name} can be decoded, the first is "
                    f"{_first_left_out(built, part.name)}; mend or replace them"
                )
            kind = {key: files[0][key] for key in ("shape", "dtype", "channels_last")}
            sets[name] = {
                "candidates": list(part.candidates),
                "pairwise": part.pairwise,
                "queries": part.queries and asdict(part.queries),
                "folds": list(part.folds),
                "fold": part.fold,
                **kind,
                "files": [{k: f[k] for k in ("file", "rows", "size", "sha256")} for f in files],
            }
    return {
        "format": FORMAT,
        "digest": recipe.digest,
        "model_digest": recipe.model_digest,
        "data_digest": recipe.data_digest,
        "task": recipe.task_name,
        "trainable": recipe.model.trainable,
        "data": asdict(recipe.data),
        "classes": list(task.classes),
        "templates": list(task.templates),
        "pictures": sum(s["stop"] - s["start"] for s in built),
        "left_out": [entry for s in built for entry in s["left_out"]],
        "sets": sets,
    }


def _first_left_out(built: list[Summary], part: str) -> str:
    entry = next(e for s in built if s["part"] == part for e in s["left_out"])
    return f"{entry['key']} ({entry['reason']})"


def _refuse_many_left_out(manifest: dict[str, Any], recipe: Recipe) -> None:
    left_out, total = manifest["left_out"], manifest["pictures"]
    if len(left_out) <= recipe.data.max_unreadable * total:
        return
    key = f"{recipe.digest}/left_out.json"
    recipe.location.write(key, json.dumps(left_out, indent=1).encode())
    raise DataError(
        f"{len(left_out)} of {total} pictures cannot be decoded (data.max_unreadable allows "
        f"{recipe.data.max_unreadable:.1%}); mend or remove them, the first is {left_out[0]['key']} "
        f"({left_out[0]['reason']}), all are in {recipe.location}/{key}"
    )
