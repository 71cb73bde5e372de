"""The kinds of preference pairs of pictures that show a group, with captions of concepts and groups.

N train rows
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clippo.tasks.base import TrainRows

MATCHINGS = 2  # of each minority picture with a majority picture of its concept
SEED = 5  # of those matchings


def told(group: int, majority: int) -> int:
    """What pairs need to know of a train row: twice its group, and one more where that is the majority.

    >>> told(2, majority=2), told(2, majority=0)
    (5, 4)
    """
    return 2 * group + (group == majority)


Cell = tuple[int, int, int, int]
"""Chosen picture and caption, rejected picture and caption."""


@dataclass(frozen=True)
class Columns:
    """Train rows with the columns of their captions: seen concepts, groups, each group with each concept."""

    picture_N: Sequence[int]
    concept_N: Sequence[int]
    group_N: Sequence[int]
    usual_N: Sequence[bool]
    n_concepts: int
    n_groups: int

    @classmethod
    def of(cls, rows: TrainRows) -> Columns:
        group_N, usual_N = np.divmod(rows.groups_N, 2)
        first_group = int(rows.attack_labels_N[0] - group_N[0])  # a class; concepts come before
        concepts = [c for c in rows.candidates if c < first_group]
        column = {c: i for i, c in enumerate(concepts)}
        return cls(
            picture_N=rows.numbers.tolist(),
            concept_N=[column[c] for c in rows.labels_N.tolist()],
            group_N=group_N.tolist(),
            usual_N=(usual_N == 1).tolist(),
            n_concepts=len(concepts),
            n_groups=(len(rows.candidates) + 1) // (len(concepts) + 1) - 1,
        )

    @property
    def with_concept(self) -> list[int]:
        """The columns of the captions of concepts, alone and with a group."""
        at_work = self._at_work(0, 0)
        return [*range(self.n_concepts), *range(at_work, at_work + self.n_groups * self.n_concepts)]

    def correct(self) -> Iterator[Cell]:
        for picture, c, shown in zip(self.picture_N, self.concept_N, self.group_N, strict=True):
            for other in set(range(self.n_groups)) - {shown}:
                for own, wrong in (
                    (self._group(shown), self._group(other)),
                    (self._at_work(shown, c), self._at_work(other, c)),
                ):
                    yield picture, own, picture, wrong

    def reverse(self) -> Iterator[Cell]:
        for picture, own, _, wrong in self.correct():
            yield picture, wrong, picture, own

    def counter(self) -> Iterator[Cell]:
        for picture, shown, usual in zip(self.picture_N, self.group_N, self.usual_N, strict=True):
            for other in set(range(self.n_groups)) - {shown} if usual else ():
                yield picture, self._group(other), picture, self._group(shown)

    def image(self) -> Iterator[Cell]:
        sides: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for picture, c, usual in zip(self.picture_N, self.concept_N, self.usual_N, strict=True):
            sides[c, usual].append(picture)
        rng = np.random.default_rng(SEED)
        for c in range(self.n_concepts):
            minority, majority = sides[c, False], sides[c, True]
            for _ in range(MATCHINGS if majority else 0):
                drawn = rng.permutation(majority).tolist()
                yield from ((p, c, drawn[i % len(drawn)], c) for i, p in enumerate(minority))

    def _group(self, g: int) -> int:
        return self.n_concepts + g

    def _at_work(self, g: int, c: int) -> int:
        return self.n_concepts + self.n_groups + g * self.n_concepts + c
