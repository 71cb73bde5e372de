"""What the report says of points and trials, and the JSON of it that the page's scripts show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clippo.evaluate.objectives import RETENTION
from clippo.front.counts import AVERAGED, REFERENCE
from clippo.front.front import Bounds, Front, Point, describe, export_flags, well_spread
from clippo.front.plot import key_of


def titles_of(front: Front) -> dict[str, str]:
    """How numbers on test pictures are called: goal, retention, the task's own, those of published sets."""
    words = front.words
    known = {front.goal.name: words.goal, RETENTION: RETENTION, **words.numbers}
    others = [n for n in front.reference.test if n not in known and "/" in n]
    return known | {n: n.replace("_", " ") for n in others}


def embedded(
    front: Front,
    rows: Sequence[Mapping[str, Any]],
    charts: Mapping[str, Any],
    points: Iterable[Point],
    command: str,
    usage: str,
) -> str:
    """What the page's script shows, as JSON for a script element: nothing in it can end the element.

    Args:
        rows: of the table of trials.
        points: those that the panel beside the front can show.
        command: how ``clippo export`` is called; the flags of a point follow.
        usage: Python that loads what it wrote; empty where the sweep does not say.
    """
    titles = titles_of(front)
    data = {
        "charts": charts,
        "command": command,
        "numbers": list(titles.values()),
        "picks": {key_of(p): _pick(p, list(titles)) for p in points},
        "recommended": key_of(front.recommended),
        "trials": _trial_table(front, rows),
        "usage": usage,
    }
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def choices(front: Front) -> list[Point]:
    """Points worth a closer look, by retention: the front, and the best of each method."""
    points = {
        key_of(p): p for p in (*well_spread(front, len(front.points)), *(c.best for c in front.comparisons))
    }
    return sorted(points.values(), key=lambda p: -p.retention)


def _pick(point: Point, names: Sequence[str]) -> dict[str, Any]:
    """What the panel says of one point; each number with its interval, 0 where nothing was measured."""
    untouched = point.trial_id == REFERENCE
    notes = [
        f"{'On' if point.on_front else 'Off'} the front; probability of being on it {point.probability:.2f}."
    ]
    if len(point.trial_ids) > 1:
        notes.append(f"Mean of {len(point.trial_ids)} seeds.")
    if not untouched:
        notes.append(f"Training took {_device_time(point.device_s)} of a device.")
    return {
        "title": "untouched model" if untouched else f"{point.trial_id}, {point.variant}",
        "setting": "as it was pretrained" if untouched else describe(point.settings),
        "validation": [
            _rounded(point.goal, point.goal_interval),
            _rounded(point.retention, point.retention_interval),
        ],
        "test": [_rounded(point.test[n], point.test_intervals[n]) if n in point.test else 0 for n in names],
        "notes": " ".join(notes),
        "flags": "" if untouched else export_flags(point.trial_id, point.variant),
    }


def _device_time(seconds: float) -> str:
    """A time in the unit that fits.

    >>> _device_time(8.2), _device_time(500), _device_time(20_000)
    ('8.2 s', '8.3 min', '5.6 h')
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _rounded(value: float, interval: Bounds) -> list[float]:
    return [round(n, 4) for n in (value, *interval)]


def _trial_columns(front: Front) -> list[tuple[str, str]]:
    """Name and kind of each column of the table of trials."""
    words = front.words
    before = ("trial", "status", "loss", "beta", "KL weight", "learning rate", "epochs", "seed")
    shares = (
        words.goal, RETENTION, f"test {words.goal}", "test retention",
        *(f"test {words.numbers.get(n, n)}" for n in words.tiles[:1]),
    )  # fmt: skip
    after = (("points on the front", "number"), ("device s", "number"), ("error", "text"))
    own = [(name, "text" if name in before[:3] else "number") for name in before]
    return [*own, *((name, "share") for name in shares), *after]


def _trial_table(front: Front, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All trials: what they were, and what their averaged weights reach."""
    averaged = {i: p for p in front.points if p.variant in (AVERAGED, REFERENCE) for i in p.trial_ids}
    on_front = Counter(p.trial_id for p in front.front)
    found = []
    for row in sorted(rows, key=lambda r: (r["trial_id"] != REFERENCE, r["trial_id"])):
        p = averaged.get(row["trial_id"])
        test = p.test if p else {}
        names = (*front.objectives.names, *front.words.tiles[:1])
        numbers = [p.goal if p else None, p.retention if p else None, *(test.get(n) for n in names)]
        found.append(
            [
                row["trial_id"], row["status"], row["loss"], row["beta"], row["kl_weight"],
                row["learning_rate"], row["epochs"], row["seed"],
                *(None if n is None else round(n, 4) for n in numbers),
                on_front[row["trial_id"]], row["device_s"] and round(row["device_s"], 1), row["error"] or "",
            ]
        )  # fmt: skip
    return {"columns": [{"name": n, "kind": k} for n, k in _trial_columns(front)], "rows": found}
