"""Measures any open_clip model on any pictures, without a sweep.

B batch, C classes, D embedding
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clippo.config import DataConfig
from clippo.data.group_sets import GROUP_SETS
from clippo.data.prompts import templates_of
from clippo.data.typographic_sets import TypographicSet
from clippo.errors import ConfigError, DataError
from clippo.evaluate import Counts
from clippo.evaluate.counts import between, count_predictions, is_attacked
from clippo.evaluate.rankings import Ranking, ranked
from clippo.model import ClipModel
from clippo.tasks import TypographicTask
from clippo.tasks.base import Part, Resize, Row
from clippo.tasks.group_parts import MeasuredSet

BATCH = 64


class Pictures(Protocol):
    """What is measured: of a task, what its parts need."""

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def templates(self) -> Sequence[str]: ...

    def rows(self, part: Part, index: int, resize: Resize) -> Iterator[Row]: ...


def evaluate_model(
    clip: ClipModel, spec: str, *, prompt: str, pictures: int, font_size: tuple[float, float], seed: int = 0,
    class_names: str = "", top_k: int = DataConfig().top_k, groups: tuple[str, ...] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Counts], list[str]]:  # fmt: skip
    """Counts of a model on a test set, and what was left out: first the pictures that could not be read,
    then files and rows of a published set that are not taken.

    Args:
        spec: a set as ``data.test_sets`` takes it: published photos with words on them as they are, any
            source, whose pictures are taken clean and with the name of another class written on them, or
            people of several groups, who are ranked for concepts and told apart by concept and by group.
        prompt: as ``model.prompt``.
        pictures: at most this many of a source or of people; published sets are taken whole.
        font_size: of the words that are drawn [share of the picture's shorter side].
        class_names: names of a source's classes, as ``data.class_names``.
        top_k: of the rankings of people [count].
        groups: to be told apart on pictures of people that nobody has labelled.

    Raises:
        ConfigError: an unknown set, prompt or place, fewer people than ``top_k``, or names that the set has
            no use for.
        DataError: no picture could be read, or nobody says the groups of the people.
    """
    data = DataConfig(eval_pictures=pictures, font_size=font_size, split_seed=seed, top_k=top_k)
    measured, parts, unfit = _opened(spec, data, class_names, groups)
    left_out: dict[str, None] = {}  # in their order; people are in several parts
    done, total = count(1), sum(len(part.pictures) for part in parts)
    counts: list[Counts] = []
    for part in parts:
        batches = _batches(measured, part, clip, left_out, lambda: on_progress(next(done), total))
        counts += _counts(clip, measured, part, prompt, batches, left_out)
    if not counts:
        raise DataError(f"{spec} has no picture that can be read; the first is {[*left_out, 'none'][0]}")
    reason = "not listed, of no known pattern, or its word names the object itself"
    return counts, [*left_out, *(f"{name}: {reason}" for name in unfit)]


def _opened(
    spec: str, data: DataConfig, class_names: str, groups: tuple[str, ...]
) -> tuple[Pictures, list[Part], Sequence[str]]:
    """The pictures of a set, the parts that are measured, and what of a published set is in none of them."""
    if spec.partition(":")[0] in GROUP_SETS:
        if class_names:
            raise ConfigError(f"the concepts of {spec} have names; leave out class_names ({class_names})")
        people = MeasuredSet(spec, "set", data, groups)
        return people, list(people.parts.values()), ()
    if groups:
        raise ConfigError(f"{spec} is no set of people; leave out groups ({', '.join(groups)})")
    task = TypographicTask(replace(data, test_sets=(f"set={spec}",)), class_names)
    pictures = task.test_sets["set"].pictures
    unfit = pictures.left_out if isinstance(pictures, TypographicSet) else ()
    return task, [task.parts["test/set"]], unfit


def _counts(
    clip: ClipModel, measured: Pictures, part: Part, prompt: str, batches: Iterator[list[Row]],
    left_out: Mapping[str, None],
) -> list[Counts]:  # fmt: skip
    """What a model makes of each set of a part; nothing where no picture could be read.

    Raises:
        ConfigError: fewer pictures of a group could be read than the top of a ranking has places.
    """
    device = next(clip.model.parameters()).device
    text_CD = torch.stack([
        F.normalize(clip.text_features([t.format(measured.classes[c]) for t in templates]).mean(0), dim=-1)
        for c in part.candidates
        for templates in [templates_of(measured.templates[c] or prompt)]
    ])  # fmt: skip
    sums: Counter[tuple[str, str]] = Counter()
    cosines: list[Tensor] = []
    groups: list[int] = []
    first = part.candidates[0]
    for batch in batches:
        pixels = np.stack([np.asarray(clip.pixels(row.image)) for row in batch])
        with torch.no_grad():
            inputs = clip.normalized(torch.from_numpy(pixels).to(device))
            image_BD = F.normalize(clip.model.encode_image(inputs).float(), dim=-1)  # type: ignore[operator]
        logits_BC = (image_BD @ text_CD.T).cpu()
        cosines.append(logits_BC)
        groups += [row.group for row in batch]
        labels = torch.tensor([row.label - first for row in batch])
        attacks = torch.tensor([row.attack_label - first if row.attack_label >= 0 else -1 for row in batch])
        if part.pairwise:
            logits_BC = between(logits_BC, labels, attacks)
        for name in {row.set_name for row in batch}:
            rows = torch.tensor([row.set_name == name for row in batch])
            found = count_predictions(logits_BC[rows], labels[rows], attacks[rows]).tolist()
            for what, number in zip(("correct", "total", "fooled"), found, strict=True):
                sums[name, what] += number
    if not sums:
        return []
    n_ranked, k = sum(group >= 0 for group in groups), part.queries.k if part.queries else 0
    if n_ranked < k:  # part has k, so some are in left_out
        raise ConfigError(
            f"top_k is {k}, but only {n_ranked} pictures of a group of {part.name} can be read; lower it "
            f"(--top-k), or repair the {len(left_out)} that cannot, the first being {next(iter(left_out))}"
        )
    rankings = _rankings(measured, part, torch.cat(cosines), np.array(groups))
    return [
        Counts(
            eval_set=name.removesuffix("/set"), variant="reference", n_correct=sums[name, "correct"],
            n_total=sums[name, "total"], n_fooled=sums[name, "fooled"] if is_attacked(name) else 0,
            rankings=rankings,
        )
        for name in part.sets if sums[name, "total"]
    ]  # fmt: skip


def _rankings(
    measured: Pictures, part: Part, cosines_NC: Tensor, groups_N: NDArray[Any]
) -> tuple[Ranking, ...]:
    """The pictures of a group, ranked for each query; none where the part has no queries."""
    if part.queries is None:
        return ()
    queries, shown = part.queries, groups_N >= 0
    majority = queries.majority or (None,) * len(queries.captions)
    return tuple(
        ranked(
            cosines_NC[shown, part.candidates.index(caption)].numpy(), groups_N[shown], queries.k,
            query=measured.classes[caption], group_names=queries.groups, majority=usual,
        )
        for caption, usual in zip(queries.captions, majority, strict=True)
    )  # fmt: skip


def _batches(
    measured: Pictures, part: Part, clip: ClipModel, left_out: dict[str, None],
    on_picture: Callable[[], None],
) -> Iterator[list[Row]]:  # fmt: skip
    waiting: list[Row] = []
    for index, picture in enumerate(part.pictures):
        try:
            waiting += list(measured.rows(part, index, clip.pixels))  # all of a picture's rows or none
        except DataError as error:
            left_out[f"{picture.key}: {error}"] = None
        on_picture()
        if len(waiting) >= BATCH or (waiting and index + 1 == len(part.pictures)):
            yield waiting
            waiting = []
