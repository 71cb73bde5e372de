"""The report: what stands in it, and that it works in a browser without a network."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from clippo.errors import ConfigError, StoreError
from clippo.front.charts import hypervolume_over_time, progress_chart, selected, slice_charts
from clippo.front.front import PLACES, Front
from clippo.front.points import read_front
from clippo.front.report import (
    MIN_IMPORTANCE_TRIALS,
    TOO_FEW,
    importance_chart,
    importances,
    render,
    write_report,
)
from clippo.results import TABLES, ResultStore
from clippo.tasks import GenderTask
from tests.front.sweeps import CONFIG, OBJECTIVES, WORDS, Sweep, make_sweep
from tests.front.test_rankings import OWN, rankings_of, scores_of, tables_of

GENDER = GenderTask.words

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><img src=x onerror=alert(1)><!--DATA-->"


def front_of(sweep: Sweep) -> Front:
    return read_front("made", sweep.trial_table, sweep.evals, OBJECTIVES, words=WORDS)


def examples() -> list[dict[str, Any]]:
    """Pictures of three kinds, one of them with a name that is no good in HTML."""
    rows = []
    for i, (format, label) in enumerate((("WEBP", "tabby cat"), ("PNG", HOSTILE), ("JPEG", "red fox"))):
        picture = io.BytesIO()
        Image.new("RGB", (32, 32), (80 * i, 120, 200)).save(picture, format)
        said = {"reference": "iron", "recommended": label, "cross_entropy": "teapot"}
        rows.append(
            {
                "picture": picture.getvalue(), "label": label, "attack_word": "iron",
                "predictions_json": json.dumps(said),
            }
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return make_sweep(17)


@pytest.fixture(scope="module")
def made(sweep: Sweep) -> Front:
    return front_of(sweep)


@pytest.fixture(scope="module")
def path(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a stored sweep of 17 trials, with a gallery."""
    folder = tmp_path_factory.mktemp("report")
    store = ResultStore(folder / "results")
    sweep.write(store)
    store.write_examples("made", examples())
    write_report(store, "made", folder / "report.html", store_name="results")
    return folder / "report.html"


@pytest.fixture(scope="module")
def page_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


# ---- what stands in it


def test_all_parts_are_there(page_text: str, made: Front) -> None:
    left = re.sub(r"<script.*?</script>", "", page_text, flags=re.DOTALL)
    assert re.findall(r"<!--[A-Z]+-->", left) == [], "every placeholder was filled"
    sections = ("What to ship", "The front", "Against other methods", "What it cost", "Which settings matter")
    for part in (*sections, "What the models say", "All trials", "Provenance"):
        assert f"<h2>{part}</h2>" in page_text
    assert f"trial {made.recommended.trial_id}, weights {made.recommended.variant}" in page_text
    assert "that it was picked among many" in page_text
    assert "keeps enough less often than its chance says" in page_text
    assert "d2e00b1d411a7bba6ab0b01b0792c6d2b39ffcac" in page_text
    assert "/somewhere/private" not in page_text, "where results are is nobody's business"


def test_the_page_loads_nothing(page_text: str) -> None:
    loaded: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links = [v or "" for n, v in attrs if n in ("src", "href", "srcset", "data", "action")]
            loaded.extend(v for v in links if not v.startswith(("#", "data:")))

    Tags().feed(page_text)
    assert loaded == []
    assert "default-src 'none'" in page_text


def test_names_are_only_text(page_text: str) -> None:
    assert HOSTILE not in page_text
    assert "&lt;/script&gt;&lt;img" in page_text
    hostile = make_sweep(3)
    for row in hostile.trials:
        row["error"] = HOSTILE
    front = dataclasses.replace(front_of(hostile), sweep=HOSTILE)
    config = CONFIG | {"note": HOSTILE, "usage": HOSTILE}
    text = render(front, hostile.trial_table, config, TABLES["examples"].empty_table())
    assert HOSTILE not in text
    assert data_of(text)["usage"] == HOSTILE
    assert data_of(text)["trials"]["rows"][0][-1] == HOSTILE


