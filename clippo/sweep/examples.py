"""The report's gallery: attacked test pictures, and what the models made of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from PIL import Image

from clippo.config import SweepConfig
from clippo.errors import DataError
from clippo.front.counts import REFERENCE
from clippo.front.points import front_of
from clippo.model import ClipModel, Weights, policy_of
from clippo.results import ResultStore
from clippo.results.checkpoints import StoreCheckpoints, checkpoint_folder
from clippo.sweep.rows import SELECTED
from clippo.tasks import Task, task_named
from clippo.tasks.base import Part, Row
from clippo.train.checkpoint import load_policy, weights_of
from clippo.train.ray_train import Shared, load_shared

PICTURES = 24
PARTS = ("test/seen", "test/held_out")


def write_examples(config: SweepConfig, store: ResultStore, shared: Shared) -> None:
    """Keeps the first attacked test pictures, right and wrong alike, with what each model says of them.

    The models are the untouched one (``reference``), the recommended one where that is another, and the
    baselines. A sweep without a completed trial has none to show.
    """
    front = front_of(store, config.name)
    compared = {p.trial_id for p in front.points} & set(config.search.baselines)
    models = {trial_id: (trial_id, SELECTED) for trial_id in sorted(compared)}
    if front.recommended.trial_id != REFERENCE:
        models["recommended"] = (front.recommended.trial_id, front.recommended.variant)
    clip, _, frozen = load_shared(shared)
    text_CD = frozen.text_CD
    task = task_named(config.task)(config.data)
    policy = policy_of(clip, config.model.trainable).eval()
    weights: dict[str, Weights] = {"reference": {n: w.clone() for n, w in policy.trainable_weights().items()}}
    for name, (trial_id, variant) in models.items():
        saved = load_policy(StoreCheckpoints(store, checkpoint_folder(config.name, trial_id)))
        if saved is not None:
            weights[name] = weights_of(policy, saved, variant)
    shown = [(part, row) for part, row in _attacked(task, clip)]
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
    store.write_examples(config.name, list(_rows(task, [row for _, row in shown], said)))


def _attacked(task: Task, clip: ClipModel) -> Iterator[tuple[Part, Row]]:
    """Pictures of seen and of held-out classes in turn."""
    parts = [task.parts[name] for name in PARTS]
    both = zip_longest(*([(p, i) for i in range(len(p.pictures))] for p in parts))
    left = PICTURES
    for part, index in (item for pair in both for item in pair if item is not None):
        if left == 0:
            return
        try:
            rows = list(task.rows(part, index, clip.pixels))
        except DataError:  # listed when the set was prepared
            continue
        left -= 1
        yield part, next(row for row in rows if "/attacked/" in row.set_name)


def _rows(task: Task, shown: Sequence[Row], said: Mapping[str, list[int]]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(shown):
        yield {
            "picture": _encoded(row.image),
            "label": task.classes[row.label],
            "attack_word": task.classes[row.attack_label],
            "predictions_json": json.dumps({name: task.classes[c[number]] for name, c in said.items()}),
        }


def _encoded(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=85)
    return sink.getvalue()
