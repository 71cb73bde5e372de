"""The picture of a front, from points made by hand."""

import dataclasses
import json
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clippo.errors import ConfigError, StoreError
from clippo.front.counts import REFERENCE
from clippo.front.front import PREFERENCE, TUNING, UNTOUCHED, Comparison, Front, Point
from clippo.front.plot import (
    COLOURS,
    DOMINATED,
    MANY,
    MOST_BARS,
    MOST_CURVES,
    ON_FRONT,
    WIDTH,
    X_TITLE,
    front_chart,
    key_of,
    save_chart,
)
from tests.front.sweeps import OBJECTIVES, WORDS


def make_point(
    trial_id: str, retention: float, robustness: float, *, loss: str = "dpo", on_front: bool = True,
    variant: str = "averaged",
) -> Point:  # fmt: skip
    test = {"robustness": robustness - 0.02, "retention": retention, "attack_success_rate": 0.25}
    untouched = trial_id == REFERENCE
    settings = {"loss": loss, "beta": 0.5, "kl_weight": 1.0, "learning_rate": 2e-4, "epochs": 2}
    return Point(
        trial_id=trial_id,
        trial_ids=[trial_id],
        variant=REFERENCE if untouched else variant,
        method=UNTOUCHED if untouched else TUNING if loss == "cross_entropy" else PREFERENCE,
        settings={} if untouched else settings,
        device_s=30.0,
        goal=robustness,
        goal_interval=(robustness - 0.03, robustness + 0.03),
        retention=retention,
        retention_interval=(retention - 0.01, min(retention + 0.01, 1)),
        on_front=on_front,
        feasible=retention >= 0.98,
        probability=0.8 if on_front else 0.1,
        chance=0.95,
        group=1 if on_front else 0,
        test=test,
        test_intervals={n: (v - 0.01, v + 0.01) for n, v in test.items()},
        confirmed={},
        confirmed_intervals={},
    )


def make_front(*more: Point, alone: bool = False) -> Front:
    tuned = [
        make_point("00001", 0.98, 0.55),
        make_point("00002", 0.93, 0.71, loss="kto"),
        make_point("cross_entropy", 0.95, 0.40, loss="cross_entropy", on_front=False),
    ]
    points = [make_point(REFERENCE, 1.0, 0.27), *([] if alone else tuned), *more]
    own = [p for p in points if p.method == TUNING]
    return Front(
        sweep="typo",
        objectives=OBJECTIVES,
        words=WORDS,
        points=points,
        hypervolume=0.7042,
        hypervolume_interval=(0.681, 0.733),
        completed=len(points) - 1,
        failed=2 if alone else 0,
        stopped=0,
        min_retention=0.98,
        recommended=points[0] if alone else points[1],
        alike=[],
        knee=None,
        comparisons=[
            Comparison(
                method=method, best=points[0], front=[points[0], *front], hypervolume=0.27,
                hypervolume_interval=(0.2, 0.3),
            )
            for method, front in ((UNTOUCHED, []), (TUNING, own))
        ],
        gain=0.1,
        gain_interval=(0.05, 0.15),
        device_s=90.0,
        repeated=0,
        seed_sd=(0.0, 0.0),
    )  # fmt: skip


def rows_of(front: Front) -> list[dict[str, Any]]:
    spec = front_chart(front).to_dict()
    return spec["datasets"][spec["data"]["name"]]


def axis_of(front: Front, axis: str) -> tuple[float, float]:
    layers = front_chart(front).to_dict()["layer"]
    domains = {tuple(layer["encoding"][axis]["scale"]["domain"]) for layer in layers}
    assert len(domains) == 1, "all layers must have the same axes"
    return domains.pop()