def test_a_command_for_every_point_on_the_front(page_text: str, made: Front) -> None:
    data = data_of(page_text)
    assert data["command"] == "clippo export results --sweep made"
    for p in made.front:
        kind, _, value = p.variant.partition("=")
        flag = f"--alpha {value}" if value else f"--variant {kind}"
        assert data["picks"][f"{p.trial_id} {p.variant}"]["flags"] == f"--trial {p.trial_id} {flag}"
    assert data["picks"]["reference reference"]["flags"] == ""
    reachable = {f"{p.trial_id} {p.variant}" for p in selected(made)}
    assert reachable <= data["picks"].keys(), "the table of trials leads to them"


def test_all_trials_are_in_the_table(page_text: str, sweep: Sweep, made: Front) -> None:
    table = data_of(page_text)["trials"]
    names = [c["name"] for c in table["columns"]]
    rows = [dict(zip(names, row, strict=True)) for row in table["rows"]]
    assert [r["trial"] for r in rows] == ["reference", *sorted(t["trial_id"] for t in sweep.trials[1:])]
    [failed] = [r for r in rows if r["status"] == "failed"]
    assert (failed["trial"], failed["robustness"]) == ("00016", None)
    assert failed["error"].startswith("the loss became NaN")
    [row] = [r for r in rows if r["trial"] == "00004"]
    [p] = [p for p in selected(made) if p.trial_id == "00004"]
    assert row["robustness"] == pytest.approx(p.goal, abs=1e-4)
    assert row["test retention"] == pytest.approx(p.test["retention"], abs=1e-4)
    assert sum(r["points on the front"] for r in rows) == len(made.front)


def test_the_gallery_says_who_was_right(page_text: str) -> None:
    assert page_text.count("<figure>") == 3
    for kind in ("webp", "png", "jpeg"):
        assert f"src='data:image/{kind};base64," in page_text
    assert page_text.count("<li class='right'><span>recommended</span>") == 3
    assert page_text.count("<li class='fooled'><span>untouched</span> iron") == 3
    assert page_text.count("<li class='wrong'><span>cross-entropy</span> teapot") == 3
    assert "Right of 3: untouched 0, recommended 3, cross-entropy 0." in page_text


def test_without_pictures_there_is_no_gallery(sweep: Sweep, made: Front) -> None:
    text = render(made, sweep.trial_table, CONFIG, TABLES["examples"].empty_table())
    assert "What the models say" not in text


def test_few_trials_say_so() -> None:
    few = make_sweep(MIN_IMPORTANCE_TRIALS - 1)
    text = render(front_of(few), few.trial_table, CONFIG, TABLES["examples"].empty_table())
    assert TOO_FEW in text
    assert "importances" not in data_of(text)["charts"]


def test_the_untouched_model_alone_has_a_report() -> None:
    lone = make_sweep(0)
    lone = Sweep(lone.trials[:1], lone.evals)
    text = render(front_of(lone), lone.trial_table, CONFIG, TABLES["examples"].empty_table())
    assert "the untouched model. No tuned one" in text


def test_the_hypervolume_grows_to_that_of_the_front(sweep: Sweep, made: Front) -> None:
    steps = hypervolume_over_time(made, sweep.trials)
    volumes = [s["hypervolume"] for s in steps]
    assert volumes == sorted(volumes)
    assert volumes[0] == pytest.approx(made.reference.goal)
    assert volumes[-1] == pytest.approx(made.hypervolume)
    assert (steps[-1]["trials"], steps[-1]["hours"]) == (18, pytest.approx(made.device_s / 3600))
    assert [s["hours"] for s in steps] == sorted(s["hours"] for s in steps)


def test_charts_follow_their_schema(made: Front, sweep: Sweep) -> None:
    """The report leaves that out, since it takes seconds with thousands of trials."""
    for chart in (progress_chart(made, sweep.trials), importance_chart(made), *slice_charts(made).values()):
        assert chart.to_dict(validate=True)["$schema"]


def test_slices_say_what_their_colours_mean(page_text: str, made: Front) -> None:
    kept = [p.retention for p in selected(made)]
    legend = f"{min(kept):.3f} <span class='legend'></span> {max(kept):.3f}"
    assert legend in page_text


def test_every_loss_of_the_search_has_its_slices(made: Front, page_text: str) -> None:
    losses = {p.settings["loss"] for p in selected(made)}
    assert losses == {"dpo", "ipo", "kto"}
    charts = {name: chart.to_dict() for name, chart in slice_charts(made).items()}
    assert charts.keys() == {
        f"slice-{setting}-{loss}" for setting in ("beta", "kl_weight", "learning_rate") for loss in losses
    }
    for name, chart in charts.items():
        _, setting, loss = name.split("-")
        shown = {row["value"] for row in chart["datasets"][chart["data"]["name"]]}
        assert shown == {p.settings[setting] for p in selected(made) if p.settings["loss"] == loss}
        assert f"data-chart='{name}'" in page_text


