"""Measures any open_clip model on any pictures, without a sweep.

B batch, C classes, D embedding
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from clippo.config import DataConfig
from clippo.data.prompts import templates_of
from clippo.errors import DataError
from clippo.evaluate import Counts
from clippo.evaluate.counts import between, count_predictions, is_attacked
from clippo.model import ClipModel
from clippo.tasks import TypographicTask
from clippo.tasks.base import Part, Row

BATCH = 64


def evaluate_model(
    clip: ClipModel, spec: str, *, prompt: str, pictures: int, font_size: tuple[float, float], seed: int = 0,
    class_names: str = "", on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Counts], list[str]]:  # fmt: skip
    """Counts of a model on a test set, and the pictures that could not be read.

    Args:
        spec: a set as ``data.test_sets`` takes it: published photos with words on them as they are, or any
            source, whose pictures are taken clean and with the name of another class written on them.
        prompt: as ``model.prompt``.
        pictures: at most this many of a source; published sets are taken whole.
        font_size: of the words that are drawn [share of the picture's shorter side].
        class_names: names of a source's classes, as ``data.class_names``.

    Raises:
        ConfigError: an unknown set, prompt or place.
        DataError: no picture could be read.
    """
    data = DataConfig(
        test_sets=(f"set={spec}",), eval_pictures=pictures, font_size=font_size, split_seed=seed
    )
    task = TypographicTask(data, class_names)
    part = task.parts["test/set"]
    device = next(clip.model.parameters()).device
    templates = templates_of(task.templates[part.candidates[0]] or prompt)
    text_CD = torch.stack([
        F.normalize(clip.text_features([t.format(task.classes[c]) for t in templates]).mean(0), dim=-1)
        for c in part.candidates
    ])  # fmt: skip
    sums: Counter[tuple[str, str]] = Counter()
    left_out: list[str] = []
    first = part.candidates[0]
    for batch in _batches(task, part, clip, left_out, on_progress):
        pixels = np.stack([np.asarray(clip.pixels(row.image)) for row in batch])
        with torch.no_grad():
            inputs = clip.normalized(torch.from_numpy(pixels).to(device))
            image_BD = F.normalize(clip.model.encode_image(inputs).float(), dim=-1)  # type: ignore[operator]
        logits_BC = (image_BD @ text_CD.T).cpu()
        labels = torch.tensor([row.label - first for row in batch])
        attacks = torch.tensor([row.attack_label - first if row.attack_label >= 0 else -1 for row in batch])
        if part.pairwise:
            logits_BC = between(logits_BC, labels, attacks)
        for name in {row.set_name for row in batch}:
            rows = torch.tensor([row.set_name == name for row in batch])
            found = count_predictions(logits_BC[rows], labels[rows], attacks[rows]).tolist()
            for what, count in zip(("correct", "total", "fooled"), found, strict=True):
                sums[name, what] += count
    if not sums:
        raise DataError(f"{spec} has no picture that can be read; the first is {(left_out or ['none'])[0]}")
    return [
        Counts(
            eval_set=name.removesuffix("/set"), variant="reference", n_correct=sums[name, "correct"],
            n_total=sums[name, "total"], n_fooled=sums[name, "fooled"] if is_attacked(name) else 0,
        )
        for name in part.sets
    ], left_out  # fmt: skip


def _batches(
    task: TypographicTask, part: Part, clip: ClipModel, left_out: list[str],
    on_progress: Callable[[int, int], None],
) -> Iterator[list[Row]]:  # fmt: skip
    waiting: list[Row] = []
    for index, picture in enumerate(part.pictures):
        try:
            waiting += list(task.rows(part, index, clip.pixels))  # all of a picture's rows or none
        except DataError as error:
            left_out.append(f"{picture.key}: {error}")
        on_progress(index + 1, len(part.pictures))
        if len(waiting) >= BATCH or (waiting and index + 1 == len(part.pictures)):
            yield waiting
            waiting = []