def test_png_is_sharp_at_700_pixels(tmp_path: Path) -> None:
    save_chart(front_chart(make_front()), tmp_path / "front.png")
    content = (tmp_path / "front.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert 2 * WIDTH < width <= 2 * 720
    assert 0.6 < height / width < 1


def test_svg_says_what_is_drawn(tmp_path: Path) -> None:
    save_chart(front_chart(make_front()), tmp_path / "front.SVG")
    svg = (tmp_path / "front.SVG").read_text(encoding="utf-8")
    words = [
        X_TITLE,
        WORDS.axis,
        UNTOUCHED,
        "recommended",
        ON_FRONT,
        DOMINATED,
        "dpo",
        "kto",
        "cross_entropy",
    ]
    words += ["Sweep typo: 3 trials completed. 3 of 4 points are on the front."]
    words += ["Hypervolume 0.704, 90 % interval 0.681 to 0.733."]
    assert [w for w in words if w not in svg] == []
    assert ">ipo<" not in svg, "the legend names only what was tried"


def test_html_needs_no_network(tmp_path: Path) -> None:
    save_chart(front_chart(make_front()), tmp_path / "front.html")
    html = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert WORDS.axis in html
    loaded: list[str] = []

    class Tags(HTMLParser):  # a pattern would also find what stands in the scripts
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loaded.extend(f"{tag} {value}" for name, value in attrs if name in ("src", "href"))

    Tags().feed(html)
    assert loaded == []


def test_every_point_is_in_the_data_with_its_tooltip() -> None:
    front = make_front()
    rows = rows_of(front)
    assert {(r["retention"], r["goal"]) for r in rows} == {(p.retention, p.goal) for p in front.points}
    assert [r["trial"] for r in rows if r["untouched"]] == [UNTOUCHED]
    row = next(r for r in rows if r["trial"] == "00002")
    assert row["setting"] == "kto beta 0.5 x2 kl 1 lr 2e-4"
    assert row["variant"] == "averaged"
    assert row["goal_text"] == "0.710 (0.680 to 0.740)"
    assert row["test_attack_success_rate"] == "0.250"
    assert row["test_reading_accuracy"] == "not measured"
    assert row["export"] == "--trial 00002 --variant averaged"


def test_axes_show_the_front_and_not_the_empty_rest() -> None:
    front = make_front()
    low, high = axis_of(front, "x")
    assert 0.88 < low < 0.92
    assert 1 < high < 1.02
    low, high = axis_of(front, "y")
    assert 0.2 < low < 0.24
    assert 0.74 < high < 0.8


def test_a_trial_that_lost_everything_does_not_squeeze_the_front() -> None:
    lost = make_point("00004", 0.05, 0.02, on_front=False)
    front = make_front(lost)
    assert axis_of(front, "x") == axis_of(make_front(), "x")
    assert axis_of(front, "y") == axis_of(make_front(), "y")
    assert len(rows_of(front)) == 4
    assert "too far from the front to be shown: 1." in json.dumps(front_chart(front).to_dict()["title"])


def test_the_edge_steps_down_along_the_front() -> None:
    spec = front_chart(make_front()).to_dict()
    edge = spec["datasets"][spec["layer"][1]["data"]["name"]]
    left, bottom = axis_of(make_front(), "x")[0], axis_of(make_front(), "y")[0]
    corners = [(left, 0.71), (0.93, 0.71), (0.98, 0.55), (1.0, 0.27), (1.0, bottom)]
    assert [(c["retention"], c["goal"]) for c in edge] == corners


def test_what_is_infeasible_lies_left_of_a_rule() -> None:
    low, high = axis_of(make_front(), "x")
    for bound, drawn in ((0.98, True), (low, False), (high + 0.01, False)):
        spec = front_chart(dataclasses.replace(make_front(), min_retention=bound)).to_dict()
        rules = [layer for layer in spec["layer"] if layer["mark"]["type"] == "rule"]
        assert [spec["datasets"][rule["data"]["name"]][0]["retention"] for rule in rules] == [bound] * drawn
        assert (f"keeps less than {bound:g}" in json.dumps(spec)) is drawn


def test_a_loss_keeps_its_look_whatever_else_is_drawn() -> None:
    def looks(front: Front) -> dict[str, tuple[str, str]]:
        encoding = next(
            e for layer in front_chart(front).to_dict()["layer"] if "shape" in (e := layer["encoding"])
        )
        color, shape = encoding["color"]["scale"], encoding["shape"]["scale"]
        return dict(zip(color["domain"], zip(color["range"], shape["range"], strict=True), strict=True))

    without, others = looks(make_front()), [make_point(str(i), 0.9, 0.3, loss=f"own{i}") for i in range(2)]
    with_more = looks(make_front(*others))
    assert with_more.items() > without.items()
    colours, shapes = zip(*with_more.values(), strict=True)
    assert len(set(colours)) == len(set(shapes)) == 5, "neither needs the other to tell losses apart"


# Machado, Oliveira and Fernandes, IEEE TVCG 2009, severity 1: linear RGB as seen without one cone.
SIGHT = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
    ],
}  # fmt: skip


def oklab(colours: list[str], sight: str) -> np.ndarray:
    """Colours as they are seen, (C, 3), on a scale of equal differences (Ottosson 2020)."""
    encoded = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(SIGHT[sight]), 0, 1)
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]  # fmt: skip
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]  # fmt: skip
    return np.cbrt(seen @ np.transpose(to_lms)) @ np.transpose(to_lab)


