"""The report's gallery: test pictures, and what the models made of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from clippo.config import SweepConfig
from clippo.errors import DataError
from clippo.front.counts import REFERENCE
from clippo.front.front import PLACES, Front, Point
from clippo.front.points import front_of
from clippo.model import ClipModel, Weights, policy_of
from clippo.prepared import PreparedSet
from clippo.results import ResultStore, View
from clippo.results.checkpoints import StoreCheckpoints, checkpoint_folder, weights_name
from clippo.sweep.rows import SELECTED
from clippo.tasks import Task, task_named
from clippo.tasks.base import Part, Row
from clippo.train.checkpoint import load_policy, weights_of
from clippo.train.shared import Shared, load_shared

PICTURES = 24
QUERIES, FIRST = 4, 8  # rankings of a set that are shown, and pictures of each

Shown = tuple[Part, Row]


def write_examples(config: SweepConfig, store: ResultStore, shared: Shared) -> None:
    """Keeps pictures of the task's gallery with what models say of them, or in the order of their rankings.

    The models are the untouched one (``reference``), the recommended one where that is another, and, where
    pictures are not ranked, the baselines. A sweep without a completed trial has none to show.
    """
    front = front_of(store, config.name)
    task = task_named(config.task)(config.data)
    clip, prepared, frozen = load_shared(shared)
    places = [(part, name) for name in task.gallery for part in task.parts.values() if name in part.sets]
    if places[0][0].queries is not None:
        rows = list(_first_of_rankings(front, config, store, task, clip, prepared, places))
    else:
        shown = list(_in_turn(task, clip, places))
        said = _said(front, config, store, clip, frozen.text_CD, shown)
        rows = list(_rows(task, [row for _, row in shown], said))
    store.write_examples(config.name, rows)


def _said(
    front: Front, config: SweepConfig, store: ResultStore, clip: ClipModel, text_CD: torch.Tensor,
    shown: Sequence[Shown],
) -> dict[str, list[int]]:  # fmt: skip
    """The class that each model sees on each picture."""
    compared = {p.trial_id for p in front.points} & set(config.search.baselines)
    models = {trial_id: (trial_id, SELECTED) for trial_id in sorted(compared)}
    if front.recommended.trial_id != REFERENCE:
        models["recommended"] = (front.recommended.trial_id, front.recommended.variant)
    policy = policy_of(clip, config.model.trainable).eval()
    weights: dict[str, Weights] = {"reference": {n: w.clone() for n, w in policy.trainable_weights().items()}}
    for name, (trial_id, variant) in models.items():
        checkpoints = StoreCheckpoints(store, checkpoint_folder(config.name, trial_id))
        kept = weights_name(store, config.name, trial_id)
        if kept and (saved := load_policy(checkpoints, kept)) is not None:
            weights[name] = weights_of(policy, saved, variant)
    pixels = torch.from_numpy(np.stack([np.asarray(clip.pixels(row.image)) for _, row in shown]))
    stored = policy.frozen(pixels)
    said: dict[str, list[int]] = {}
    for name, tuned in weights.items():
        policy.load_weights(tuned)
        with torch.no_grad():
            image_BD, classes_CD = policy(stored, text_CD)
        said[name] = [
            part.candidates[int((image_D @ classes_CD[list(part.candidates)].T).argmax())]
            for image_D, (part, _) in zip(image_BD, shown, strict=True)
        ]
    return said


def _in_turn(task: Task, clip: ClipModel, places: Sequence[tuple[Part, str]]) -> Iterator[Shown]:
    """Pictures of each set in turn."""
    both = zip_longest(*([(p, name, i) for i in range(len(p.pictures))] for p, name in places))
    left = PICTURES
    for part, set_name, index in (item for pair in both for item in pair if item is not None):
        if left == 0:
            return
        try:
            rows = list(task.rows(part, index, clip.pixels))
        except DataError:  # listed when the set was prepared
            continue
        left -= 1
        yield part, next(row for row in rows if row.set_name == set_name)


def _rows(task: Task, shown: Sequence[Row], said: Mapping[str, list[int]]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(shown):
        yield {
            "picture": _encoded(row.image),
            "label": task.classes[row.label],
            "attack_word": task.classes[row.attack_label] if row.attack_label >= 0 else "",
            "predictions_json": json.dumps({name: task.classes[c[number]] for name, c in said.items()}),
        }


def _first_of_rankings(
    front: Front, config: SweepConfig, store: ResultStore, task: Task, clip: ClipModel,
    prepared: PreparedSet, places: Sequence[tuple[Part, str]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The first pictures of the untouched model's rankings and of the recommended one's.

    Where that is the untouched model, too, the best point of the front takes its place.
    """
    chosen, name = front.recommended, "recommended"
    if chosen.trial_id == REFERENCE:
        chosen = max(front.front, key=front.gain_of)
        name = f"{chosen.trial_id} {chosen.variant}"
    models: dict[str, Point] = {REFERENCE: front.reference} | ({name: chosen} if chosen.settings else {})
    unreadable = {key for key, _ in prepared.left_out}
    for part, set_name in places:
        readable = [i for i, picture in enumerate(part.pictures) if picture.key not in unreadable]
        found: dict[str, dict[int, dict[str, int]]] = {}
        groups: dict[int, str] = {}
        for model, point in models.items():
            where = {"eval_set": [set_name], "variant": [point.variant], "trial_id": [point.trial_id]}
            table = store.rankings(config.name, View(where=where))
            last = pc.equal(table["epoch"], pc.max(table["epoch"]))
            for row in table.filter(last).to_pylist():
                for place, (index, group) in enumerate(
                    zip(row["pictures"][:FIRST], row["groups"], strict=False)
                ):
                    found.setdefault(row["query"], {}).setdefault(index, {})[model] = place
                    groups[index] = row["group_names"][group]
        for query in list(found)[:QUERIES]:
            for index, at in found[query].items():
                rows = task.rows(part, readable[index], clip.pixels)
                yield {
                    "picture": _encoded(next(row for row in rows if row.set_name == set_name).image),
                    "label": query,
                    "attack_word": groups[index],
                    "predictions_json": json.dumps({PLACES: at}),
                }


def _encoded(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=85)
    return sink.getvalue()
