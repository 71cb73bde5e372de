"""The front as a picture, for a README or a paper's appendix: PNG, SVG, or HTML that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import altair as alt

from clippo.errors import ConfigError, StoreError
from clippo.front.points import REFERENCE, Front, Point, describe

FORMATS = (".png", ".svg", ".html")
X_TITLE = "retention: share of what the model could do before"
Y_TITLE = "robustness: accuracy on attacked pictures"
WIDTH, HEIGHT = 620, 400  # of the plotting area; with its axis the picture is about 700 px wide

# Okabe and Ito's colours, which stay apart for the colour-blind, and a shape each for print in grey. A loss
# keeps its own in every picture; one that is not named here takes the next that is free.
KNOWN_LOSSES = ("dpo", "ipo", "kto", "cross_entropy")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-right")
INK, GREY, PALE = "#222222", "#8A8A8A", "#B4B4B4"
STAR = "M0,-1L.235,-.324L.951,-.309L.38,.124L.588,.809L0,.4L-.588,.809L-.38,.124L-.951,-.309L-.235,-.324Z"
UNTOUCHED = "untouched model"
ON_FRONT, DOMINATED = "on the front, with 90 % intervals", "dominated"

# An axis never shows less than MIN_SPAN, or noise would fill the picture; and a bad trial must not press the
# front into a corner: dominated points widen an axis to at most MAX_WIDENING times what the front needs.
MIN_SPAN, MAX_WIDENING, PADDING = 0.1, 2.0, 0.04

TOOLTIP = {
    "trial": "trial",
    "variant": "weights",
    "setting": "setting",
    "robustness_text": "robustness",
    "retention_text": "retention",
    "probability": "probability of being on the front",
    "test_robustness": "test robustness",
    "test_retention": "test retention",
    "test_attack_success_rate": "test attack success rate",
    "test_reading_accuracy": "test word reading",
}


def front_chart(front: Front) -> alt.LayerChart:
    """Retention against robustness on validation pictures: the front with its intervals, the rest faint.

    Dominated points that could only be shown by squeezing the front are counted in the subtitle instead.
    """
    x_domain = _domain(front.points, "retention")
    visible = [p for p in front.points if _within(p.retention, x_domain)]
    y_domain = _domain(visible, "robustness")
    hidden = len(front.points) - sum(_within(p.robustness, y_domain) for p in visible)
    x, x_low = (_axis(alt.X(field), X_TITLE, x_domain) for field in ("retention:Q", "retention_low:Q"))
    y, y_low = (_axis(alt.Y(field), Y_TITLE, y_domain) for field in ("robustness:Q", "robustness_low:Q"))
    color, shape, size, opacity = _looks(front.points)
    tooltip = [alt.Tooltip(field=field, type="nominal", title=title) for field, title in TOOLTIP.items()]

    # What is drawn later lies on top.
    rows = [_row(p) for p in sorted(front.points, key=lambda p: p.on_front)]
    untouched, tuned = (alt.Chart().transform_filter(f) for f in ("datum.untouched", "!datum.untouched"))
    bars = tuned.transform_filter("datum.on_front").mark_errorbar(ticks={"size": 6}, thickness=1.2)
    star_bar = untouched.mark_errorbar(ticks={"size": 6}, thickness=1.2, color=INK)
    star = untouched.mark_point(shape=STAR, filled=True, size=200, color=INK, opacity=1)
    # The untouched model keeps all that it has, so its label has room only to its left.
    label = {"align": "right", "baseline": "top", "dx": -8, "dy": 6, "fontSize": 12, "text": UNTOUCHED}
    rim = {"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}  # readable over points, too

    edge = _edge(front.front, x_domain[0])
    end = {**edge[-1], "robustness": y_domain[0], "order": len(edge)}
    area = alt.Chart(alt.InlineData(values=edge)).mark_area(
        interpolate="step-before", color=GREY, opacity=0.1, clip=True
    )
    line = alt.Chart(alt.InlineData(values=[*edge, end])).mark_line(
        interpolate="step-before", color=PALE, strokeWidth=1.2, clip=True
    )
    across = {"x": x_low, "x2": alt.X2("retention_high:Q"), "y": y}
    upright = {"x": x, "y": y_low, "y2": alt.Y2("robustness_high:Q")}
    layers = [
        area.encode(x=x, y=y, y2=alt.Y2Datum(y_domain[0])),
        line.encode(x=x, y=y, order="order:Q"),
        bars.encode(**across, color=color, tooltip=tooltip),
        bars.encode(**upright, color=color, tooltip=tooltip),
        tuned.mark_point(filled=True, clip=True, stroke="white", strokeWidth=0.8).encode(
            x=x, y=y, color=color, shape=shape, size=size, opacity=opacity, tooltip=tooltip
        ),
        star_bar.encode(**across, tooltip=tooltip),
        star_bar.encode(**upright, tooltip=tooltip),
        star.encode(x=x, y=y, tooltip=tooltip),
        untouched.mark_text(**label, **rim).encode(x=x, y=y),
        untouched.mark_text(**label, color=INK).encode(x=x, y=y),
    ]
    return (
        alt.layer(*layers, data=alt.InlineData(values=rows))
        .properties(width=WIDTH, height=HEIGHT, background="white", padding=12, title=_title(front, hidden))
        .configure(font="Liberation Sans, Arial, Helvetica, sans-serif")
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
    try:
        path.write_bytes(picture if isinstance(picture, bytes) else picture.encode())
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror}; name a file ending in {' or '.join(FORMATS)} "
            "in a folder that exists and may be written to"
        ) from error


def _row(point: Point) -> dict[str, Any]:
    """A point as plain data for Vega; the tooltip's numbers as they are to be read."""
    untouched = point.trial_id == REFERENCE
    test = {f"test_{name}": f"{value:.3f}" for name, value in point.test.items()}
    return {
        "trial": UNTOUCHED if untouched else point.trial_id,
        "variant": point.variant,
        "setting": "" if untouched else describe(point.settings),
        "loss": "" if untouched else point.settings["loss"],
        "state": ON_FRONT if point.on_front else DOMINATED,
        "untouched": untouched,
        "on_front": point.on_front,
        "robustness": point.robustness,
        "robustness_low": point.robustness_interval[0],
        "robustness_high": point.robustness_interval[1],
        "robustness_text": f"{point.robustness:.3f} ({_interval(point.robustness_interval)})",
        "retention": point.retention,
        "retention_low": point.retention_interval[0],
        "retention_high": point.retention_interval[1],
        "retention_text": f"{point.retention:.3f} ({_interval(point.retention_interval)})",
        "probability": f"{point.probability:.2f}",
        **{name: test.get(name, "not measured") for name in TOOLTIP if name.startswith("test_")},
    }