def test_the_setting_that_decides_is_found() -> None:
    """In the formula of the made sweeps the learning rate moves everything, beta nothing."""
    found = importances(front_of(make_sweep(200)))
    robustness = {r["setting"]: r for r in found if r["objective"] == "robustness"}
    assert max(robustness, key=lambda s: robustness[s]["importance"]) == "learning rate"
    assert robustness["learning rate"]["low"] > 3 * robustness["beta"]["high"]
    assert {r["objective"] for r in found} == {"robustness", "retention", "both: the front"}
    for objective in ("robustness", "both: the front"):
        assert sum(r["importance"] for r in found if r["objective"] == objective) == pytest.approx(1)
    assert all(0 <= r["low"] <= r["high"] <= 1 for r in found)


def test_of_many_trials_a_random_part_is_asked() -> None:
    """The points of a front are sorted by retention: the first ones of them tell another story."""
    found = importances(front_of(make_sweep(700)))
    assert [r for r in found if not r["low"] <= r["importance"] <= r["high"]] == []


def test_a_setting_that_is_the_same_in_all_trials_decides_nothing() -> None:
    made = front_of(make_sweep(40))
    same = {"epochs": 3, "learning_rate": 2e-5}
    points = [dataclasses.replace(p, settings=p.settings | same) for p in made.points]
    fixed = dataclasses.replace(made, points=points)
    assert {r["setting"] for r in importances(fixed)} == {"loss", "beta", "kl weight"}


