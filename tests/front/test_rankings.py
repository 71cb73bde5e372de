"""Fronts whose goal follows from rankings: values, intervals and chances, with noise that points share."""

import dataclasses
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from clippo.evaluate import Goal, Objectives, bootstrap_interval, max_skew, ndkl
from clippo.evaluate.rankings import Ranking, mean_skew, ranked
from clippo.front.counts import RANKING_COLUMNS
from clippo.front.front import Front
from clippo.front.points import read_front
from clippo.results import TABLES
from tests.front.sweeps import trial_row

OWN = Objectives(goal=Goal(name="mean_skew", measure="max_skew", sets=("ranked",)), retention_sets=("read",))
N, K, QUERIES = 240, 24, 4
GROUPS = np.arange(N) % 2
SETTINGS = {
    "loss": "dpo", "beta": 0.1, "kl_weight": 1.0, "learning_rate": 1e-4, "epochs": 1, "seed": 0,
}  # fmt: skip


def scores_of(bias: float, seed: int) -> np.ndarray:
    """Scores of every picture for each query, those of group 0 ahead by a bias."""
    return np.random.default_rng(seed).normal(size=(QUERIES, N)) + bias * (GROUPS == 0)


def rankings_of(scores: np.ndarray) -> list[Ranking]:
    names = ("m", "f")
    return [ranked(s, GROUPS, K, query=f"q{i}", group_names=names) for i, s in enumerate(scores)]


def tables_of(
    points: dict[str, tuple[list[Ranking], int]], seeds: dict[str, int] | None = None
) -> dict[str, pa.Table]:
    """The rows of trials with these rankings and so many of 1,000 pictures read right.

    A name is of a trial, or of a variant of its weights: ``00001 t=0.5``.
    """
    trials, evals, rows = {}, [], []
    for name, (rankings, right) in points.items():
        trial_id, _, variant = name.partition(" ")
        number = len(trials)
        if trial_id not in trials:
            settings = None
            if number:
                seed = (seeds or {}).get(trial_id, 0)
                # Without seeds every trial is a setting of its own.
                settings = SETTINGS | ({"seed": seed} if seeds else {"kl_weight": float(number)})
            trials[trial_id] = trial_row(trial_id, settings, number)
        variant = variant or ("averaged" if number else "reference")
        for split in ("validation", "test"):
            key = {"sweep": "made", "trial_id": trial_id, "attempt": 0, "epoch": 1, "variant": variant}
            for eval_set, correct in (("read", right), ("ranked", 500)):
                counts = {"n_correct": correct, "n_total": 1000, "n_fooled": 0, "seed": 0}
                evals.append({**key, "eval_set": f"{split}/{eval_set}", **counts})
            rows += [{**key, "eval_set": f"{split}/ranked", "seed": 0, **vars(r)} for r in rankings]
    made = {"trials": list(trials.values()), "evals": evals, "rankings": rows}
    return {name: pa.Table.from_pylist(rows, schema=TABLES[name]) for name, rows in made.items()}


def front(points: dict[str, tuple[list[Ranking], int]], seeds: dict[str, int] | None = None) -> Front:
    """Their front."""
    made = tables_of(points, seeds)
    return read_front(
        "made", made["trials"], made["evals"], OWN, rankings=made["rankings"].select(RANKING_COLUMNS)
    )


def test_values_and_intervals_are_those_of_the_whole_pool() -> None:
    scores = {"reference": scores_of(0.8, 0), "00001": scores_of(0.1, 1)}
    made = front({i: (rankings_of(s), 900 - 20 * n) for n, (i, s) in enumerate(scores.items())})
    for point in made.points:
        own = scores[point.trial_id]

        def mean(index: np.ndarray, own: np.ndarray = own) -> float:
            return float(np.mean([max_skew(s[index], GROUPS[index], K) for s in own]))

        assert point.goal == mean_skew(rankings_of(own)) == pytest.approx(mean(np.arange(N)))
        low, high = point.goal_interval
        expected = bootstrap_interval(mean, GROUPS, draws=300)
        assert (high - low) == pytest.approx(expected[1] - expected[0], rel=0.25)
        assert point.test["mean_skew"] == point.test["max_skew/ranked"] == point.goal
        assert point.test_intervals["mean_skew"] == pytest.approx(point.goal_interval)

        def mean_ndkl(index: np.ndarray, own: np.ndarray = own) -> float:
            return float(np.mean([ndkl(s[index], GROUPS[index], K) for s in own]))

        assert point.test["ndkl/ranked"] == pytest.approx(mean_ndkl(np.arange(N)))
        low, high = point.test_intervals["ndkl/ranked"]
        expected = bootstrap_interval(mean_ndkl, GROUPS, draws=300)
        assert (high - low) == pytest.approx(expected[1] - expected[0], rel=0.25)
    assert made.hypervolume == pytest.approx(
        np.exp(-made.reference.goal)
        + 880 / 900 * (np.exp(-made.points[1].goal) - np.exp(-made.reference.goal))
    )