def _interval(interval: tuple[float, float]) -> str:
    return "{:.3f} to {:.3f}".format(*interval)


def _edge(front: Sequence[Point], left: float) -> list[dict[str, float]]:
    """Corners of the dominated area, by retention; between two, the robustness of the right one holds."""
    corners = sorted((p.retention, p.robustness) for p in front)
    corners = [(left, corners[0][1]), *corners]
    return [{"retention": x, "robustness": y, "order": i} for i, (x, y) in enumerate(corners)]


def _axis(channel: Any, title: str, domain: tuple[float, float]) -> Any:
    return channel.title(title).scale(domain=domain, nice=False, zero=False)


def _domain(points: Sequence[Point], objective: str) -> tuple[float, float]:
    """The part of an axis worth looking at: all of the front, and of the rest what does not squeeze it."""
    shown = [p for p in points if p.on_front or p.trial_id == REFERENCE]
    ends = [end for p in shown for end in (getattr(p, objective), *getattr(p, f"{objective}_interval"))]
    low, high = min(ends), max(ends)
    low = min(low, high - MIN_SPAN)
    # Dominated points are never above the front, so an axis only widens downwards.
    limit = high - MAX_WIDENING * (high - low)
    low = min(low, *(v for p in points if (v := getattr(p, objective)) >= limit))
    padding = PADDING * (high - low)
    return low - padding, high + padding


def _within(value: float, domain: tuple[float, float]) -> bool:
    return domain[0] <= value <= domain[1]


def _looks(points: Sequence[Point]) -> tuple[alt.Color, alt.Shape, alt.Size, alt.Opacity]:
    """How a loss and a place on the front look, each with a legend of its own."""
    used = {p.settings["loss"] for p in points if p.trial_id != REFERENCE}
    losses = [name for name in (*KNOWN_LOSSES, *sorted(used - {*KNOWN_LOSSES})) if name in used]
    numbers = [(*KNOWN_LOSSES, *sorted(used - {*KNOWN_LOSSES})).index(name) for name in losses]
    colours, shapes = ([of[n % len(of)] for n in numbers] for of in (COLOURS, SHAPES))
    # Channels that share field, title and legend make one legend.
    of_loss = alt.Legend(title="loss", symbolOpacity=1, symbolSize=90)
    of_state = alt.Legend(title=None, symbolFillColor=GREY)
    states = [ON_FRONT, DOMINATED]
    return (
        alt.Color("loss:N", legend=of_loss).scale(domain=losses, range=colours),
        alt.Shape("loss:N", legend=of_loss).scale(domain=losses, range=shapes),
        alt.Size("state:N", legend=of_state).scale(domain=states, range=[120, 34]),
        alt.Opacity("state:N", legend=of_state).scale(domain=states, range=[1, 0.4]),
    )


def _title(front: Front, hidden: int) -> alt.TitleParams:
    failed = f", {front.failed} failed" if front.failed else ""
    lines = [
        f"Sweep {front.sweep}: {front.completed} trials completed{failed}. "
        f"{len(front.front)} of {len(front.points)} points are on the front.",
        f"Hypervolume {front.hypervolume:.3f}, 90 % interval {_interval(front.hypervolume_interval)}. "
        "All on validation pictures.",
    ]
    if hidden:
        lines.append(f"Dominated points too far from the front to be shown: {hidden}.")
    return alt.TitleParams("Robustness against retention", subtitle=lines)
