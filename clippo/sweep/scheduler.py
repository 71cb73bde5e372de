"""Early stopping for several objectives: who goes on, and a scheduler of Ray Tune that acts on it.

Asynchronous successive halving on non-dominated rank, and a plainer rule: no better, no further.

Shapes: N trials at a rung or on a front, M objectives.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from clippo.config import SearchConfig
from clippo.errors import ConfigError
from clippo.front import pareto_mask
from clippo.train.loop import AGAIN


@dataclass(frozen=True)
class Decision:
    """What a rung made of a trial.

    Attributes:
        stop: whether the trial ends here.
        rung: the epoch of the rung; None between rungs, where the numbers below are 0.
        rank: non-dominated front of the trial among those at the rung; 0 is the best.
        place: its place among them; 0 is the best.
        of: how many were compared, this one included.
    """

    stop: bool
    rung: int | None = None
    rank: int = 0
    place: int = 0
    of: int = 0


class Rule(ABC):
    """Decides which trials go on. It knows nothing of Ray, and the same calls give the same decisions.

    Trials are compared at rungs, which are epochs. Objectives are maximised. A trial whose values are not
    finite is stopped and not recorded.
    """

    def __init__(self) -> None:
        # By rung and trial.
        self._values: dict[int, dict[str, list[float]]] = {}
        self._decisions: dict[int, dict[str, Decision]] = {}

    @abstractmethod
    def is_rung(self, epoch: int) -> bool:
        """Whether trials are compared after this epoch."""

    @abstractmethod
    def _compare(self, trial_id: str, rung: int, values: Sequence[float]) -> Decision:
        """What the rung makes of a trial that has been recorded, unless its values are not finite."""

    def record(self, trial_id: str, epoch: int, values: Sequence[float]) -> None:
        """Lets later trials be compared with one of an earlier run. Between rungs it does nothing."""
        if self.is_rung(epoch) and np.isfinite(values).all():
            self._values.setdefault(epoch, {}).setdefault(trial_id, [float(v) for v in values])

    def decide(self, trial_id: str, epoch: int, values: Sequence[float]) -> Decision:
        """Whether a trial goes on after this epoch; asked again at a rung, it gets the same answer."""
        if not self.is_rung(epoch):
            return Decision(stop=not np.isfinite(values).all())
        decided = self._decisions.setdefault(epoch, {})
        if trial_id not in decided:
            self.record(trial_id, epoch, values)
            decided[trial_id] = self._compare(trial_id, epoch, values)
        return decided[trial_id]

    def passed(self, trial_id: str, epoch: int, values: Sequence[float]) -> Decision:
        """What a rung makes of a trial that went on from it in an earlier run, and goes on here too.

        It is compared with all that is known now; with what it was compared then, nobody remembers.
        """
        decision = replace(self.decide(trial_id, epoch, values), stop=False)
        if decision.rung is not None:
            self._decisions[epoch][trial_id] = decision
        return decision

    def counts(self) -> dict[int, tuple[int, int]]:
        """How many trials each rung has recorded, and how many it has stopped."""
        rungs = sorted(self._values.keys() | self._decisions.keys())
        stopped = {r: sum(d.stop for d in self._decisions.get(r, {}).values()) for r in rungs}
        return {r: (len(self._values.get(r, {})), stopped[r]) for r in rungs}

    def state(self) -> dict[str, Any]:
        """All that was recorded and decided, as plain data (JSON takes it)."""
        return {
            "values": [[r, i, v] for r, by_id in self._values.items() for i, v in by_id.items()],
            "decisions": [[i, asdict(d)] for by_id in self._decisions.values() for i, d in by_id.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state``, in place of what was recorded here."""
        self._values, self._decisions = {}, {}
        for rung, trial_id, values in state["values"]:
            self._values.setdefault(rung, {})[trial_id] = list(values)
        for trial_id, decision in state["decisions"]:
            self._decisions.setdefault(decision["rung"], {})[trial_id] = Decision(**decision)


