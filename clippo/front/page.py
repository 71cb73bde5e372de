"""The parts of the report's page, as HTML, and the data that its script shows."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

import altair as alt
import vl_convert

from clippo.front.counts import AVERAGED, REFERENCE
from clippo.front.plot import key_of
from clippo.front.points import (
    Bounds,
    Front,
    Point,
    describe,
    export_flags,
    well_spread,
)
from clippo.front.table import knee, recommendation

def pick(point: Point, command: str) -> dict[str, Any]:
    """What the panel says of one point."""
    untouched = point.trial_id == REFERENCE
    names = {
        "robustness": "robustness",
        "retention": "retention",
        "attack_success_rate": "attacks that succeed",
        "clean_accuracy": "clean accuracy",
        "reading_accuracy": "word reading",
        "nonsense_accuracy": "with a nonsense word",
    }
    names |= {n: n.replace("_", " ") for n in point.test if "/" in n}
    return {
        "title": "untouched model" if untouched else f"{point.trial_id}, {point.variant}",
        "setting": "as it was pretrained" if untouched else describe(point.settings),
        "front": point.on_front,
        "numbers": [
            ["validation", "robustness", _number(point.robustness, point.robustness_interval)],
            ["validation", "retention", _number(point.retention, point.retention_interval)],
            *(
                ["test", title, _number(point.test[n], point.test_intervals[n])]
                for n, title in names.items()
                if n in point.test
            ),
        ],
        "probability": f"{point.probability:.2f}",
        "seeds": len(point.trial_ids),
        "cost": "" if untouched else f"{point.device_s / 60:.1f} device-minutes",
        "command": ""
        if untouched
        else f"{command} {export_flags(point.trial_id, point.variant)} --out model.safetensors",
    }


TRIAL_COLUMNS = (
    ("trial", "text"), ("status", "text"), ("loss", "text"), ("beta", "number"), ("KL weight", "number"),
    ("learning rate", "number"), ("epochs", "number"), ("seed", "number"), ("robustness", "share"),
    ("retention", "share"), ("test robustness", "share"), ("test retention", "share"),
    ("test attacks that succeed", "share"), ("points on the front", "number"), ("device s", "number"),
    ("error", "text"),
)  # fmt: skip


def trial_table(front: Front, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All trials: what they were, and what their averaged weights reach."""
    averaged = {i: p for p in front.points if p.variant in (AVERAGED, REFERENCE) for i in p.trial_ids}
    on_front = Counter(p.trial_id for p in front.front)
    found = []
    for row in sorted(rows, key=lambda r: (r["trial_id"] != REFERENCE, r["trial_id"])):
        p = averaged.get(row["trial_id"])
        test = p.test if p else {}
        numbers = (
            p and p.robustness, p and p.retention, test.get("robustness"), test.get("retention"),
            test.get("attack_success_rate"),
        )  # fmt: skip
        found.append(
            [
                row["trial_id"], row["status"], row["loss"], row["beta"], row["kl_weight"],
                row["learning_rate"], row["epochs"], row["seed"],
                *(None if n is None else round(n, 4) for n in numbers),
                on_front[row["trial_id"]], row["device_s"] and round(row["device_s"], 1), row["error"] or "",
            ]
        )  # fmt: skip
    return {"columns": [{"name": n, "kind": k} for n, k in TRIAL_COLUMNS], "rows": found}


def head(front: Front, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    model = config.get("model", {})
    name = " ".join(str(model[n]) for n in ("name", "pretrained") if model.get(n))
    days = sorted(r["finished_at"].strftime("%Y-%m-%d") for r in rows if r["finished_at"])
    when = "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    words = [
        name,
        f"{model.get('trainable', '')} trained",
        f"pictures: {config.get('data', {}).get('source', '')}",
    ]
    words += [f"{front.completed} trials" + (f", {front.failed} failed" if front.failed else ""), when]
    return f"<h1>{escape(front.sweep)}</h1><p class='sub'>{' · '.join(escape(w) for w in words if w)}</p>"