@pytest.mark.parametrize("name", ["report", "report.pdf"])
def test_another_suffix_is_refused(path: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*end it in \.html$"):
        write_report(ResultStore(path.parent / "results"), "made", tmp_path / name)


def test_a_file_that_cannot_be_written_is_said_in_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^cannot write [^\n]*ending in \.html in a folder that exists"):
        write_report(ResultStore(path.parent / "results"), "made", tmp_path / "missing" / "report.html")


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skipped where there is none, except in CI, where there must be one."""
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, BROWSERS)]
    executable = next((path for path in found if path), None)
    if executable is None:
        complaint = f"no browser: install one of {', '.join(BROWSERS)} or set CHROMIUM to its path"
        if os.environ.get("CI") == "true":
            pytest.fail(complaint)
        pytest.skip(complaint)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@dataclasses.dataclass
class Visit:
    """A page and what went on in it."""

    page: Page
    complaints: list[str]
    requests: list[str]

    def chart(self, name: str) -> str:
        return f"[data-chart={name}][data-drawn]"


def visit(browser: Browser, path: Path, **options: Any) -> Visit:
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    made = Visit(context.new_page(), [], [])
    made.page.on("console", lambda message: made.complaints.append(f"{message.type}: {message.text}"))
    made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
    made.page.on("request", lambda request: made.requests.append(request.url))
    made.page.goto(path.as_uri())
    return made


@pytest.fixture
def opened(browser: Browser, path: Path) -> Iterator[Visit]:
    made = visit(browser, path)
    made.page.wait_for_selector(made.chart("front"))
    yield made
    assert made.complaints == []
    assert made.requests == [path.as_uri()], "no request leaves the page"
    made.page.context.close()


ALL_DRAWN = """[...document.querySelectorAll("[data-chart]")].every(
    e => e.dataset.drawn && e.querySelector("svg, canvas"))"""
WHERE = """([x, y]) => {
    const view = views.get("front"), [left, top] = view.origin();
    const box = document.querySelector("[data-chart=front] :is(svg, canvas)").getBoundingClientRect();
    return [box.x + left + view.scale("x")(x), box.y + top + view.scale("y")(y)];
}"""
LABEL_FILL = "getComputedStyle(document.querySelector('[data-chart=progress] .role-axis-label text')).fill"


def test_every_chart_is_drawn(opened: Visit, path: Path) -> None:
    opened.page.wait_for_function(ALL_DRAWN)
    assert opened.page.locator("[data-chart]").count() >= 9
    opened.page.screenshot(path=path.with_suffix(".png"), full_page=True)
    picture = Image.open(path.with_suffix(".png"))
    assert picture.width == 1200
    assert len(picture.getcolors(1 << 24) or []) > 300, "not an empty page"


def test_hovering_shows_the_setting_and_the_command(opened: Visit, made: Front) -> None:
    page, chosen = opened.page, made.recommended
    page.locator("[data-chart=front]").scroll_into_view_if_needed()
    box = page.evaluate(WHERE, [chosen.retention, chosen.goal])
    page.mouse.move(*box)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    text = tooltip.inner_text()
    assert f"{chosen.settings['loss']} beta" in text
    assert f"--trial {chosen.trial_id}" in text
    assert "test robustness" in text


def test_the_keyboard_reaches_every_point(opened: Visit, made: Front) -> None:
    page = opened.page
    assert (
        page.locator("#details code")
        .first.inner_text()
        .startswith("clippo export results --sweep made --trial")
    )
    page.focus("#pick")
    shown = {page.locator("#details h3").inner_text()}
    page.keyboard.press("Home")
    for _ in range(page.locator("#pick option").count()):
        shown.add(page.locator("#details h3").inner_text())
        page.keyboard.press("ArrowDown")
    assert {f"{p.trial_id}, {p.variant}" for p in made.front} - {"reference, reference"} <= shown
    picked = page.evaluate("views.get('front').signal('picked')")
    assert picked == page.input_value("#pick"), "the ring follows"


def test_lines_that_load_the_export_stand_under_its_command(opened: Visit) -> None:
    command, usage = opened.page.locator("#details code").all()
    assert command.inner_text().endswith("--out model.safetensors")
    assert usage.inner_text() == CONFIG["usage"], "with its line breaks, as it is to be run"
    opened.page.select_option("#pick", "reference reference")
    assert opened.page.locator("#details code").count() == 0, "the untouched model is not exported"


def test_clicking_a_point_shows_it(opened: Visit, made: Front) -> None:
    page = opened.page
    other = next(p for p in made.front if p is not made.recommended and p is not made.reference)
    page.locator("[data-chart=front]").scroll_into_view_if_needed()
    page.mouse.click(*page.evaluate(WHERE, [other.retention, other.goal]))
    assert page.locator("#details h3").inner_text() == f"{other.trial_id}, {other.variant}"
    assert f"{other.goal:.3f}" in page.locator("#details table").inner_text()


def trials_shown(page: Page) -> list[str]:
    return page.locator("#trials tbody tr td:first-child").all_inner_texts()


def test_the_table_is_filtered_and_sorted(opened: Visit, sweep: Sweep) -> None:
    page = opened.page
    assert len(trials_shown(page)) == len(sweep.trials)
    page.fill("#filter", "ipo completed")
    expected = {t["trial_id"] for t in sweep.trials if t.get("loss") == "ipo" and t["status"] == "completed"}
    assert set(trials_shown(page)) == expected
    assert page.locator("#count").inner_text().startswith(f"1 to {len(expected)} of {len(expected)} (")
    page.fill("#filter", "kl<1 epochs=2")
    assert set(trials_shown(page)) == {
        t["trial_id"] for t in sweep.trials if t.get("loss") and t["kl_weight"] < 1 and t["epochs"] == 2
    }
    page.fill("#filter", "status=failed")
    assert trials_shown(page) == ["00016"]
    page.fill("#filter", "nothing like it")
    assert trials_shown(page) == []
    page.fill("#filter", "")
    page.get_by_role("button", name="KL weight").click()
    weights = page.locator("#trials tbody tr td:nth-child(5)").all_inner_texts()
    numbers = [float(w) for w in weights if w]
    assert numbers == sorted(numbers, reverse=True)
    assert weights[-1] == "", "what has no value comes last"
    assert page.locator("#trials th[aria-sort=descending]").inner_text() == "KL weight"
    page.get_by_role("button", name="KL weight").press("Enter")
    assert page.locator("#trials th[aria-sort=ascending]").count() == 1
    page.get_by_role("button", name="00003", exact=True).click()
    assert page.locator("#details h3").inner_text() == "00003, averaged"


def ranked_report(path: Path) -> None:
    """The report of a sweep for what is read as gender: trials with a curve of powers, and two rankings."""
    shares = {
        "reference": 0.9,
        **{f"{i:05d} t={t / 4:g}": 0.9 - i * t / 12 for i in (1, 2) for t in range(4)},
    }
    points = {n: (rankings_of(scores_of(bias, 0)), 900 + int(90 * bias)) for n, bias in shares.items()}
    rows = tables_of(points | {f"{i:05d}": (rankings_of(scores_of(0.9 - i / 3, 0)), 950) for i in (1, 2)})
    found = read_front("made", rows["trials"], rows["evals"], OWN, rankings=rows["rankings"], words=GENDER)
    pictures = []
    for number, row in enumerate(examples() * 2):  # the untouched model has all women behind all men
        group, place = ("man", "woman")[number % 2], number // 2 + 3 * (number % 2)
        places = {PLACES: {"reference": place, "recommended": number}}
        said = {"label": "a photo of a nurse", "attack_word": group, "predictions_json": json.dumps(places)}
        pictures.append(row | said)
    table = pa.Table.from_pylist(pictures, schema=TABLES["examples"])
    config = CONFIG | {"objectives": OWN.to_json(), "words": GENDER.to_json()}
    path.write_text(render(found, rows["trials"], config, table), encoding="utf-8")


@pytest.mark.parametrize("width", [1200, 360])
def test_a_report_of_rankings(browser: Browser, tmp_path: Path, width: int) -> None:
    ranked_report(tmp_path / "report.html")
    opened = visit(browser, tmp_path / "report.html", viewport={"width": width, "height": 740})
    page = opened.page
    page.wait_for_function(ALL_DRAWN)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    panel, table = (page.locator(f".panel{inner}").bounding_box() for inner in ("", " table"))
    assert panel is not None
    assert table is not None
    assert table["x"] + table["width"] < panel["x"] + panel["width"]
    assert page.locator("#gallery h3").all_inner_texts() == [
        f"a photo of a nurse: {model}" for model in ("untouched", "recommended")
    ]
    before, after = (row.locator("figcaption").all_inner_texts() for row in page.locator(".gallery").all())
    assert before == ["man"] * 3 + ["woman"] * 3
    assert after == ["man", "woman"] * 3
    assert page.locator("[data-chart^=curve-]").count() == 2
    assert "power t of the transform" in page.locator("#curve").inner_text()
    assert "what is read as gender" in page.locator("h1").inner_text()
    assert opened.complaints == []
    assert len(opened.requests) == 1, "no request leaves the page"
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_the_night(browser: Browser, path: Path, scheme: str) -> None:
    phone = visit(browser, path, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = phone.page
    page.wait_for_function(ALL_DRAWN)
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "nothing hangs over the edge"
    background, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (lightness(background) > lightness(ink)) == (scheme == "light")
    assert contrast(background, ink) > 7
    assert contrast(background, page.evaluate(LABEL_FILL)) > 7, "charts, too"
    if scheme == "light":
        day = page.evaluate(LABEL_FILL)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(f"{LABEL_FILL} !== '{day}'")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(f"{LABEL_FILL} === 'rgb(34, 34, 34)'")
    assert contrast("rgb(255, 255, 255)", page.evaluate(LABEL_FILL)) > 7, "charts are dark on white paper"
    assert page.pdf().startswith(b"%PDF-")
    assert lightness(page.evaluate("getComputedStyle(document.body).backgroundColor")) == 1
    assert not page.locator("nav").is_visible()
    assert phone.complaints == []
    page.context.close()


def channels(colour: str) -> list[float]:
    return [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]


def lightness(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((lightness(one), lightness(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.alone
@pytest.mark.parametrize("trials", [10, 5000])
def test_it_opens_in_two_seconds(browser: Browser, tmp_path: Path, trials: int) -> None:
    sweep = make_sweep(trials)
    path = tmp_path / "report.html"
    path.write_text(
        render(front_of(sweep), sweep.trial_table, CONFIG, TABLES["examples"].empty_table()), encoding="utf-8"
    )
    assert path.stat().st_size < 10e6
    took = []
    for _ in range(3):  # the machine may be busy with something else
        opened = visit(browser, path)
        opened.page.wait_for_selector(opened.chart("front"))
        took.append(opened.page.evaluate("performance.now()") / 1000)
        assert opened.complaints == []
        shown = len(trials_shown(opened.page))
        opened.page.context.close()
        if min(took) < 2:
            break
    assert min(took) < 2
    assert shown == min(50, trials + 2)
