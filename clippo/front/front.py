"""The front of a sweep as data: its points, what each method offers, and what is to be chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clippo.evaluate.objectives import Goal, Objectives
from clippo.evaluate.words import Words
from clippo.front.counts import REFERENCE, STOPPED_AFTER
from clippo.front.uncertainty import CONFIDENCE

MIN_RETENTION, CHANCE = 0.98, 0.9
"""What the recommended point must keep, unless the user says otherwise, and how surely."""

UNTOUCHED = "untouched model"
TUNING = "cross-entropy tuning"
PAINT = "PAINT (interpolated)"
PREFERENCE = "preference optimisation"
METHODS = (UNTOUCHED, TUNING, PAINT, PREFERENCE)

PLACES = "places"
"""In the predictions of an example: the place of its picture in each model's ranking, the best is 0."""

Bounds = tuple[float, float]
Measured = tuple[float, float, float]
"""A number and the limits of its interval."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model that could be shipped.

    Attributes:
        method: how it was made, one of `METHODS`.
        trial_ids: trials of its settings, one for each seed; the numbers are their means, and ``trial_id``
            is the one to export.
        device_s: what training it once took, on average over the seeds.
        goal, retention: on validation pictures, the goal of the task in its own unit; ``*_interval`` is the
            90 % interval from counts or rankings and the spread of the seeds, as far as that is known.
        probability: that the point is on the front, given that noise.
        feasible: whether its retention is at least ``Front.min_retention``, as measured.
        chance: that its retention is at least ``Front.min_retention``, given that noise, of this point by
            itself; that a recommended one was picked among many is not in it. None far off the front.
        group: points on the front of one group cannot be told apart; 0 off the front.
        test: the same on test pictures by name, with the accuracy of each kind of set and what else was
            measured; ``test_intervals`` has their 90 % intervals.
        confirmed: the same of the model that was trained once more with a fresh seed; empty where none was.
    """

    trial_id: str
    trial_ids: list[str]
    variant: str
    method: str
    settings: dict[str, Any]
    device_s: float
    goal: float
    goal_interval: Bounds
    retention: float
    retention_interval: Bounds
    on_front: bool
    feasible: bool
    probability: float
    chance: float | None
    group: int
    test: dict[str, float]
    test_intervals: dict[str, Bounds]
    confirmed: dict[str, float]
    confirmed_intervals: dict[str, Bounds]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one method offers beside the untouched model.

    Attributes:
        best: the best of its points that keeps ``Front.min_retention`` with a chance of at least 90 %.
        front: its own front, by retention.
    """

    method: str
    best: Point
    front: list[Point]
    hypervolume: float
    hypervolume_interval: Bounds


@dataclass(frozen=True, kw_only=True)
class Front:
    """The points of a sweep, the untouched model first, then by retention.

    Attributes:
        objectives: goal and retention: what they are, and what they were measured on.
        words: how they are called.
        hypervolume: of gains (`Goal.gain`) as measured, above (0, 0); optimistic, since a front picks the
            best of noisy points.
        hypervolume_interval: of what endless pictures would give.
        min_retention: what the recommended point is to keep.
        recommended: the point with the best goal that keeps it with a chance of at least 90 %.
        alike: points that cannot be told from it.
        knee: where a better goal starts to cost more retention than before; None on a front of two points.
        comparisons: what each method offers on the same axes, the untouched model first.
        gain: the hypervolume that preference optimisation adds to the other methods, with its interval.
        device_s: what all trials together took, failed ones included.
        stopped: trials that were stopped early; each offers the averaged weights that it had by then.
        left_out: completed trials of a very large sweep that offer no point here, as others are closer to the
            front.
        repeated: settings that were run with several seeds; 0: what another seed would give is not known.
        seed_sd: the standard deviation of goal and retention between seeds.
        curve: the variants along the curve of the recommended trial, or of the best where that is the
            untouched model, and what they reach on validation pictures.
        searched: where the search had other objectives, the points that no other beats in those.
    """

    sweep: str
    objectives: Objectives
    words: Words
    points: list[Point]
    hypervolume: float
    hypervolume_interval: Bounds
    completed: int
    failed: int
    stopped: int
    min_retention: float
    recommended: Point
    alike: list[Point]
    knee: Point | None
    comparisons: list[Comparison]
    gain: float
    gain_interval: Bounds
    device_s: float
    repeated: int
    seed_sd: Bounds
    left_out: int = 0
    curve: list[tuple[str, dict[str, Measured]]] = field(default_factory=list)
    searched: list[tuple[Point, dict[str, float]]] = field(default_factory=list)

    @property
    def goal(self) -> Goal:
        return self.objectives.goal

    def gain_of(self, point: Point) -> float:
        """The goal of a point on the scale where 1 is best."""
        return float(self.goal.gain(point.goal))

    @property
    def front(self) -> list[Point]:
        return [p for p in self.points if p.on_front]

    @property
    def reference(self) -> Point:
        return self.points[0]

    @property
    def gained_per_device_hour(self) -> float | None:
        """Hypervolume above the untouched model's for each hour of a device; None when none was used."""
        gained = self.hypervolume - self.comparisons[0].hypervolume
        return gained / (self.device_s / 3600) if self.device_s else None

    def to_json(self) -> dict[str, Any]:
        """Plain data: the untouched model as ``reference``, and the points on the front."""
        return {
            "sweep": self.sweep,
            "objectives": self.objectives.to_json(),
            "completed": self.completed,
            "failed": self.failed,
            "stopped_early": self.stopped,
            "left_out": self.left_out,
            "confidence": CONFIDENCE,
            "hypervolume": self.hypervolume,
            "hypervolume_interval": self.hypervolume_interval,
            "min_retention": self.min_retention,
            "recommended": self._plain(self.recommended),
            "alike": [{"trial_id": p.trial_id, "variant": p.variant} for p in self.alike],
            "knee": self.knee and self._plain(self.knee),
            "comparisons": [
                {
                    "method": c.method,
                    "hypervolume": c.hypervolume,
                    "hypervolume_interval": c.hypervolume_interval,
                    "best": self._plain(c.best),
                    "front": [self._plain(p) for p in c.front],
                }
                for c in self.comparisons
            ],
            "gain": self.gain,
            "gain_interval": self.gain_interval,
            "seeds": {"repeated_settings": self.repeated, "sd": self.seed_sd},
            "cost": {
                "device_hours": self.device_s / 3600,
                "hypervolume_gained_per_device_hour": self.gained_per_device_hour,
                "device_s": {p.trial_id: p.device_s for p in self.points if p.trial_id != REFERENCE},
            },
            "reference": self._plain(self.reference),
            "points": [self._plain(p) for p in self.front],
            "searched": [
                {"trial_id": p.trial_id, "feasible": p.feasible, "objectives": values}
                for p, values in self.searched
            ],
        }

    def _plain(self, point: Point) -> dict[str, Any]:
        """A point as plain data, with the goal under its own name."""
        name = self.goal.name
        own = {"goal": name, "goal_interval": f"{name}_interval"}
        return {own.get(n, n): value for n, value in vars(point).items()}