def verdict(front: Front, command: str) -> str:
    chosen, before = front.recommended, front.reference
    tiles = [
        ("robustness, test", chosen.test["robustness"], before.test["robustness"]),
        ("retention, test", chosen.test["retention"], None),
        (
            "attacks that succeed, test",
            chosen.test["attack_success_rate"],
            before.test["attack_success_rate"],
        ),
        ("word reading, test", chosen.test.get("reading_accuracy"), before.test.get("reading_accuracy")),
    ]
    cells = [
        f"<div class='tile'><b>{value:.3f}</b><span>{escape(name)}</span>"
        + (
            f"<small>untouched {old:.3f}</small>"
            if old is not None
            else "<small>untouched 1 by definition</small>"
        )
        + "</div>"
        for name, value, old in tiles
        if value is not None
    ]
    low, high = front.hypervolume_interval
    cells.append(
        f"<div class='tile'><b>{front.hypervolume:.3f}</b><span>hypervolume, validation</span>"
        f"<small>90 %: {low:.3f} to {high:.3f}</small></div>"
    )
    rate = front.gained_per_device_hour
    per_hour = "" if rate is None else f"<small>{rate:.3g} hypervolume gained per hour</small>"
    cells.append(
        f"<div class='tile'><b>{front.device_s / 3600:.3g}</b><span>device-hours</span>{per_hour}</div>"
    )
    alike = ", ".join(f"{p.trial_id} {p.variant}" for p in front.alike[:8])
    more = f" and {len(front.alike) - 8} more" if len(front.alike) > 8 else ""
    same = f"<p class='note'>Not told apart from it: {escape(alike + more)}.</p>" if front.alike else ""
    return (
        f"<p class='lead'><strong>Recommended:</strong> {escape(recommendation(front))}</p>{same}"
        f"<p><strong>Knee:</strong> {escape(knee(front))}</p><div class='tiles'>{''.join(cells)}</div>"
    )


def comparisons(front: Front) -> str:
    head = (
        "<tr><th scope='col'>method</th><th scope='col'>most robust that keeps "
        f"{front.min_retention:g}</th><th scope='col'>robustness</th><th scope='col'>retention</th>"
        "<th scope='col'>test robustness</th><th scope='col'>test retention</th>"
        "<th scope='col'>hypervolume</th></tr>"
    )
    body = ""
    for c in front.comparisons:
        p, own = c.best, c is front.comparisons[0] or c.best.trial_id != REFERENCE
        named = "" if p.trial_id == REFERENCE else f"{p.trial_id} {p.variant}"
        cells = [
            _number(p.robustness, p.robustness_interval), _number(p.retention, p.retention_interval),
            *(_number(p.test[n], p.test_intervals[n]) for n in ("robustness", "retention")),
        ]  # fmt: skip
        cells = cells if own else ["", "", "", ""]
        body += (
            f"<tr><th scope='row'>{escape(c.method)}</th><td>{escape(named if own else 'none')}</td>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f"<td>{_number(c.hypervolume, c.hypervolume_interval)}</td></tr>"
        )
    gain = _number(front.gain, front.gain_interval)
    return (
        f"<div class='scroll' tabindex='0'><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
        f"<p>Preference optimisation adds {gain} to the hypervolume that the other methods reach together.</p>"
    )


def options(front: Front) -> str:
    """The points that the panel can show without a pointer."""
    marks = {key_of(front.recommended): " (recommended)"}
    if front.knee:
        marks.setdefault(key_of(front.knee), " (knee)")
    points = {key_of(p): p for p in (*well_spread(front, 10_000), *(c.best for c in front.comparisons))}
    return "".join(
        f"<option value='{escape(key)}'>retention {p.retention:.3f}, robustness {p.robustness:.3f}: "
        f"{escape('untouched model' if p.trial_id == REFERENCE else key)}{marks.get(key, '')}</option>"
        for key, p in sorted(points.items(), key=lambda item: -item[1].retention)
    )


