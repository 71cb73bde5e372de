"""The front as a picture, for a README or a paper's appendix: PNG, SVG, or HTML that needs no network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import altair as alt

from clippo.errors import ConfigError, StoreError
from clippo.front.counts import REFERENCE, position
from clippo.front.front import (
    PREFERENCE,
    UNTOUCHED,
    Bounds,
    Front,
    Point,
    describe,
    export_flags,
    well_spread,
)

FORMATS = (".png", ".svg", ".html")
X_TITLE = "retention: share of what the model could do before"
WIDTH, HEIGHT = 620, 420  # of the plotting area; with its axis the picture is about 700 px wide
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"

# Okabe and Ito's colours, which stay apart for the colour-blind, and a shape each for print in grey. A loss
# keeps its own in every picture; one that is not named here takes the next that is free.
KNOWN_LOSSES = ("dpo", "ipo", "kto", "cross_entropy")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-right")
INK, PAPER, GREY, PALE = "#222222", "#FFFFFF", "#8A8A8A", "#B4B4B4"
STAR = "M0,-1L.235,-.324L.951,-.309L.38,.124L.588,.809L0,.4L-.588,.809L-.38,.124L-.951,-.309L-.235,-.324Z"
ON_FRONT, DOMINATED = "on the front (bars: 90 %)", "dominated"

# An axis never shows less than MIN_SPAN, or noise would fill the picture; and a bad trial must not press the
# front into a corner: dominated points widen an axis to at most MAX_WIDENING times what the front needs.
MIN_SPAN, MAX_WIDENING, PADDING = 0.04, 2.0, 0.04
MANY = 1000  # of so many points, dominated steps of curves are not drawn
CELLS = 150  # of several dominated points in one such part of both axes one is drawn
MOST_CURVES, MOST_BARS = 12, 7


def front_chart(front: Front, *, width: int | str = WIDTH, title: bool = True) -> alt.LayerChart:
    """Retention against the goal on validation pictures: the front with its intervals, the rest faint.

    Lines are curves of interpolated weights: of what is recommended, of the baselines (dashed), and faintly
    of other trials on the front. Points left of the dotted rule keep less than the bound on retention and are
    infeasible. Dominated points that could only be shown by squeezing the front are counted in the subtitle
    instead. The parameters ``ink``, ``paper`` and ``picked`` (`key_of` the point with the
    ring) may be changed where the chart is shown.
    """
    x_domain = _domain(front.points, "retention")
    visible = [p for p in front.points if _within(p.retention, x_domain)]
    up = front.goal.is_maximised
    y_domain = _domain(visible, "goal", up=up)
    visible = [p for p in visible if _within(p.goal, y_domain)]
    x, x_low = (_axis(alt.X(field), X_TITLE, x_domain) for field in ("retention:Q", "retention_low:Q"))
    # Better is always up.
    y, y_low = (_axis(alt.Y(f), front.words.axis, y_domain, not up) for f in ("goal:Q", "goal_low:Q"))
    bottom = y_domain[0] if up else y_domain[1]
    color, shape, size, opacity = _looks(front.points)
    shown = _tooltip(front)
    tooltip = [alt.Tooltip(field=field, type="nominal", title=name) for field, name in shown.items()]
    ink, paper = (alt.param(name=n, value=v) for n, v in (("ink", INK), ("paper", PAPER)))
    picked = alt.param(name="picked", value=key_of(front.recommended))
    in_ink, on_paper = alt.ExprRef(expr="ink"), alt.ExprRef(expr="paper")

    # What is drawn later lies on top.
    barred = {key_of(p) for p in well_spread(front, MOST_BARS)}
    drawn = sorted(thinned(visible, x_domain, y_domain), key=lambda p: p.on_front)
    rows = [{**_row(p, shown), "barred": key_of(p) in barred} for p in drawn]
    untouched, tuned = (alt.Chart().transform_filter(f) for f in ("datum.untouched", "!datum.untouched"))
    bars = tuned.transform_filter("datum.barred").mark_errorbar(ticks={"size": 6}, thickness=1.2)
    star_bar = untouched.mark_errorbar(ticks={"size": 6}, thickness=1.2, color=in_ink)
    star = untouched.mark_point(shape=STAR, filled=True, size=200, color=in_ink, opacity=1)
    ring = alt.Chart().transform_filter("datum.key === picked")
    rim = {"stroke": on_paper, "strokeWidth": 4, "strokeJoin": "round"}  # readable over points, too
    # The untouched model keeps all that it has, so its label has room only to its left.
    label = {"align": "right", "baseline": "top", "dx": -8, "dy": 6, "fontSize": 12, "text": UNTOUCHED}
    named = {"align": "right", "baseline": "bottom", "dx": -11, "dy": -7, "fontSize": 12}
    chosen = alt.Chart().transform_filter(
        alt.FieldEqualPredicate(field="key", equal=key_of(front.recommended))
    )
    name = alt.TextValue("recommended") if front.recommended is not front.reference else alt.TextValue("")

    edge = _edge(front.front, x_domain[0])
    end = {**edge[-1], "goal": bottom, "order": len(edge)}
    area = alt.Chart(alt.InlineData(values=edge)).mark_area(
        interpolate="step-before", color=GREY, opacity=0.1, clip=True
    )
    line = alt.Chart(alt.InlineData(values=[*edge, end])).mark_line(
        interpolate="step-before", color=PALE, strokeWidth=1.2, clip=True
    )
    dash = alt.StrokeDash("kind:N", legend=None).scale(domain=["tuned", "baseline"], range=[[1, 0], [5, 4]])
    curves = _curves(front)
    plain, faint = (
        alt.Chart(alt.InlineData(values=[c for c in curves if c["plain"] is is_plain]))
        .mark_line(clip=True, strokeWidth=width_of, opacity=opacity_of)
        .encode(x=x, y=y, color=color, detail="trial:N", order="position:Q", strokeDash=dash)
        for is_plain, width_of, opacity_of in ((True, 1.8, 0.9), (False, 1.0, 0.3))
    )
    binds = x_domain[0] < front.min_retention <= x_domain[1]
    bound = _bound(front.min_retention, bottom, x, y, y_domain) if binds else []
    across = {"x": x_low, "x2": alt.X2("retention_high:Q"), "y": y}
    upright = {"x": x, "y": y_low, "y2": alt.Y2("goal_high:Q")}
    layers = [
        area.encode(x=x, y=y, y2=alt.Y2Datum(bottom)),
        line.encode(x=x, y=y, order="order:Q"),
        *bound,
        faint,
        plain,
        bars.encode(**across, color=color, tooltip=tooltip),
        bars.encode(**upright, color=color, tooltip=tooltip),
        tuned.mark_point(filled=True, clip=True, stroke=on_paper, strokeWidth=0.8).encode(
            x=x, y=y, color=color, shape=shape, size=size, opacity=opacity, tooltip=tooltip
        ),
        star_bar.encode(**across, tooltip=tooltip),
        star_bar.encode(**upright, tooltip=tooltip),
        star.encode(x=x, y=y, tooltip=tooltip),
        ring.mark_point(filled=False, size=380, stroke=in_ink, strokeWidth=1.8, opacity=1).encode(
            x=x, y=y, tooltip=tooltip
        ),
        untouched.mark_text(**label, **rim).encode(x=x, y=y),
        untouched.mark_text(**label, color=in_ink).encode(x=x, y=y),
        chosen.mark_text(**named, **rim).encode(x=x, y=y, text=name),
        chosen.mark_text(**named, color=in_ink).encode(x=x, y=y, text=name),
    ]
    hidden = len(front.points) - len(visible)
    chart = alt.layer(*layers, data=alt.InlineData(values=rows)).add_params(ink, paper, picked)
    return styled(
        chart.properties(width=width, height=HEIGHT, **({"title": _title(front, hidden)} if title else {}))
    )


def styled(chart: Any) -> Any:
    """A chart in the looks that all of the project's have."""
    return (
        chart.properties(background=PAPER, padding=12)
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=12, titleFontSize=13, titleFontWeight="normal", titlePadding=10, tickCount=8,
            labelColor=INK, titleColor=INK, domainColor=GREY, tickColor=GREY, gridColor="#ECECEC",
        )
        .configure_legend(
            orient="top", titleOrient="left", columnPadding=14, labelLimit=300,
            labelFontSize=12, titleFontSize=12, titlePadding=10, labelColor=INK, titleColor=INK,
        )
        .configure_title(
            anchor="start", frame="group", fontSize=17, subtitleFontSize=12.5, offset=12, subtitlePadding=6,
            color=INK, subtitleColor="#555555", subtitleLineHeight=17,
        )
    )  # fmt: skip