def test_the_share_of_the_majority_is_of_the_queries_that_have_one() -> None:
    one, other, *_ = rankings_of(scores_of(0.8, 0))
    known = front({"reference": ([dataclasses.replace(one, majority=0)], 900)}).points[0]
    mixed = front({"reference": ([dataclasses.replace(one, majority=0), other], 900)}).points[0]
    for numbers in (known.test, mixed.test):
        assert numbers["majority_share/ranked"] == sum(g == 0 for g in one.groups[:K]) / K
    (low, high), own = (p.test_intervals["majority_share/ranked"] for p in (mixed, known))
    assert high - low == pytest.approx(own[1] - own[0], rel=0.25), "of other resamples"
    assert "majority_share/ranked" not in front({"reference": ([one, other], 900)}).points[0].test


def test_of_several_sets_the_worst_makes_the_goal() -> None:
    points = [
        {
            "reference": (rankings_of(scores_of(0.9, 6)), 950),
            "00001": (rankings_of(scores_of(bias, seed)), 900),
        }
        for bias, seed in ((0.6, 1), (0.2, 4))
    ]
    both, other = map(tables_of, points)
    for name in ("evals", "rankings"):
        sets = pc.replace_substring(other[name]["eval_set"], "ranked", "other")
        renamed = other[name].set_column(other[name].column_names.index("eval_set"), "eval_set", sets)
        added = renamed.filter(pc.ends_with(renamed["eval_set"], "other"))
        both[name] = pa.concat_tables([both[name], added])
    sets = dataclasses.replace(OWN, goal=dataclasses.replace(OWN.goal, sets=("other", "ranked")))
    made = read_front(
        "made", both["trials"], both["evals"], sets, rankings=both["rankings"].select(RANKING_COLUMNS)
    )
    worse, better = (next(p for p in front(p).points if p.trial_id == "00001") for p in points)
    (point,) = made.points[1:]
    assert point.goal == worse.goal > better.goal
    assert point.goal_interval == pytest.approx(worse.goal_interval, abs=0.02)
    assert point.test["max_skew/other"] == better.goal
    assert point.probability == pytest.approx(1, abs=0.01)


def test_points_share_the_noise_of_their_pictures() -> None:
    """A twin whose every ranking is the same but for one place that is better is surely better."""
    scores = scores_of(0.6, 3)
    better = scores.copy()
    for s in better:
        top = np.argsort(-s)[:K]
        # The last of the majority in the top and the next of the minority swap places.
        out = top[GROUPS[top] == 0][-1]
        rest = np.argsort(-s)[K:]
        into = rest[GROUPS[rest] == 1][0]
        s[[out, into]] = s[[into, out]]
    points = {"reference": (rankings_of(scores_of(1.0, 4)), 990), "00001": (rankings_of(scores), 900)}
    made = front(points | {"00002": (rankings_of(better), 900), "00003": (rankings_of(scores), 900)})
    found = {p.trial_id: p for p in made.points}
    gained = found["00001"].goal - found["00002"].goal
    low, high = found["00001"].goal_interval
    assert 0 < gained < (high - low) / 4, "far less than either is off by itself"
    # With noise of its own it would be 1/2.
    assert found["00002"].probability > 0.75
    assert found["00001"].probability == pytest.approx(found["00003"].probability, abs=0.1)


def test_equal_rankings_are_equal_points_and_both_on_the_front() -> None:
    same = rankings_of(scores_of(0.3, 5))
    made = front(
        {"reference": (rankings_of(scores_of(0.9, 6)), 950), "00001": (same, 900), "00002": (same, 900)}
    )
    tuned = [p for p in made.points if p.trial_id != "reference"]
    assert [p.on_front for p in tuned] == [True, True]
    assert tuned[0].goal == tuned[1].goal


def test_a_setting_with_several_seeds_is_their_mean() -> None:
    each = {"00001": rankings_of(scores_of(0.2, 7)), "00002": rankings_of(scores_of(0.2, 8))}
    points = {"reference": (rankings_of(scores_of(0.9, 6)), 950)} | {i: (r, 900) for i, r in each.items()}
    made = front(points, seeds={"00001": 0, "00002": 1})
    (point,) = made.points[1:]
    values = [mean_skew(r) for r in each.values()]
    assert point.trial_ids == ["00001", "00002"]
    assert point.goal == pytest.approx(np.mean(values))
    assert made.seed_sd[0] == pytest.approx(np.std(values, ddof=1), rel=1e-6)


def test_a_sweep_of_usual_size_is_read_in_seconds() -> None:
    rng = np.random.default_rng(0)
    points = {"reference": (rankings_of(scores_of(0.9, 0)), 950)}
    for i in range(160):
        bias = rng.uniform(0, 0.9)
        points[f"{i:05d}"] = (rankings_of(scores_of(bias, i + 1)), int(850 + 100 * bias))
    began = time.process_time()
    made = front(points)
    assert time.process_time() - began < 8
    assert 1 < len(made.front) < 100