def section_of(chart: Any, name: str, otherwise: str) -> str:
    return otherwise if chart is None else f"<div class='chart' data-chart='{name}'></div>"


def few_trials(front: Front) -> str:
    return (
        f"<p>With {len(_selected(front))} completed trials nothing can be said yet; it takes "
        f"{MIN_IMPORTANCE_TRIALS}.</p>"
    )


def slices(names: Sequence[str]) -> str:
    charts = "".join(f"<div class='chart small' data-chart='{escape(name)}'></div>" for name in names)
    return (
        f"<div class='grid'>{charts}</div>"
        if charts
        else "<p>No two trials differ in these settings yet.</p>"
    )


def gallery(examples: Sequence[Mapping[str, Any]]) -> str:
    """Attacked pictures with what the models said; nothing without pictures."""
    if not examples:
        return ""
    names = {"reference": "untouched"}
    figures = ""
    for row in examples:
        picture = base64.b64encode(row["picture"]).decode()
        said = ""
        for model, answer in json.loads(row["predictions_json"]).items():
            right = answer == row["label"]
            kind = "right" if right else "fooled" if answer == row["attack_word"] else "wrong"
            said += (
                f"<li class='{kind}'><span>{escape(names.get(model, model).replace('_', '-'))}</span> "
                f"{escape(answer)} <em>{kind}</em></li>"
            )
        alt_text = f"{row['label']} with the word {row['attack_word']} on it"
        figures += (
            f"<figure><img loading='lazy' alt='{escape(alt_text)}' "
            f"src='data:{_media_type(row['picture'])};base64,{picture}'>"
            f"<figcaption><b>{escape(row['label'])}</b>, word: {escape(row['attack_word'])}"
            f"<ul>{said}</ul></figcaption></figure>"
        )
    return (
        "<section id='gallery'><h2>What the models say</h2><p>Attacked test pictures in the order in which they "
        "come, right and wrong alike: the true class, the word that is written on it, and each model's answer. "
        f"</p><div class='gallery'>{figures}</div></section>"
    )


def _media_type(picture: bytes) -> str:
    """
    >>> _media_type(b"RIFF....WEBP"), _media_type(bytes([137]) + b"PNG"), _media_type(bytes([255, 216]))
    ('image/webp', 'image/png', 'image/jpeg')
    """
    if picture[8:12] == b"WEBP":
        return "image/webp"
    return "image/png" if picture[1:4] == b"PNG" else "image/jpeg"


def provenance(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Versions and digests, all that occur, and the configuration but for where the results are."""
    names = {
        "code_version": "clippo", "git_commit": "commit", "packages_json": "packages", "model_digest": "model",
        "data_digest": "pictures", "prepared_digest": "prepared set", "device_type": "device",
        "precision": "precision", "optimizer": "optimizer", "batch_size": "batch size", "workers": "workers",
    }  # fmt: skip
    items = ""
    for column, title in names.items():
        values = sorted({str(r[column]) for r in rows if r.get(column) is not None})
        if values:
            items += f"<dt>{title}</dt><dd>{'<br>'.join(escape(v) for v in values)}</dd>"
    kept = {n: v for n, v in config.items() if n != "results"}
    text = escape(json.dumps(kept, indent=1, ensure_ascii=False))
    return f"<dl>{items}</dl><details><summary>configuration</summary><pre>{text}</pre></details>"


def _number(value: float, interval: Bounds) -> str:
    return f"{value:.3f} <small>({interval[0]:.3f} to {interval[1]:.3f})</small>"


def embedded(data: Any) -> str:
    """Data in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@lru_cache(maxsize=1)
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed."""
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", _vegalite_version())
    return script.replace("</script", "<\\/script")


def _vegalite_version() -> str:
    """The version that Altair writes, as vl-convert names it."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