def describe(settings: Mapping[str, Any]) -> str:
    """Settings in a few words.

    >>> describe({"loss": "dpo", "beta": 0.5, "kl_weight": 1.0, "learning_rate": 2e-4, "epochs": 2})
    'dpo beta 0.5 x2 kl 1 lr 2e-4'

    Stopped after 3 of 9 epochs is ``x3/9``.
    """
    beta = "" if settings.get("beta") is None else f" beta {settings['beta']:.2g}"
    pairs = f" {settings['pairs']}" if settings.get("pairs") else ""
    exponent = math.floor(math.log10(settings["learning_rate"]))
    rate = f"{settings['learning_rate'] / 10**exponent:.2g}e{exponent}"
    epochs = f"{settings[STOPPED_AFTER]}/" if settings.get(STOPPED_AFTER) else ""
    epochs += str(settings["epochs"])
    return f"{settings['loss']}{beta} x{epochs} kl {settings['kl_weight']:.2g} lr {rate}{pairs}"


def well_spread(front: Front, rows: int) -> list[Point]:
    """The untouched model, the ends of the front, knee, recommended point, and what lies farthest apart."""
    points = [p for p in front.points if p.on_front or p is front.reference]
    if len(points) <= rows:
        return points
    marked = (front.reference, front.recommended, front.knee, front.front[0], front.front[-1])
    chosen = [i for i, p in enumerate(points) if any(p is m for m in marked)]
    places = np.array([(p.retention, p.goal) for p in points])
    places = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-9)
    while len(chosen) < rows:
        nearest = np.linalg.norm(places[:, None] - places[chosen], axis=-1).min(axis=1)
        nearest[chosen] = -1  # equal points lie at no distance from each other
        chosen.append(int(nearest.argmax()))
    return [points[i] for i in sorted(chosen)]


def export_flags(trial_id: str, variant: str) -> str:
    """The flags of ``clippo export`` that write a point as a checkpoint.

    >>> export_flags("00014", "alpha=0.8"), export_flags("00014", "last")
    ('--trial 00014 --alpha 0.8', '--trial 00014 --variant last')
    """
    kind, _, value = variant.partition("=")
    return f"--trial {trial_id} " + (f"--{kind} {value}" if value else f"--variant {kind}")