class NoBetter(Rule):
    """Stops a trial that has come no farther than others with no more epochs, or than itself before.

    Every epoch from ``min_epochs`` on is a rung. A trial goes on if, compared with each of those values, it
    is better by more than ``min_gain`` in one objective at least. Its place is how many came as far as it.

    Args:
        min_epochs: what every trial gets [epochs].
        min_gain: in the units of the objectives.

    Raises:
        ConfigError: if a number is too small.

    >>> rule = NoBetter(min_epochs=2, min_gain=0.01)
    >>> rule.decide("a", 2, [0.5, 0.9]).stop, rule.decide("a", 3, [0.6, 0.9]).stop
    (False, False)
    >>> rule.decide("b", 3, [0.605, 0.9])
    Decision(stop=True, rung=3, rank=1, place=1, of=3)
    """

    def __init__(self, *, min_epochs: int, min_gain: float) -> None:
        super().__init__()
        _at_least(min_epochs=(min_epochs, 1), min_gain=(min_gain, 0))
        self._min_epochs, self._min_gain = min_epochs, min_gain

    def is_rung(self, epoch: int) -> bool:
        return epoch >= self._min_epochs

    def __str__(self) -> str:
        return f"from epoch {self._min_epochs} on, who gained less than {self._min_gain:g} on all others"

    def _compare(self, trial_id: str, rung: int, values: Sequence[float]) -> Decision:
        others = [
            v
            for epoch, by_id in self._values.items()
            for i, v in by_id.items()
            if epoch <= rung and (epoch, i) != (rung, trial_id)
        ]
        if not np.isfinite(values).all():
            return Decision(True, rung, 1, len(others), len(others) + 1)  # behind all others
        least_M = np.asarray(values, dtype=np.float64) - self._min_gain
        as_far = int((np.reshape(others, (-1, len(least_M))) >= least_M).all(axis=1).sum())
        return Decision(as_far > 0, rung, int(as_far > 0), as_far, len(others) + 1)


