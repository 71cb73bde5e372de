"""What the report draws besides the front: hypervolume against cost, and slices through the settings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from clippo.evaluate.objectives import RETENTION
from clippo.front.counts import AVERAGED, REFERENCE, position
from clippo.front.evidence import HV_REFERENCE_POINT
from clippo.front.front import PAINT, PREFERENCE, TUNING, Front, Point, describe
from clippo.front.hypervolume import hypervolume
from clippo.front.plot import GREY, INK, PAPER, key_of, losses_of, styled

SLICE_SETTINGS = {"beta": "beta", "kl_weight": "KL weight", "learning_rate": "learning rate"}
PROGRESS_COLUMNS = ("trial_id", "finished_at", "device_s")
LABEL = 0.1  # of the axis: what a label takes
SLICED = 500  # trials in a picture of one loss; more would lie on each other


def selected(front: Front) -> list[Point]:
    """The averaged weights of every trial that tunes by preferences: what the search saw."""
    return [p for p in front.points if p.variant == AVERAGED and p.method == PREFERENCE]


def progress_chart(front: Front, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Hypervolume as the trials finished, against what they had cost; rows of `PROGRESS_COLUMNS`."""
    steps = hypervolume_over_time(front, rows)
    timed = steps[-1]["hours"] > 0
    x = alt.X("hours:Q", title="device-hours") if timed else alt.X("trials:Q", title="trials finished")
    y = alt.Y("hypervolume:Q", title="hypervolume", scale=alt.Scale(zero=False, nice=True))
    tooltip = [
        alt.Tooltip("trials:Q", title="trials finished"),
        alt.Tooltip("hours:Q", title="device-hours", format=".3g"),
        alt.Tooltip("hypervolume:Q", format=".3f"),
        alt.Tooltip("trial:N", title="trial"),
    ]
    ink, paper = (alt.param(name=n, value=v) for n, v in (("ink", INK), ("paper", PAPER)))
    in_ink, on_paper = alt.ExprRef(expr="ink"), alt.ExprRef(expr="paper")
    line = alt.Chart(alt.InlineData(values=steps)).encode(x=x, y=y)
    levels: list[dict[str, Any]] = [
        {"method": c.method, "hypervolume": c.hypervolume}
        for c in front.comparisons
        if c.method != PREFERENCE
    ]
    # Tuning and its interpolation are often close: their labels then stand at opposite ends.
    seen = sorted([*(s["hypervolume"] for s in steps), *(level["hypervolume"] for level in levels)])
    tuning = [level["hypervolume"] for level in levels if level["method"] == TUNING]
    for level in levels:
        near = [v for v in tuning if abs(v - level["hypervolume"]) < LABEL * (seen[-1] - seen[0])]
        level["end"] = "left" if level["method"] == PAINT and near else "right"
    rules = alt.Chart(alt.InlineData(values=levels)).encode(y=y)
    labels = [
        alt.Chart(alt.InlineData(values=labelled))
        .encode(y=y)
        .mark_text(align=end, baseline=side, dx=shift, dy=gap, fontSize=11.5, **look)
        .encode(text="method:N", x=alt.value(place))
        for look in ({"stroke": on_paper, "strokeWidth": 4, "strokeJoin": "round"}, {"color": in_ink})
        for end, shift, place, side, gap in (("left", 4, 0, "bottom", -3), ("right", 0, "width", "top", 4))
        if (labelled := [level for level in levels if level["end"] == end])
    ]
    chart = alt.layer(
        rules.mark_rule(strokeDash=[4, 4], color=GREY),
        line.mark_line(interpolate="step-after", color=in_ink, strokeWidth=1.8),
        line.mark_point(filled=True, size=28, color=in_ink, opacity=1).encode(tooltip=tooltip),
        *labels,
    )
    return styled(chart.add_params(ink, paper).properties(width="container", height=260))


