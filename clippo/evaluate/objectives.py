"""An evaluation is a count; the objectives of a sweep, robustness and retention, follow from counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clippo.errors import ConfigError

COST = "device_s"
SHARES = ("accuracy", "attack_success_rate")
MINIMISED = ("attack_success_rate", COST)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model made of one evaluation set.

    Attributes:
        eval_set: for example ``validation/attacked/held_out``.
        variant: which weights: ``reference``, ``last``, ``averaged`` or ``alpha=0.5``.
        n_fooled: pictures predicted as the class whose word is written on them; 0 where none is.
    """

    eval_set: str
    variant: str
    n_correct: int
    n_total: int
    n_fooled: int

    @property
    def accuracy(self) -> float:
        return self.n_correct / self.n_total

    @property
    def attack_success_rate(self) -> float:
        return self.n_fooled / self.n_total


def objectives(
    policy: Iterable[Counts], reference: Iterable[Counts], *, split: str,
    robustness_sets: Sequence[str], retention_sets: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """``robustness`` and ``retention`` of one variant on one split; both are maximised.

    Robustness is the share correct over all pictures of the attacked sets. Retention is the mean over the
    retention sets of policy accuracy / reference accuracy, each ratio capped at 1, so that gains on one set
    cannot hide a loss on another.

    Args:
        policy: counts of one variant; sets of other splits are ignored.
        reference: the untouched model's counts on the same sets.

    Raises:
        ConfigError: a set is missing, or the reference has nothing right in a retention set.
    """
    mine, theirs = ({c.eval_set: c for c in counts} for counts in (policy, reference))
    attacked = [_find(mine, split, name) for name in robustness_sets]
    ratios = []
    for name in retention_sets:
        before = _find(theirs, split, name)
        if before.n_correct == 0:
            raise ConfigError(
                f"the untouched model has nothing right in {name!r}; leave it out of retention_sets"
            )
        after = _find(mine, split, name)
        ratios.append(min(1.0, after.accuracy / before.accuracy))
    return {
        "robustness": sum(c.n_correct for c in attacked) / sum(c.n_total for c in attacked),
        "retention": sum(ratios) / len(ratios),
    }


def is_maximised(objective: str) -> bool:
    """Whether more of an objective is better.

    >>> is_maximised("accuracy:reading/held_out"), is_maximised("device_s")
    (True, False)
    """
    return objective.partition(":")[0] not in MINIMISED


def share_of(objective: str, counts: Iterable[Counts], *, split: str) -> float:
    """``accuracy:SET`` or ``attack_success_rate:SET`` of one variant on one split.

    Raises:
        ConfigError: no such objective or no such set.
    """
    share, colon, name = objective.partition(":")
    if share not in SHARES or not colon:
        raise ConfigError(
            f"search.objectives has {objective!r}; it must be one of: robustness, retention, {COST}, "
            f"{', '.join(f'{s}:SET' for s in SHARES)}"
        )
    found = _find({c.eval_set: c for c in counts}, split, name)
    return found.accuracy if share == "accuracy" else found.attack_success_rate


def _find(table: dict[str, Counts], split: str, name: str) -> Counts:
    if f"{split}/{name}" not in table:
        raise ConfigError(f"there is no evaluation set {name!r}; the sets are: {', '.join(sorted(table))}")
    return table[f"{split}/{name}"]