class Halving(Rule):
    """Asynchronous successive halving: at each rung the best go on, and nobody waits for others there.

    That is ASHA (Li et al., arXiv 1810.05934); who is best is a matter of fronts, and inside a front of
    spread (MO-ASHA, Schmucker et al., arXiv 2106.12639). At a rung where n trials have been recorded, the
    trial that arrives included, it goes on if it is one of the best ceil(n / reduction_factor); while n is
    below ``reduction_factor`` all go on, since there is too little to compare with. Trials are ordered by
    front and, inside a front, by ``epsilon_net``.

    Args:
        min_epochs: the first rung [epochs].
        reduction_factor: each rung is this many times the one before, and about one in so many goes on.
        max_epochs: rungs are below it; who gets here has finished [epochs].

    Raises:
        ConfigError: if a number is too small.

    >>> halving = Halving(min_epochs=1, reduction_factor=2, max_epochs=8)
    >>> halving.rungs
    (1, 2, 4)
    >>> halving.decide("a", 1, [0.5, 0.9]).stop
    False
    >>> halving.decide("b", 1, [0.4, 0.8])
    Decision(stop=True, rung=1, rank=1, place=1, of=2)
    """

    def __init__(self, *, min_epochs: int, reduction_factor: int, max_epochs: int) -> None:
        super().__init__()
        _at_least(
            min_epochs=(min_epochs, 1), reduction_factor=(reduction_factor, 2), max_epochs=(max_epochs, 1)
        )
        self._factor = reduction_factor
        rungs = []
        while min_epochs < max_epochs:
            rungs.append(min_epochs)
            min_epochs *= reduction_factor
        self.rungs = tuple(rungs)

    def is_rung(self, epoch: int) -> bool:
        return epoch in self.rungs

    def __str__(self) -> str:
        rungs = ", ".join(map(str, self.rungs)) or "none"
        return f"after epochs {rungs}, all but the best 1/{self._factor}"

    def _compare(self, trial_id: str, rung: int, values: Sequence[float]) -> Decision:
        recorded = self._values.get(rung, {})
        mine = list(recorded).index(trial_id) if trial_id in recorded else None
        values_NM = np.array(list(recorded.values()))
        rest, rank = np.arange(len(recorded)), 0
        while len(rest):
            on_front = pareto_mask(values_NM[rest])
            front, rest = rest[on_front], rest[~on_front]
            if mine in front:
                before = len(recorded) - len(rest) - len(front)
                place = before + front[epsilon_net(values_NM[front])].tolist().index(mine)
                keep = -(-len(recorded) // self._factor)
                stop = len(recorded) >= self._factor and place >= keep
                return Decision(stop, rung, rank, place, len(recorded))
            rank += 1
        return Decision(True, rung, rank, len(recorded), len(recorded) + 1)  # not finite: behind all others


def _at_least(**bounds: tuple[float, float]) -> None:
    for name, (value, least) in bounds.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")


def rule_of(search: SearchConfig) -> Rule | None:
    """The rule that a search asks for; None: trials are not stopped."""
    if search.stopping == "no_better":
        return NoBetter(min_epochs=search.min_epochs, min_gain=search.min_gain)
    if search.stopping == "halving":
        return Halving(
            min_epochs=search.min_epochs,
            reduction_factor=search.reduction_factor,
            max_epochs=search.epochs[1],
        )
    return None


class StoppingScheduler(FIFOScheduler):
    """Stops the trials that a rule does not let go on.

    A trial's own last epoch is no rung: it has finished, and its learning rate with it, so it is neither
    stopped there nor compared with others in the middle of theirs.

    Args:
        score: the objectives of a report, all to be maximised; None where they are not finite.
        on_decision: called at each rung with our trial id, the epoch and the decision, before the report
            reaches the callbacks of Tune; a restarted trial comes there again, with the same decision.

    Attributes:
        stopped: the decisions that stopped a trial, by Ray's own trial id. After a STOP, Tune calls
            ``on_trial_result`` of its callbacks and then ``on_trial_complete`` of this scheduler, of the
            searcher and of the callbacks, so that all of them find the trial here.
    """

    _supports_buffered_results = False  # or a trial would run past its rung before it is asked about

    def __init__(
        self,
        rule: Rule,
        score: Callable[[Mapping[str, Any]], Sequence[float] | None],
        on_decision: Callable[[str, int, Decision], None] = lambda trial_id, epoch, decision: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # pyproject excuses ray, but not for super()
        self._rule, self._score, self._on_decision = rule, score, on_decision
        self.stopped: dict[str, Decision] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its scheduler to restore it; a sweep is resumed from its tables instead

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Takes no metric, there being several; ``metric`` is then a name that Tune asks of no report."""
        return not metric and not mode and bool(super().set_search_properties(None, None, **spec))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """STOP or CONTINUE. Baselines and confirmations, whose ids are no numbers, always go on."""
        trial_id: str = trial.config["trial_id"]
        # The report of a failure has no epoch. Tune's own count of reports starts anew after a restart.
        epoch = result.get("epoch")
        if epoch is None or not trial_id.isdigit() or epoch >= trial.config["settings"]["epochs"]:
            return self.CONTINUE
        # A report that comes again: the trial went on from here before its process died.
        decide = self._rule.passed if result.get(AGAIN) else self._rule.decide
        decision = decide(trial_id, epoch, self._score(result) or [math.nan])
        if decision.stop or decision.rung is not None:
            self._on_decision(trial_id, epoch, decision)
        if not decision.stop:
            return self.CONTINUE
        self.stopped[trial.trial_id] = decision
        return self.STOP

    def debug_string(self) -> str:
        rungs = [
            f"epoch {r}: {n} trials, {stopped} stopped" for r, (n, stopped) in self._rule.counts().items()
        ]
        return "; ".join([type(self._rule).__name__, *rungs])

    def save(self, checkpoint_path: str) -> None:
        stopped = {i: asdict(d) for i, d in self.stopped.items()}
        Path(checkpoint_path).write_text(json.dumps({"rule": self._rule.state(), "stopped": stopped}))

    def restore(self, checkpoint_path: str) -> None:
        saved = json.loads(Path(checkpoint_path).read_text())
        self._rule.restore(saved["rule"])
        self.stopped = {i: Decision(**d) for i, d in saved["stopped"].items()}


def epsilon_net(points: ArrayLike) -> NDArray[np.intp]:
    """The order in which points cover their front best: any first few of them lie evenly over it.

    It starts with the best compromise, the largest sum of the objectives, and goes on with the point that is
    farthest from all before it: in two objectives first the two ends, then the middle of the widest gap.
    Each objective is scaled to its range among the points. Ties go to whoever comes first in ``points``.

    Takes ``points`` (N, M), maximised and finite; returns an order (N,).

    >>> epsilon_net([[0, 10], [1, 9], [7, 6], [10, 0]]).tolist()
    [2, 0, 3, 1]
    """
    points_NM = np.asarray(points, dtype=np.float64)
    low_M, high_M = points_NM.min(axis=0), points_NM.max(axis=0)
    scaled_NM = (points_NM - low_M) / np.where(high_M > low_M, high_M - low_M, 1.0)
    order = [int(np.argmax(scaled_NM.sum(axis=1)))]
    distance_N = np.full(len(points_NM), np.inf)
    while len(order) < len(points_NM):
        distance_N = np.minimum(distance_N, np.linalg.norm(scaled_NM - scaled_NM[order[-1]], axis=1))
        distance_N[order[-1]] = -1.0  # or an equal point could be taken twice
        order.append(int(np.argmax(distance_N)))
    return np.array(order)
