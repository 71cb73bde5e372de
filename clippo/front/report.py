"""A sweep as one HTML file that asks the network for nothing: what to choose, why, and all that was tried."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import optuna
import pyarrow as pa
import pyarrow.compute as pc
from altair.utils.schemapi import debug_mode
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from clippo.errors import ConfigError
from clippo.evaluate.objectives import RETENTION
from clippo.front import page
from clippo.front.charts import PROGRESS_COLUMNS, curve_charts, progress_chart, selected, slice_charts
from clippo.front.embedded import choices, embedded
from clippo.front.front import Front, Point
from clippo.front.gallery import gallery
from clippo.front.plot import COLOURS, INK, front_chart, key_of, styled, write_file
from clippo.front.points import front_of
from clippo.front.vega import bundle
from clippo.results import ResultStore

BOTH = "both: the front"
MIN_IMPORTANCE_TRIALS = 12
TOO_FEW = f"<p>It takes {MIN_IMPORTANCE_TRIALS} completed trials before anything can be said.</p>"
IMPORTANCE_RESAMPLES, IMPORTANCE_TRIALS = 20, 300


def write_report(
    store: ResultStore,
    sweep: str,
    path: Path,
    *,
    min_retention: float | None = None,
    store_name: str = "STORE",
) -> None:
    """Writes the report of a sweep to a file; as of `report_of`.

    Raises:
        StoreError: also when the file cannot be written.
        ConfigError: also when the file's name does not end in .html.
    """
    if path.suffix.lower() != ".html":
        raise ConfigError(f"{str(path)!r} is no report that can be made; end it in .html")
    text = report_of(store, sweep, min_retention=min_retention, store_name=store_name)
    write_file(path, text.encode(), ".html")


def report_of(
    store: ResultStore, sweep: str, *, min_retention: float | None = None, store_name: str = "STORE"
) -> str:
    """The report of a sweep, also while it still runs.

    Args:
        min_retention: as of `front_of`.
        store_name: how the commands in it call the store.

    Raises:
        StoreError: no such sweep, or nothing measured yet.
        ConfigError: ``min_retention`` is out of its bounds.
    """
    trials = store.trials(sweep)
    front = front_of(store, sweep, min_retention=min_retention, trials=trials)
    return render(front, trials, store.config(sweep) or {}, store.examples(sweep), store_name=store_name)


def render(
    front: Front,
    trials: pa.Table,
    config: Mapping[str, Any],
    examples: pa.Table,
    *,
    store_name: str = "STORE",
) -> str:
    """The page."""
    shown = trials
    if front.left_out:
        offered = pa.array([i for p in front.points for i in p.trial_ids], pa.string())
        shown = trials.filter(pc.is_in(trials["trial_id"], value_set=offered))
    rows = shown.to_pylist()
    # Altair would hold every value against its schema, several times; the tests do that.
    with debug_mode(False):
        charts = {
            "front": front_chart(front, width="container", title=False),
            "progress": progress_chart(front, trials.select(list(PROGRESS_COLUMNS)).to_pylist()),
            "importances": importance_chart(front),
            **curve_charts(front),
            **slice_charts(front),
        }
        drawn = {n: chart.to_dict(validate=False) for n, chart in charts.items() if chart is not None}
    command = f"clippo export {store_name} --sweep {front.sweep}"
    parts = {
        "TITLE": page.title(front),
        "AXES": page.axes(front),
        "UNSEEN": page.unseen(front),
        "HEAD": page.head(front, config, rows),
        "VERDICT": page.verdict(front),
        "CONFIRMED": page.confirmations(front),
        "COMPARISONS": page.comparisons(front),
        "PICKS": page.options(front),
        "IMPORTANCES": page.charts_of(drawn, "importances") or TOO_FEW,
        "CURVE": page.curve(front, drawn),
        "SLICED": page.sliced(front),
        "RETENTION": page.legend_of(front),
        "SLICES": page.slices_of(drawn) or "<p>No two trials differ in these settings yet.</p>",
        "GALLERY": gallery(examples.to_pylist(), front.words),
        "PROVENANCE": page.provenance(config, rows),
        "SCRIPTS": bundle(),
        "DATA": embedded(
            front, rows, drawn, [*selected(front), *choices(front)], command, config.get("usage", "")
        ),
    }
    text = resources.files("clippo.front").joinpath("report.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def importance_chart(front: Front) -> Any:
    """How much each setting decides; None with too few trials."""
    measured = selected(front)
    if len(measured) < MIN_IMPORTANCE_TRIALS:
        return None
    rows = importances(front)
    objectives = [front.words.goal, RETENTION, BOTH]
    order = [
        r["setting"] for r in sorted(rows, key=lambda r: -r["importance"]) if r["objective"] == objectives[2]
    ]
    y, offset = alt.Y("setting:N", sort=order, title=None), alt.YOffset("objective:N", sort=objectives)
    colour = alt.Color("objective:N", legend=alt.Legend(title=None)).scale(
        domain=objectives, range=[COLOURS[0], COLOURS[4], COLOURS[2]]
    )
    title = "importance: share of what decides"
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=y, yOffset=offset)
    bars = base.mark_bar(opacity=0.85).encode(
        x=alt.X("importance:Q", title=title, scale=alt.Scale(domain=[0, 1])),
        color=colour,
        tooltip=[
            "setting:N", "objective:N", alt.Tooltip("importance:Q", format=".2f"),
            alt.Tooltip("low:Q", format=".2f"), alt.Tooltip("high:Q", format=".2f"),
        ],
    )  # fmt: skip
    ink = alt.param(name="ink", value=INK)
    spread = base.mark_rule(color=alt.ExprRef(expr="ink"), strokeWidth=1.4).encode(
        x=alt.X("low:Q", title=title), x2="high:Q"
    )
    return styled((bars + spread).add_params(ink).properties(width="container", height=48 * len(order)))


def importances(front: Front) -> list[dict[str, Any]]:
    """PED-ANOVA importances (Watanabe et al., IJCAI 2023) for each objective and for the front of both.

    The scales of beta differ by loss, so what counts is its rank among the trials of its loss. With 90 %
    intervals by resampling the trials: with few of them the importances say little, and that shows.
    """
    rng, measured = np.random.default_rng(0), selected(front)
    ranks = _beta_ranks(measured)
    trials = []
    for p in measured:
        params = {
            n: p.settings[n]
            for n in ("loss", "pairs", "kl_weight", "learning_rate", "epochs", "orthogonality")
            if n in p.settings
        }
        trials.append((params | {"beta": ranks[key_of(p)]}, [front.gain_of(p), p.retention]))
    space = _space([params for params, _ in trials])
    targets = {
        front.words.goal: lambda t: -t.values[0],
        RETENTION: lambda t: -t.values[1],
        BOTH: None,
    }
    # Points are sorted, so that the first of them would be a choice.
    of = rng.permutation(len(trials))[:IMPORTANCE_TRIALS]
    samples = [of, *(rng.choice(of, size=len(of)) for _ in range(IMPORTANCE_RESAMPLES))]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in samples:
        study = _study([trials[i] for i in sample], space)
        for name, target in targets.items():
            for setting, value in _importances(study, target).items():
                found[setting, name].append(value)
    return [
        {
            "setting": setting.replace("_", " "),
            "objective": name,
            "importance": values[0],
            "low": float(np.quantile(values, 0.05)),
            "high": float(np.quantile(values, 0.95)),
        }
        for (setting, name), values in found.items()
    ]


def _importances(study: optuna.Study, target: Any) -> dict[str, float]:
    with warnings.catch_warnings():
        # It warns that it minimises, which the targets take into account, and of settings with few trials.
        warnings.simplefilter("ignore")
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        return get_param_importances(study, evaluator=evaluator, target=target)


def _study(trials: Iterable[tuple[dict[str, Any], list[float]]], space: Mapping[str, Any]) -> optuna.Study:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "maximize"])
    optuna.logging.set_verbosity(level)
    for params, values in trials:
        varied = {name: params[name] for name in space}
        study.add_trial(optuna.trial.create_trial(params=varied, distributions=dict(space), values=values))
    return study


def _space(drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ranges that trials span, of the settings that differ between them."""
    space: dict[str, Any] = {}
    for name in drawn[0]:
        values = [params[name] for params in drawn]
        if len(set(values)) < 2:
            continue
        if isinstance(values[0], str):
            space[name] = CategoricalDistribution(sorted(set(values)))
        elif isinstance(values[0], int):
            space[name] = IntDistribution(min(values), max(values))
        else:
            space[name] = FloatDistribution(min(values), max(values), log=min(values) > 0 and name != "beta")
    return space


def _beta_ranks(measured: Sequence[Point]) -> dict[str, float]:
    """The rank of each beta among the trials of its loss, from 0 to 1; 1/2 for a loss without one."""
    betas: dict[str, list[float]] = defaultdict(list)
    for p in sorted(measured, key=lambda p: p.settings.get("beta") or 0.0):
        betas[p.settings["loss"]].append(p.settings.get("beta") or 0.0)
    return {
        key_of(p): (bisect_left(all_of, p.settings.get("beta") or 0.0) + 0.5) / len(all_of)
        for p in measured
        for all_of in (betas[p.settings["loss"]],)
    }
