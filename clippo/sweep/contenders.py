"""Which points of a trial are worth measuring on test pictures: those that may be on the front.

Test pictures only report, so what will not be reported need not be measured on them. A point that another one
beats on validation pictures stays beaten, whatever the sweep finds later. So the points of the front, at its
end and at any moment before, have all been measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from clippo.evaluate import Counts
from clippo.evaluate.objectives import Objectives
from clippo.front import pareto_mask

Place = tuple[float, float]
"""Goal and retention on validation pictures, as gains."""


@dataclass(frozen=True, kw_only=True)
class Contenders:
    """Picks the variants of a trial that no known point and none of its own beats.

    Attributes:
        reference: counts of the untouched model.
        rivals: known points; None: every variant is picked.
    """

    reference: tuple[Counts, ...]
    objectives: Objectives
    rivals: tuple[Place, ...] | None

    def __call__(self, counts: Sequence[Counts]) -> set[str]:
        """The variants that are worth test pictures, from a trial's counts on validation pictures."""
        own = self._places(counts)
        if self.rivals is None:
            return set(own)
        front = _front((*self.rivals, *own.values()))
        return {variant for variant, place in own.items() if place in front}

    def after(self, counts: Sequence[Counts]) -> Contenders:
        """The same with the points of one more trial among the rivals."""
        if self.rivals is None:
            return self
        return replace(self, rivals=tuple(_front((*self.rivals, *self._places(counts).values()))))

    def _places(self, counts: Sequence[Counts]) -> dict[str, Place]:
        """Where each variant lies."""
        by_variant: dict[str, list[Counts]] = defaultdict(list)
        for c in counts:
            by_variant[c.variant].append(c)
        return {
            variant: self.objectives.place(self.objectives.values(own, self.reference, split="validation"))
            for variant, own in by_variant.items()
        }


def _front(places: Iterable[Place]) -> list[Place]:
    """Those that no other beats, each once."""
    different = sorted(set(places))
    return [p for p, on in zip(different, pareto_mask(different), strict=True) if on]
