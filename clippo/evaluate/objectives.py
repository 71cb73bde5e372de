"""An evaluation is a count, or a ranking; the objectives of a sweep follow from them.

Every task has two: its goal, which it names and measures as it likes, and retention, what is left of what the
untouched model could do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from clippo.errors import ConfigError
from clippo.evaluate.rankings import Ranking, mean_skew

COST = "device_s"
RETENTION = "retention"
SHARES = ("accuracy", "attack_success_rate")
MINIMISED = ("attack_success_rate", COST)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model made of one evaluation set.

    Attributes:
        eval_set: for example ``validation/attacked/held_out``.
        variant: which weights: ``reference``, ``last``, ``averaged`` or ``alpha=0.5``.
        n_fooled: pictures predicted as the class whose word is written on them; 0 where none is.
        rankings: of its pictures, one for each query; none where the set is not ranked.
    """

    eval_set: str
    variant: str
    n_correct: int
    n_total: int
    n_fooled: int
    rankings: tuple[Ranking, ...] = ()

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Counts:
        """The inverse of ``dataclasses.asdict``."""
        values = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
        return cls(**values | {"rankings": tuple(Ranking(**r) for r in plain.get("rankings", ()))})

    @property
    def accuracy(self) -> float:
        return self.n_correct / self.n_total

    @property
    def attack_success_rate(self) -> float:
        return self.n_fooled / self.n_total


@dataclass(frozen=True)
class Measure:
    """How a goal is measured.

    Attributes:
        is_maximised: whether more is better.
        gain: its value on a scale where more is better: 1 the best, 0 the worst that there may be. It is what
            fronts and hypervolumes are made of.
        value: the inverse of that.
    """

    is_maximised: bool
    gain: Callable[[Any], Any]
    value: Callable[[Any], Any]


