"""The parts of the report's page, as HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from clippo.evaluate.objectives import RETENTION
from clippo.front.charts import retention_range, selected
from clippo.front.counts import REFERENCE
from clippo.front.embedded import choices, titles_of
from clippo.front.front import Bounds, Front, Point
from clippo.front.plot import key_of
from clippo.front.table import knee, left_out_of, recommendation


def title(front: Front) -> str:
    return f"{escape(front.sweep)} · clippo"


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
    others = {"stopped early": front.stopped, "failed": front.failed}
    counted = "".join(f", {n} {what}" for what, n in others.items() if n)
    words += [f"{front.completed} trials{counted}", when]
    kind = f" <span>{escape(front.words.task)}</span>" if front.words.task else ""
    return (
        f"<h1>{escape(front.sweep)}{kind}</h1><p class='sub'>{' · '.join(escape(w) for w in words if w)}</p>"
    )


def verdict(front: Front) -> str:
    chosen, before = front.recommended, front.reference
    titles = titles_of(front)
    cells = []
    for name in (*front.objectives.names, *front.words.tiles):
        if name in chosen.test:
            shown = f"{titles.get(name, name)}, test"
            low, high = chosen.test_intervals[name]
            untouched = "1 by definition" if name == "retention" else f"{before.test[name]:.3f}"
            cells.append(
                f"<div class='tile'><b>{chosen.test[name]:.3f}</b><span>{escape(shown)}</span>"
                f"<small>90 %: {low:.3f} to {high:.3f}</small><small>untouched {untouched}</small></div>"
            )
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
    same += f"<p class='note'>{left_out_of(front)}</p>" if front.left_out else ""
    return (
        f"<p class='lead'><strong>Recommended:</strong> {_prose(recommendation(front))}</p>{same}"
        f"<p><strong>Knee:</strong> {_prose(knee(front))}</p><div class='tiles'>{''.join(cells)}</div>"
    )


def axes(front: Front) -> str:
    """What the two axes are."""
    return (
        f"{escape(front.words.explained)} Retention is the share of what the untouched model could do that "
        "is left; what lies left of the dotted line keeps less than is asked for. Lines are curves of "
        "interpolated weights; dashed ones are those of plain tuning."
    )


def unseen(front: Front) -> str:
    """What test pictures are."""
    return f"test pictures only report: {escape(front.words.unseen)} that neither tuning nor search saw"


def sliced(front: Front) -> str:
    """What the slices show."""
    goal = front.words.goal
    return f"{escape(goal[:1].upper() + goal[1:])} on validation pictures"


def curve(front: Front, charts: Iterable[str]) -> str:
    """The section with the curve of one trial; nothing without one."""
    if not (places := "".join(_place(n, " small") for n in charts if n.startswith("curve-"))):
        return ""
    chosen = front.recommended
    whose = "the recommended trial" if chosen.trial_id != REFERENCE else "the trial with the best goal"
    return (
        f"<section id='curve'><h2>Along the curve</h2><p>What the weights of {whose} reach on validation "
        "pictures between the untouched model, at 0, and the tuned one, at 1. The bands are 90 % intervals."
        f"</p><div class='grid'>{places}</div></section>"
    )


def _axis_titles(front: Front) -> tuple[str, ...]:
    goal = escape(front.words.goal)
    return goal, RETENTION, f"test {goal}", "test retention"


def comparisons(front: Front) -> str:
    titles = "".join(f"<th scope='col'>{title}</th>" for title in _axis_titles(front))
    head = (
        f"<tr><th scope='col'>method</th><th scope='col'>{escape(front.words.best)} that keeps "
        f"{front.min_retention:g}</th>{titles}"
        "<th scope='col'>hypervolume</th></tr>"
    )
    body = ""
    for c in front.comparisons:
        p, own = c.best, c is front.comparisons[0] or c.best.trial_id != REFERENCE
        named = "" if p.trial_id == REFERENCE else f"{p.trial_id} {p.variant}"
        cells = [
            _number(p.goal, p.goal_interval), _number(p.retention, p.retention_interval),
            *(_on_test(p, n) for n in front.objectives.names),
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
        f"<p>Preference optimisation adds {gain} to the hypervolume of all other methods together.</p>"
    )


def confirmations(front: Front) -> str:
    """What the search said of some points, and what a model trained once more says; nothing without."""
    again = [p for p in front.points if p.confirmed and p.on_front]
    if not again:
        return ""
    titles = ("point", *_axis_titles(front), f"fresh {escape(front.words.goal)}", "fresh retention")
    body = ""
    for p in again:
        cells = [
            _number(p.goal, p.goal_interval), _number(p.retention, p.retention_interval),
            *(_on_test(p, n) for n in front.objectives.names),
            *(_number(p.confirmed[n], p.confirmed_intervals[n]) for n in front.objectives.names),
        ]  # fmt: skip
        body += f"<tr><th scope='row'>{escape(key_of(p))}</th>"
        body += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th scope='col'>{title}</th>" for title in titles)
    return (
        "<section id='confirmed'><h2>Confirmed</h2><p>A search's own best numbers are optimistic. These "
        "settings were trained once more with a seed that the search did not use; fresh is what that gave on "
        "test pictures, which chose nothing.</p><div class='scroll' tabindex='0'><table><thead><tr>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def options(front: Front) -> str:
    """The points that the panel can show without a pointer."""
    marks = {key_of(front.knee): ", knee"} if front.knee else {}
    marks |= {key_of(front.recommended): ", recommended"}
    return "".join(
        f"<option value='{escape(key_of(p))}'>"
        f"{escape('untouched model' if p.trial_id == REFERENCE else key_of(p))}{marks.get(key_of(p), '')} "
        f"({p.retention:.2f}, {p.goal:.2f})</option>"
        for p in choices(front)
    )


def charts_of(charts: Iterable[str], prefix: str) -> str:
    """Places for the charts whose names begin so; empty without any."""
    return "".join(_place(name) for name in charts if name.startswith(prefix))


def slices_of(charts: Iterable[str]) -> str:
    """Places for the slices, a row for each setting; empty without any."""
    rows: dict[str, str] = {}
    for name in charts:
        if name.startswith("slice-"):
            setting = name.split("-")[1]
            rows[setting] = rows.get(setting, "") + _place(name, " small")
    return "".join(f"<div class='grid'>{places}</div>" for places in rows.values())


def _place(name: str, kind: str = "") -> str:
    return f"<div class='chart{kind}' data-chart='{escape(name)}'></div>"


def legend_of(front: Front) -> str:
    """The colours of the slices, with what they reach from and to."""
    measured = selected(front)
    if not measured:
        return ""
    low, high = retention_range(measured)
    return f": {low:.3f} <span class='legend'></span> {high:.3f}"


def provenance(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Versions and digests, all that occur, and the configuration but for where the results are."""
    names = {
        "code_version": "clippo",
        "git_commit": "commit",
        "packages_json": "packages",
        "model_digest": "model",
        "data_digest": "pictures",
        "prepared_digest": "prepared set",
        "device_type": "device",
        "precision": "precision",
        "optimizer": "optimizer",
        "batch_size": "batch size",
        "workers": "workers",
    }
    items = ""
    for column, title in names.items():
        values = sorted({_readable(str(r[column])) for r in rows if r.get(column) is not None})
        if values:
            items += f"<dt>{title}</dt><dd>{'<br>'.join(escape(v) for v in values)}</dd>"
    kept = {n: v for n, v in config.items() if n not in ("results", "usage")}
    text = escape(json.dumps(kept, indent=1, ensure_ascii=False))
    return f"<dl>{items}</dl><details><summary>configuration</summary><pre>{text}</pre></details>"


def _readable(text: str) -> str:
    """A value as it is read: versions in JSON become a list.

    >>> _readable('{"torch": "2.14", "ray": "2.60"}'), _readable("bf16")
    ('ray 2.60, torch 2.14', 'bf16')
    """
    if not text.startswith("{"):
        return text
    return ", ".join(f"{name} {version}" for name, version in sorted(json.loads(text).items()))


def _prose(text: str) -> str:
    return escape(text).replace(" %", "&nbsp;%")


def _on_test(point: Point, name: str) -> str:
    """A number on test pictures; only of points that were on the front when their trial ended is it there."""
    return _number(point.test[name], point.test_intervals[name]) if name in point.test else ""


def _number(value: float, interval: Bounds) -> str:
    return f"{value:.3f} <small>({interval[0]:.3f} to {interval[1]:.3f})</small>"