def closest(colours: list[str], sight: str) -> float:
    lab = oklab(colours, sight)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return float(apart[np.triu_indices(len(colours), 1)].min())


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart_whoever_looks(sight: str) -> None:
    """0.02 is about what can be told apart side by side; marks in a chart need several times that."""
    assert closest(list(COLOURS), sight) > 0.07
    assert oklab(["#ffffff"], sight)[0] == pytest.approx([1, 0, 0], abs=1e-3), "white is white to all"


def test_red_and_green_of_one_lightness_would_not() -> None:
    assert closest(["#C04000", "#5E8000"], "usual") > 0.2
    assert closest(["#C04000", "#5E8000"], "deuteranopia") < 0.02


def steps(trial_id: str, loss: str = "dpo", on_front: bool = True) -> list[Point]:
    return [
        make_point(
            trial_id, 1 - 0.02 * i, 0.27 + 0.2 * i, loss=loss, on_front=on_front, variant=f"alpha=0.{3 * i}"
        )
        for i in (1, 2)
    ]


def lines_of(front: Front) -> dict[str, dict[str, Any]]:
    """The rows of each curve, by trial; whether it is drawn plainly is that of its layer."""
    spec = front_chart(front).to_dict()
    layers = [la for la in spec["layer"] if "detail" in la["encoding"]]
    assert [la["mark"]["opacity"] for la in layers] == [0.3, 0.9]
    rows: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for row in spec["datasets"][layer["data"]["name"]]:
            curve = rows.setdefault(
                row["trial"], {"plain": layer["mark"]["opacity"] > 0.5, "kind": row["kind"], "at": []}
            )
            curve["at"].append((row["position"], row["retention"]))
    return rows


def test_curves_begin_at_the_untouched_model_and_baselines_are_dashed() -> None:
    more = [*steps("00001"), *steps("00002", "kto"), *steps("cross_entropy", "cross_entropy", on_front=False)]
    lines = lines_of(make_front(*more))
    assert {i: (c["kind"], c["plain"]) for i, c in lines.items()} == {
        "00001": ("tuned", True),  # recommended
        "00002": ("tuned", False),
        "cross_entropy": ("baseline", True),
    }
    assert sorted(lines["00001"]["at"]) == [(0.0, 1.0), (0.3, 0.98), (0.6, 0.96), (1.0, 0.98)]


def test_few_curves_and_few_bars() -> None:
    many = [p for i in range(10, 40) for p in steps(f"{i:05d}")]
    front = make_front(*many)
    assert len(lines_of(front)) == MOST_CURVES
    assert sum(r["barred"] for r in rows_of(front)) == MOST_BARS
    assert any(r["barred"] for r in rows_of(front) if r["key"] == key_of(front.recommended))


def test_of_points_on_each_other_one_is_drawn() -> None:
    twins = [make_point(f"{i:05d}", 0.9, 0.3, on_front=False) for i in range(10, 6000)]
    others = [make_point("06000", 0.9, 0.3, loss="ipo", on_front=False)]
    assert len(rows_of(make_front(*twins, *others))) == 4 + 2


def test_of_many_points_dominated_steps_of_curves_are_left_out() -> None:
    apart = [make_point(f"{i:05d}", 0.93 + i / 20_000, 0.3, on_front=False) for i in range(MANY)]
    step = make_point("02000", 0.95, 0.35, on_front=False, variant="alpha=0.5")
    ended = make_point("02000", 0.95, 0.36, on_front=False, variant="last")
    keys = {r["key"] for r in rows_of(make_front(*apart, step, ended))}
    assert key_of(ended) in keys
    assert key_of(step) not in keys
    assert key_of(step) in {r["key"] for r in rows_of(make_front(step, ended))}


def test_the_untouched_model_alone_can_be_drawn(tmp_path: Path) -> None:
    save_chart(front_chart(make_front(alone=True)), tmp_path / "front.svg")
    svg = (tmp_path / "front.svg").read_text(encoding="utf-8")
    assert "0 trials completed, 2 failed" in svg
    assert ">recommended<" not in svg


@pytest.mark.parametrize("name", ["front.jpg", "front", ".png"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*end it in \.png or \.svg or \.html$"):
        save_chart(front_chart(make_front()), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^cannot write [^\n]*No such file or directory; [^\n]*exists"):
        save_chart(front_chart(make_front()), tmp_path / "missing" / "front.svg")