def hypervolume_over_time(front: Front, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The hypervolume after each trial that raised it, and after the last."""
    points_of: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for p in front.points:
        points_of[p.trial_id].append((front.gain_of(p), p.retention))
    best = np.array(points_of[REFERENCE])
    volume = hypervolume(best, HV_REFERENCE_POINT)
    seconds, steps = 0.0, [{"trials": 0, "hours": 0.0, "hypervolume": volume, "trial": "untouched model"}]
    finished = sorted((r for r in rows if r["trial_id"] != REFERENCE), key=lambda r: r["finished_at"])
    for done, row in enumerate(finished, start=1):
        seconds += row["device_s"] or 0.0
        # Only what is not dominated by the front so far can raise it.
        new = [p for p in points_of.get(row["trial_id"], []) if not (best >= np.array(p)).all(axis=1).any()]
        if new or done == len(finished):
            best = np.concatenate([best, np.array(new).reshape(-1, 2)])
            volume = hypervolume(best, HV_REFERENCE_POINT)
            step = {"trials": done, "hours": seconds / 3600, "hypervolume": volume, "trial": row["trial_id"]}
            steps.append(step)
    return steps


def slice_charts(front: Front) -> dict[str, Any]:
    """For each setting and loss, the goal against the setting, coloured by retention."""
    measured = selected(front)
    if not measured:
        return {}
    by_loss: dict[str, list[Point]] = defaultdict(list)
    for p in measured:
        by_loss[p.settings["loss"]].append(p)
    y_domain, goal = _padded([p.goal for p in measured]), front.words.goal
    retention = list(retention_range(measured))
    charts = {}
    for setting, title in SLICE_SETTINGS.items():
        for loss, (_, shape) in losses_of(measured).items():
            values = [
                {
                    "value": p.settings[setting],
                    "goal": round(p.goal, 4),
                    "retention": round(p.retention, 4),
                    "trial": p.trial_id,
                    "setting": describe(p.settings),
                    "key": key_of(p),
                }
                for p in by_loss[loss][:SLICED]
                if p.settings.get(setting)
            ]
            if len({v["value"] for v in values}) < 2:
                continue
            marks = alt.Chart(alt.InlineData(values=values), title=f"{loss}: {title}").mark_point(
                filled=True, size=60, shape=shape, opacity=0.9, stroke=GREY, strokeWidth=0.6
            )
            chart = marks.encode(
                x=alt.X("value:Q")
                .title(None)
                .axis(tickCount=4, format="~e" if setting == "learning_rate" else "~g")
                .scale(type="log", nice=False, padding=10),
                y=alt.Y("goal:Q").title(goal).axis(tickCount=5).scale(domain=y_domain, nice=False),
                color=alt.Color("retention:Q", legend=None).scale(scheme="viridis", domain=retention),
                tooltip=[
                    "trial:N",
                    "setting:N",
                    alt.Tooltip("goal:Q", title=goal, format=".3f"),
                    alt.Tooltip("retention:Q", format=".3f"),
                ],
            )
            charts[f"slice-{setting}-{loss}"] = styled(chart.properties(width="container", height=170))
    return charts


def curve_charts(front: Front) -> dict[str, Any]:
    """What the report shows first, along the curve of one trial, with 90 % intervals."""
    if len(front.curve) < 3:
        return {}
    words, t = front.words, any(variant.startswith("t=") for variant, _ in front.curve)
    titles = {front.goal.name: words.goal, RETENTION: RETENTION, **words.numbers}
    place = "power t of the transform" if t else "share of the tuned weights"
    charts = {}
    for name in (*front.objectives.names, *words.tiles):
        if name not in front.curve[0][1]:
            continue
        title = titles.get(name, name.replace("_", " "))
        values = [
            {
                "position": position(variant) or 0.0, "weights": variant, "value": round(numbers[name][0], 4),
                "low": round(numbers[name][1], 4), "high": round(numbers[name][2], 4),
            }
            for variant, numbers in front.curve if name in numbers
        ]  # fmt: skip
        ink = alt.param(name="ink", value=INK)
        x = alt.X("position:Q", title=place).axis(tickCount=5)
        base = alt.Chart(alt.InlineData(values=values), title=title).encode(x=x)
        y = alt.Y("value:Q", title=None).axis(tickCount=5).scale(zero=False)
        band = base.mark_area(opacity=0.2, color=GREY).encode(
            y=alt.Y("low:Q", title=None).scale(zero=False), y2="high:Q"
        )
        line = base.mark_line(point=True, color=alt.ExprRef(expr="ink")).encode(
            y=y,
            tooltip=["weights:N", alt.Tooltip("value:Q", title=title), "low:Q", "high:Q"],
        )
        both = alt.layer(band, line).add_params(ink)
        charts[f"curve-{name}"] = styled(both.properties(width="container", height=170))
    return charts


def retention_range(measured: Sequence[Point]) -> tuple[float, float]:
    """What the colours of the slices reach from and to."""
    values = [p.retention for p in measured]
    return min(values), max(values)


def _padded(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    padding = max(0.05 * (high - low), 0.005)
    return [math.floor((low - padding) * 1000) / 1000, math.ceil((high + padding) * 1000) / 1000]