def save_chart(chart: alt.TopLevelMixin, path: str | Path) -> None:
    """Writes a chart in the format that the suffix of the path names.

    Raises:
        ConfigError: another suffix than those of `FORMATS`.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"{str(path)!r} is no picture that can be made; end it in {' or '.join(FORMATS)}")
    picture: str | bytes
    if suffix == ".png":
        binary = BytesIO()
        chart.save(binary, format="png", scale_factor=2)  # sharp in print and on dense screens
        picture = binary.getvalue()
    else:
        text = StringIO()
        # Inlined scripts: the page must also open where there is no network.
        chart.save(text, format="svg" if suffix == ".svg" else "html", inline=suffix == ".html")
        picture = text.getvalue()
    write_file(path, picture if isinstance(picture, bytes) else picture.encode(), " or ".join(FORMATS))


def write_file(path: Path, content: bytes, endings: str) -> None:
    """Writes a file.

    Raises:
        StoreError: it cannot be written; ``endings`` says what its name may end in.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror}; name a file ending in {endings} "
            "in a folder that exists and may be written to"
        ) from error


def key_of(point: Point) -> str:
    """What names a point in a chart."""
    return f"{point.trial_id} {point.variant}"


def losses_of(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Colour and shape of each loss that was tried."""
    used = {p.settings["loss"] for p in points if p.trial_id != REFERENCE}
    names = (*KNOWN_LOSSES, *sorted(used - {*KNOWN_LOSSES}))
    looks = {n: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, n in enumerate(names)}
    return {name: look for name, look in looks.items() if name in used}


def thinned(points: Sequence[Point], x_domain: Bounds, y_domain: Bounds) -> list[Point]:
    """All points of the front, and of dominated ones that would lie on each other one of each loss.

    Of many points, dominated ones that are steps of a curve are left out.
    """
    x_width, y_width = (high - low for low, high in (x_domain, y_domain))
    cells = CELLS if len(points) <= MANY else CELLS // 2
    kept: dict[tuple[Any, ...], Point] = {}
    if len(points) > MANY:
        points = [p for p in points if p.on_front or position(p.variant) in (None, 1.0)]
    for point in points:
        cell: tuple[Any, ...] = (key_of(point),)
        if not point.on_front and point.trial_id != REFERENCE:
            column = int((point.retention - x_domain[0]) / x_width * cells)
            row = int((point.goal - y_domain[0]) / y_width * cells)
            cell = point.settings["loss"], column, row
        kept.setdefault(cell, point)
    return list(kept.values())


def _bound(bound: float, bottom: float, x: alt.X, y: alt.Y, y_domain: Bounds) -> list[alt.Chart]:
    """A rule at the bound on retention, over the whole height."""
    (top,) = {*y_domain} - {bottom}
    base = alt.Chart(alt.InlineData(values=[{"retention": bound, "goal": bottom}])).encode(x=x, y=y)
    label = {"align": "right", "baseline": "bottom", "dx": -5, "dy": -4, "fontSize": 11.5}
    return [
        base.mark_rule(strokeDash=[2, 3], color=GREY).encode(y2=alt.Y2Datum(top)),
        base.mark_text(**label, color=GREY, text=f"keeps less than {bound:g}"),
    ]


def _curves(front: Front) -> list[dict[str, Any]]:
    """The curves worth drawing, from the untouched model to the averaged weights and beyond, by position."""
    by_trial: dict[str, list[Point]] = defaultdict(list)
    for p in front.points:
        if position(p.variant) is not None:
            by_trial[p.trial_id].append(p)
    baselines = {p.trial_id for c in front.comparisons if c.method != PREFERENCE for p in c.front}
    on_front = [p.trial_id for p in sorted(front.front, key=lambda p: -p.probability)]
    wanted = dict.fromkeys([front.recommended.trial_id, *sorted(baselines), *on_front])
    curves = [trial for trial in wanted if trial != REFERENCE and len(by_trial[trial]) > 1]
    rows = []
    for trial_id in curves[:MOST_CURVES]:
        plain = trial_id in baselines or trial_id == front.recommended.trial_id
        steps = [(position(p.variant), p) for p in by_trial[trial_id]] + [(0.0, front.reference)]
        rows += [
            {
                "trial": trial_id,
                "loss": by_trial[trial_id][0].settings["loss"],
                "kind": "baseline" if trial_id in baselines else "tuned",
                "plain": plain,
                "position": place,
                "retention": p.retention,
                "goal": p.goal,
            }
            for place, p in steps
        ]
    return rows


def _tooltip(front: Front) -> dict[str, str]:
    """What is shown of a point, and how it is called."""
    words, (goal, retention) = front.words, front.objectives.names
    return {
        "trial": "trial",
        "variant": "weights",
        "setting": "setting",
        "goal_text": words.goal,
        "retention_text": "retention",
        "probability": "probability of being on the front",
        f"test_{goal}": f"test {words.goal}",
        f"test_{retention}": "test retention",
        **{f"test_{n}": f"test: {words.numbers.get(n, n)}" for n in words.tiles},
        "export": "clippo export STORE",
    }


def _row(point: Point, shown: Mapping[str, str]) -> dict[str, Any]:
    """A point as plain data for Vega; the tooltip's numbers as they are to be read."""
    untouched = point.trial_id == REFERENCE
    test = {f"test_{name}": f"{value:.3f}" for name, value in point.test.items()}
    return {
        "key": key_of(point),
        "trial": UNTOUCHED if untouched else point.trial_id,
        "variant": point.variant,
        "setting": "" if untouched else describe(point.settings),
        "loss": "" if untouched else point.settings["loss"],
        "state": ON_FRONT if point.on_front else DOMINATED,
        "untouched": untouched,
        "on_front": point.on_front,
        "goal": round(point.goal, 6),
        "goal_low": round(point.goal_interval[0], 6),
        "goal_high": round(point.goal_interval[1], 6),
        "goal_text": f"{point.goal:.3f} ({_interval(point.goal_interval)})",
        "retention": round(point.retention, 6),
        "retention_low": round(point.retention_interval[0], 6),
        "retention_high": round(point.retention_interval[1], 6),
        "retention_text": f"{point.retention:.3f} ({_interval(point.retention_interval)})",
        "probability": f"{point.probability:.2f}",
        "export": "" if untouched else export_flags(point.trial_id, point.variant),
        **{name: test.get(name, "not measured") for name in shown if name.startswith("test_")},
    }


def _interval(interval: Bounds) -> str:
    return "{:.3f} to {:.3f}".format(*interval)


def _edge(front: Sequence[Point], left: float) -> list[dict[str, float]]:
    """Corners of the dominated area, by retention; between two, the goal of the right one holds."""
    corners = sorted((p.retention, p.goal) for p in front)
    corners = [(left, corners[0][1]), *corners]
    return [{"retention": x, "goal": y, "order": i} for i, (x, y) in enumerate(corners)]


def _axis(channel: Any, title: str, domain: Bounds, reverse: bool = False) -> Any:
    return channel.title(title).scale(domain=domain, nice=False, zero=False, reverse=reverse)


def _domain(points: Sequence[Point], objective: str, *, up: bool = True) -> Bounds:
    """The part of an axis worth looking at: all of the front, and of the rest what does not squeeze it.

    Args:
        up: whether more is better.
    """
    shown = [p for p in points if p.on_front or p.trial_id == REFERENCE]
    ends = [end for p in shown for end in (getattr(p, objective), *getattr(p, f"{objective}_interval"))]
    sign = 1 if up else -1
    low, high = sorted((sign * min(ends), sign * max(ends)))
    low = min(low, high - MIN_SPAN)
    # Dominated points are never better than the front, so an axis only widens to the worse side.
    limit = high - MAX_WIDENING * (high - low)
    low = min(low, *(v for p in points if (v := sign * getattr(p, objective)) >= limit))
    padding = PADDING * (high - low)
    one, other = sorted((sign * (low - padding), sign * (high + padding)))
    return one, other


def _within(value: float, domain: Bounds) -> bool:
    return domain[0] <= value <= domain[1]


def _looks(points: Sequence[Point]) -> tuple[alt.Color, alt.Shape, alt.Size, alt.Opacity]:
    """How a loss and a place on the front look, each with a legend of its own."""
    losses = losses_of(points)
    colours, shapes = ([look[i] for look in losses.values()] for i in (0, 1))
    # Channels that share field, title and legend make one legend.
    of_loss = alt.Legend(title="loss", symbolOpacity=1, symbolSize=90)
    of_state = alt.Legend(title=None, symbolFillColor=GREY)
    states = [ON_FRONT, DOMINATED]
    return (
        alt.Color("loss:N", legend=of_loss).scale(domain=list(losses), range=colours),
        alt.Shape("loss:N", legend=of_loss).scale(domain=list(losses), range=shapes),
        alt.Size("state:O", legend=of_state).scale(domain=states, range=[120, 34]),
        alt.Opacity("state:O", legend=of_state).scale(domain=states, range=[1, 0.4]),
    )


def _title(front: Front, hidden: int) -> alt.TitleParams:
    others = {"stopped early": front.stopped, "failed": front.failed}
    counted = "".join(f", {n} {what}" for what, n in others.items() if n)
    lines = [
        f"Sweep {front.sweep}: {front.completed} trials completed{counted}. "
        f"{len(front.front)} of {len(front.points)} points are on the front.",
        f"Hypervolume {front.hypervolume:.3f}, 90 % interval {_interval(front.hypervolume_interval)}. "
        "All on validation pictures.",
    ]
    if hidden:
        lines.append(f"Dominated points too far from the front to be shown: {hidden}.")
    goal = front.words.goal
    return alt.TitleParams(f"{goal[:1].upper()}{goal[1:]} against retention", subtitle=lines)