MEASURES = {
    "right": Measure(True, lambda value: value, lambda gain: gain),
    "fooled": Measure(False, lambda value: 1 - value, lambda gain: 1 - gain),
    # The target share of a group over its share in the top: 1 where no group has more than it should.
    "max_skew": Measure(False, lambda value: np.exp(-value), lambda gain: -np.log(np.maximum(gain, 1e-9))),
}
"""``right``: the share of all pictures of the sets that is classified right; ``fooled``: the share that is
read as what is written on it; ``max_skew``: the mean MaxSkew@k over the queries of a set, of the sets the
largest, so that what is gained on one cannot hide what another lacks."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a task tunes towards.

    Attributes:
        name: of the objective.
        measure: one of `MEASURES`.
        sets: the evaluation sets that it is measured on, without their split.
    """

    name: str
    measure: str
    sets: tuple[str, ...]

    @property
    def is_maximised(self) -> bool:
        return MEASURES[self.measure].is_maximised

    @property
    def is_ranked(self) -> bool:
        """Whether it follows from rankings and not from counts."""
        return self.measure == "max_skew"

    def gain(self, value: Any) -> Any:
        """A value, or an array of them, on the scale where 1 is best: `Measure.gain`."""
        return MEASURES[self.measure].gain(value)

    def value(self, gain: Any) -> Any:
        """The inverse of `gain`."""
        return MEASURES[self.measure].value(gain)

    def of(self, counts: Iterable[Counts]) -> float:
        """Its value from what was made of its sets."""
        counts = list(counts)
        if self.is_ranked:
            return max(mean_skew(c.rankings) for c in counts)
        name = "n_correct" if self.measure == "right" else "n_fooled"
        return float(sum(getattr(c, name) for c in counts) / sum(c.n_total for c in counts))


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """The goal of a task and the sets whose accuracy is to be kept.

    Attributes:
        reported: sets of test pictures that steer nothing, but are measured on whole curves as well.
    """

    goal: Goal
    retention_sets: tuple[str, ...]
    reported: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Objectives:
        """Those of a sweep's stored configuration."""
        if (kept := config.get("objectives")) is None:  # before schema version 3 there was one task
            goal = Goal(name="robustness", measure="right", sets=tuple(config["robustness_sets"]))
            return cls(goal=goal, retention_sets=tuple(config["retention_sets"]))
        goal = Goal(**kept["goal"] | {"sets": tuple(kept["goal"]["sets"])})
        reported = tuple(kept.get("reported", ()))
        return cls(goal=goal, retention_sets=tuple(kept["retention_sets"]), reported=reported)

    def to_json(self) -> dict[str, Any]:
        """What `of` reads."""
        return asdict(self)

    @property
    def names(self) -> tuple[str, str]:
        return self.goal.name, RETENTION

    @property
    def sets(self) -> tuple[str, ...]:
        """All sets that they need, without their split."""
        return tuple(dict.fromkeys((*self.goal.sets, *self.retention_sets)))

    @property
    def curve_sets(self) -> tuple[str, ...]:
        """The sets that curves are measured on."""
        return tuple(dict.fromkeys((*self.sets, *self.reported)))

    def is_maximised(self, name: str) -> bool:
        """Whether more of any objective of a search is better.

        >>> objectives = Objectives(goal=Goal(name="skew", measure="max_skew", sets=()), retention_sets=())
        >>> [objectives.is_maximised(n) for n in ("skew", "retention", "accuracy:reading/seen", "device_s")]
        [False, True, True, False]
        """
        return self.goal.is_maximised if name == self.goal.name else is_maximised(name)

    def directions(self, names: Iterable[str]) -> list[Literal["maximize", "minimize"]]:
        """The same in Optuna's words."""
        return ["maximize" if self.is_maximised(name) else "minimize" for name in names]

    def values(
        self, policy: Iterable[Counts], reference: Iterable[Counts], *, split: str
    ) -> dict[str, float]:
        """The goal and ``retention`` of one variant on one split.

        Retention is the mean over its sets of policy accuracy / reference accuracy, each ratio capped at 1,
        so that gains on one set cannot hide a loss on another.

        Args:
            policy: counts of one variant; sets of other splits are ignored.
            reference: the untouched model's counts on the same sets.

        Raises:
            ConfigError: a set is missing or not ranked, or the reference has nothing right in a retention
                set.
        """
        mine, theirs = ({c.eval_set: c for c in counts} for counts in (policy, reference))
        measured = [_find(mine, split, name) for name in self.goal.sets]
        if self.goal.is_ranked:
            for found in measured:
                if not found.rankings:
                    raise ConfigError(
                        f"no pictures of {found.eval_set!r} are ranked; leave it out of goal_sets"
                    )
        ratios = []
        for name in self.retention_sets:
            before = _find(theirs, split, name)
            if before.n_correct == 0:
                raise ConfigError(
                    f"the untouched model has nothing right in {name!r}; leave it out of retention_sets"
                )
            after = _find(mine, split, name)
            ratios.append(min(1.0, after.accuracy / before.accuracy))
        return {self.goal.name: self.goal.of(measured), RETENTION: sum(ratios) / len(ratios)}

    def place(self, numbers: Mapping[str, float]) -> tuple[float, float]:
        """Where numbers lie in the square of gains: goal and retention, 1 is best."""
        return float(self.goal.gain(numbers[self.goal.name])), numbers[RETENTION]


def is_maximised(objective: str) -> bool:
    """Whether more of an objective that is no task's own is better.

    >>> is_maximised("accuracy:reading/held_out"), is_maximised("device_s")
    (True, False)
    """
    return objective.partition(":")[0] not in MINIMISED


def share_of(objective: str, counts: Iterable[Counts], *, split: str, names: Iterable[str] = ()) -> float:
    """``accuracy:SET`` or ``attack_success_rate:SET`` of one variant on one split.

    Args:
        names: of the task's own objectives, for who asks for another.

    Raises:
        ConfigError: no such objective or no such set.
    """
    share, colon, name = objective.partition(":")
    if share not in SHARES or not colon:
        known = (*names, COST, *(f"{s}:SET" for s in SHARES))
        raise ConfigError(f"search.objectives has {objective!r}; it must be one of: {', '.join(known)}")
    found = _find({c.eval_set: c for c in counts}, split, name)
    return found.accuracy if share == "accuracy" else found.attack_success_rate


def _find(table: dict[str, Counts], split: str, name: str) -> Counts:
    if f"{split}/{name}" not in table:
        raise ConfigError(f"there is no evaluation set {name!r}; the sets are: {', '.join(sorted(table))}")
    return table[f"{split}/{name}"]
