"""What a front makes of the rows of a sweep."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from clippo.errors import ConfigError, StoreError
from clippo.evaluate import Counts
from clippo.front import pareto_mask
from clippo.front.counts import read_counts
from clippo.front.front import PAINT, PREFERENCE, TUNING, UNTOUCHED, Front, Point, describe
from clippo.front.points import front_of, read_front
from clippo.results import ResultStore
from tests.front.sweeps import NEEDED, OBJECTIVES, Sweep, make_sweep


def front(sweep: Sweep, **options: Any) -> Front:
    return read_front("made", sweep.trial_table, sweep.evals, OBJECTIVES, **options)


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return make_sweep(17)


@pytest.fixture(scope="module")
def made(sweep: Sweep) -> Front:
    return front(sweep)


def point(front: Front, trial_id: str, variant: str) -> Point:
    [found] = [p for p in front.points if (p.trial_id, p.variant) == (trial_id, variant)]
    return found


def counts_of(sweep: Sweep, trial_id: str, variant: str) -> list[Counts]:
    rows = [r for r in sweep.evals.to_pylist() if (r["trial_id"], r["variant"]) == (trial_id, variant)]
    last = max(r["epoch"] for r in rows)
    names = ("eval_set", "variant", "n_correct", "n_total", "n_fooled")
    return [Counts(**{n: r[n] for n in names}) for r in rows if r["epoch"] == last]


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(
    ("trial_id", "variant"), [("00000", "averaged"), ("00003", "last"), ("cross_entropy", "alpha=0.3")]
)
def test_objectives_are_those_of_the_sweep(
    sweep: Sweep, made: Front, trial_id: str, variant: str, split: str
) -> None:
    reference = counts_of(sweep, "reference", "reference")
    expected = OBJECTIVES.values(counts_of(sweep, trial_id, variant), reference, split=split)
    found = point(made, trial_id, variant)
    here = {"robustness": found.goal, "retention": found.retention}
    numbers = here if split == "validation" else found.test
    assert {n: numbers[n] for n in expected} == pytest.approx(expected)


def test_which_points_there_are(sweep: Sweep, made: Front) -> None:
    done = [
        r["trial_id"] for r in sweep.trials if r["status"] == "completed" and r["trial_id"] != "reference"
    ]
    steps = [f"alpha=0.{i}" for i in range(1, 10)]
    assert sorted((p.trial_id, p.variant) for p in made.points) == sorted(
        [("reference", "reference"), *((i, v) for i in done for v in ("averaged", "last", *steps))]
    ), "alpha=0 is the untouched model, alpha=1 the averaged weights"
    assert made.reference.trial_id == "reference"
    assert made.reference.retention == 1
    assert (made.completed, made.failed) == (17, 1)
    assert made.device_s == 18 * 36


def test_the_front_is_that_of_the_validation_pictures(made: Front) -> None:
    values = [(p.goal, p.retention) for p in made.points]
    assert [p.on_front for p in made.points] == pareto_mask(values).tolist()
    assert made.front
    for p in made.points:
        numbers = [(p.goal, p.goal_interval), (p.retention, p.retention_interval)]
        numbers += [(p.test[name], p.test_intervals[name]) for name in made.objectives.names]
        for value, (low, high) in numbers:
            assert 0 <= low <= value <= high <= 1
        assert 0 <= p.probability <= 1
        assert (p.group > 0) == p.on_front
    assert 0 < made.hypervolume_interval[0] < made.hypervolume < made.hypervolume_interval[1] < 1
    assert sum(p.probability for p in made.points) > 2


def test_test_numbers_of_kinds_and_published_sets(sweep: Sweep, made: Front) -> None:
    counts = {c.eval_set: c for c in counts_of(sweep, "00002", "averaged")}

    def share(*names: str, of: str = "n_correct") -> float:
        found = [counts[f"test/{n}"] for n in names]
        return sum(getattr(c, of) for c in found) / sum(c.n_total for c in found)

    test = point(made, "00002", "averaged").test
    assert test["robust_accuracy"] == pytest.approx(share("attacked/seen", "attacked/held_out"))
    assert test["attack_success_rate"] == pytest.approx(share(*OBJECTIVES.goal.sets, of="n_fooled"))
    assert test["clean_accuracy"] == pytest.approx(share("clean/seen", "clean/held_out"))
    assert test["nonsense_accuracy"] == pytest.approx(share("nonsense/seen", "nonsense/held_out"))
    assert test["reading_accuracy"] == pytest.approx(share("reading/held_out")), "as on the curve"
    assert test["robust_accuracy/rta-100"] == pytest.approx(share("attacked/rta-100"))
    assert test["attack_success_rate/rta-100"] == pytest.approx(share("attacked/rta-100", of="n_fooled"))
    step = point(made, "00002", "alpha=0.5").test
    assert {n for n in test if n not in step} == {
        "nonsense_accuracy", "robust_accuracy/rta-100", "clean/rta-100_accuracy",
        "attack_success_rate/rta-100",
    }  # fmt: skip


def test_methods_on_the_same_axes(made: Front) -> None:
    by_method = {c.method: c for c in made.comparisons}
    assert list(by_method) == [UNTOUCHED, TUNING, PAINT, PREFERENCE]
    assert {p.trial_id for p in by_method[TUNING].front} <= {"reference", "cross_entropy"}
    assert {p.variant for p in by_method[TUNING].front} <= {"reference", "averaged", "last"}
    assert len(by_method[PAINT].front) > 3
    assert all(p.variant != "last" for p in by_method[PAINT].front)
    assert by_method[UNTOUCHED].hypervolume == pytest.approx(made.reference.goal)
    for c in made.comparisons:
        assert c.hypervolume_interval[0] <= c.hypervolume <= c.hypervolume_interval[1]
        assert c.hypervolume <= made.hypervolume + 1e-12
    best = max(by_method[m].hypervolume for m in (TUNING, PAINT))
    assert 0 < made.gain <= made.hypervolume - best + 1e-12
    assert made.gain_interval[0] <= made.gain <= made.gain_interval[1]


@pytest.mark.parametrize("min_retention", [0.9, 0.98, 0.995])
def test_what_is_recommended_keeps_enough_with_enough_certainty(sweep: Sweep, min_retention: float) -> None:
    made = front(sweep, min_retention=min_retention)
    chosen = made.recommended
    assert chosen.chance is not None
    assert chosen.chance >= 0.9
    better = [p for p in made.front if p.goal > chosen.goal]
    assert all(p.chance is not None and p.chance < 0.9 for p in better), "a more robust one would do"
    assert all(p is not chosen and abs(p.goal - chosen.goal) < 0.1 for p in made.alike)
    assert made.reference.chance == 1


def test_nothing_keeps_everything_for_certain(sweep: Sweep) -> None:
    made = front(sweep, min_retention=1.0)
    assert made.recommended.retention == 1


@pytest.mark.parametrize("min_retention", [0, -1, 1.01, float("nan")])
def test_a_bound_that_is_none(sweep: Sweep, min_retention: float) -> None:
    with pytest.raises(ConfigError, match=r"min_retention is .*; it must be above 0 and at most 1"):
        front(sweep, min_retention=min_retention)


def bent(robustness: list[float], retention: list[float]) -> Front:
    """A front of given numbers, counted on a million pictures each."""
    template = make_sweep(len(robustness), correlation=0.0)
    keep = pc.or_(pc.is_in(template.evals["variant"], pa.array(["averaged", "reference"])), False)
    rows = template.evals.filter(keep).to_pylist()
    shares = {f"{i:05d}": (r, k) for i, (r, k) in enumerate(zip(robustness, retention, strict=True))}
    kept = []
    for row in rows:
        if row["trial_id"] == "cross_entropy" or row["eval_set"].split("/", 1)[1] not in NEEDED:
            continue
        attacked = row["eval_set"].split("/")[1] == "attacked"
        r, k = shares.get(row["trial_id"], (0.3, 1.0))
        row |= {"n_total": 1_000_000, "n_correct": int(1e6 * (r if attacked else 0.9 * k)), "n_fooled": 0}
        kept.append(row)
    return front(replace(template, evals=pa.Table.from_pylist(kept, schema=template.evals.schema)))


def test_the_knee_is_where_the_front_bends() -> None:
    made = bent([0.4, 0.8, 0.85, 0.9], [0.99, 0.97, 0.8, 0.6])
    assert made.knee is not None
    assert made.knee.trial_id == "00001"
    assert made.recommended.trial_id == "00000"
    assert [p.group for p in made.front] == [1, 2, 3, 4, 5], "a million pictures tell them apart"


def test_a_front_of_two_points_has_no_knee() -> None:
    assert bent([0.4], [0.99]).knee is None


def test_points_that_cannot_be_told_apart_are_one_group() -> None:
    made = bent([0.4, 0.8, 0.8001, 0.8002], [0.99, 0.9, 0.8999, 0.8998])
    assert [p.group for p in made.front] == [1, 2, 3, 3, 3]


def test_seeds_of_a_setting_are_one_point() -> None:
    once, repeated = (front(make_sweep(12, seeds=s, seed_sd=0.03)) for s in (1, 4))
    assert once.repeated == 0
    assert (once.seed_sd, repeated.repeated) == ((0, 0), 4)
    assert repeated.completed == once.completed + 12
    assert len(repeated.points) == len(once.points)
    # the averaged weights feel 0.8 of what a seed does; the noise of the pictures is in it, too
    assert 0.02 < repeated.seed_sd[0] < 0.045
    several, single = (point(repeated, i, "averaged") for i in ("00001", "00007"))
    assert several.trial_ids == ["00001", "00001-s1", "00001-s2", "00001-s3"]
    assert single.trial_ids == ["00007"]

    def width(p: Point) -> float:
        return p.goal_interval[1] - p.goal_interval[0]

    assert width(single) > width(several) > width(point(once, "00001", "averaged"))
    low, high = repeated.reference.goal_interval
    assert (low, high) == pytest.approx((0.37, 0.43), abs=0.03)
    assert high - low < 0.06, "the untouched model was not trained"


def test_the_mean_of_seeds_is_what_counts() -> None:
    sweep = make_sweep(6, seeds=3, seed_sd=0.05)
    reference = counts_of(sweep, "reference", "reference")
    each = [
        OBJECTIVES.values(counts_of(sweep, i, "last"), reference, split="validation")
        for i in ("00002", "00002-s1", "00002-s2")
    ]
    mean = sum(e["robustness"] for e in each) / 3
    assert point(front(sweep), "00002", "last").goal == pytest.approx(mean)


def test_the_correlation_of_curves_is_found() -> None:
    for correlation in (0.0, 0.9):
        sweep = make_sweep(60, correlation=correlation)
        counts = read_counts("made", sweep.trial_table, sweep.evals, OBJECTIVES)
        assert counts.correlation == pytest.approx(correlation, abs=0.15)


def test_rows_of_other_attempts_do_not_count(sweep: Sweep, made: Front) -> None:
    rows = sweep.evals.to_pylist()
    rows += [{**r, "attempt": 1, "n_correct": 0} for r in rows if r["trial_id"] == "00000"]
    again = front(replace(sweep, evals=pa.Table.from_pylist(rows, schema=sweep.evals.schema)))
    assert [vars(p) for p in again.points] == [vars(p) for p in made.points]


def test_dictionary_columns_are_the_same(sweep: Sweep, made: Front) -> None:
    columns = {n: sweep.evals[n] for n in sweep.evals.column_names}
    columns |= {n: columns[n].dictionary_encode() for n in ("trial_id", "variant", "eval_set")}
    assert front(replace(sweep, evals=pa.table(columns))).to_json() == made.to_json()


def test_an_old_sweep_has_no_curves() -> None:
    sweep = make_sweep(5)
    keep = pc.invert(pc.match_substring(sweep.evals["variant"], "alpha"))
    made = front(replace(sweep, evals=sweep.evals.filter(keep)))
    assert {p.variant for p in made.points} == {"reference", "averaged", "last"}


def test_nothing_measured_yet(sweep: Sweep) -> None:
    for left in (sweep.trials[1:], []):
        with pytest.raises(StoreError, match=r"'made' has no measurement of the untouched model yet"):
            front(replace(sweep, trials=left))
    with pytest.raises(StoreError, match="no measurement"):
        front(replace(sweep, evals=sweep.evals.slice(0, 0)))


def test_only_the_untouched_model(sweep: Sweep) -> None:
    made = front(replace(sweep, trials=sweep.trials[:1]))
    assert [p.trial_id for p in made.front] == ["reference"]
    assert made.recommended is made.reference
    assert made.hypervolume == pytest.approx(made.reference.goal)
    assert made.knee is None
    assert made.gain == 0
    assert made.gained_per_device_hour is None
    json.dumps(made.to_json())


@pytest.mark.parametrize(
    ("eval_set", "complaint"),
    [("validation/clean/seen", "no evaluation set 'clean/seen'"), (None, "nothing right")],
)
def test_a_reference_that_cannot_be_compared_with(sweep: Sweep, eval_set: str | None, complaint: str) -> None:
    rows = [r for r in sweep.evals.to_pylist() if r["eval_set"] != eval_set]
    if eval_set is None:
        for row in rows:
            row["n_correct"] = 0
    with pytest.raises(ConfigError, match=complaint):
        front(replace(sweep, evals=pa.Table.from_pylist(rows, schema=sweep.evals.schema)))


def test_json_holds_all_of_it(made: Front) -> None:
    data = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert {
        "sweep",
        "points",
        "reference",
        "hypervolume",
        "hypervolume_interval",
        "completed",
        "failed",
    } <= data.keys()
    assert [p["on_front"] for p in data["points"]] == [True] * len(made.front)
    assert data["recommended"]["chance"] >= 0.9
    assert data["knee"]["trial_id"] == (made.knee and made.knee.trial_id)
    assert [c["method"] for c in data["comparisons"]] == [c.method for c in made.comparisons]
    assert all(len(c["front"]) >= 1 and "test_intervals" in c["best"] for c in data["comparisons"])
    assert data["cost"]["device_hours"] == pytest.approx(18 * 36 / 3600)
    gained = made.hypervolume - made.reference.goal
    assert data["cost"]["hypervolume_gained_per_device_hour"] == pytest.approx(gained / 0.18)
    assert data["cost"]["device_s"]["00003"] == 36
    assert data["seeds"] == {"repeated_settings": 0, "sd": [0, 0]}


def test_a_store_is_read(tmp_path: Path, sweep: Sweep, made: Front) -> None:
    store = ResultStore(tmp_path)
    sweep.write(store)
    assert front_of(store, "made").to_json() == made.to_json()
    store.compact("made")
    assert front_of(store, "made").to_json() == made.to_json()
    with pytest.raises(StoreError, match="has no sweep 'other'; its sweeps are: made"):
        front_of(store, "other")


def test_five_thousand_trials_take_seconds() -> None:
    sweep = make_sweep(5000)
    trials = sweep.trial_table
    started = time.process_time()
    made = read_front("made", trials, sweep.evals, OBJECTIVES)
    assert time.process_time() - started < 15  # some 4 s on an idle machine
    assert len(made.points) > 50_000
    assert made.front


def test_a_confirmation_stands_beside_the_point_and_changes_nothing_else() -> None:
    """Trials 00000 to 00003 have a second seed here; as confirmations they are no repetitions."""
    repeated = make_sweep(8, seeds=2, seed_sd=0.02)
    ids = {f"{i:05d}-s1": f"confirm-{i:05d}" for i in range(4)}

    def renamed(table: pa.Table) -> pa.Table:
        column = pa.array([ids.get(i, i) for i in table["trial_id"].to_pylist()])
        return table.set_column(table.column_names.index("trial_id"), "trial_id", column)

    searched = [t for t in repeated.trials if t["trial_id"] not in ids]
    alone = front(Sweep(searched, repeated.evals))
    confirmed = read_front("made", renamed(repeated.trial_table), renamed(repeated.evals), OBJECTIVES)
    again = {(p.trial_id, p.variant): p for p in confirmed.points if p.confirmed}
    assert {i for i, _ in again} == {"00000", "00001", "00002", "00003"}
    reference = counts_of(repeated, "reference", "reference")
    for (trial_id, variant), p in again.items():
        expected = OBJECTIVES.values(counts_of(repeated, f"{trial_id}-s1", variant), reference, split="test")
        assert {n: p.confirmed[n] for n in expected} == pytest.approx(expected)
        assert all(low <= p.confirmed[n] <= high for n, (low, high) in p.confirmed_intervals.items())
    plain = [replace(p, confirmed={}, confirmed_intervals={}) for p in confirmed.points]
    assert plain == alone.points
    assert (confirmed.repeated, confirmed.completed) == (0, alone.completed)
    assert confirmed.device_s == alone.device_s + 4 * 36, "it was paid for all the same"


def test_what_is_feasible_and_what_was_stopped() -> None:
    sweep = make_sweep(8)
    trials = [t | ({"status": "stopped_early"} if t["trial_id"] == "00001" else {}) for t in sweep.trials]
    bound = (1 + min(p.retention for p in front(sweep).points)) / 2
    made = front(Sweep(trials, sweep.evals), min_retention=bound)
    assert [p.feasible for p in made.points] == [p.retention >= bound for p in made.points]
    assert {p.feasible for p in made.points} == {True, False}
    assert made.stopped == 1
    assert "00001" not in {p.trial_id for p in made.points}
    assert made.to_json()["stopped_early"] == 1


def test_a_stopped_trial_offers_what_it_had_reached() -> None:
    sweep = make_sweep(8)
    whole = next(p for p in front(sweep).points if p.settings.get("epochs") == 2 and p.trial_id.isdigit())
    told = {
        "status": "stopped_early", "checkpoint_uri": "/somewhere/averaged-001.safetensors",
        "params_json": '{"stopped_after": 1}',
    }  # fmt: skip
    trials = [t | (told if t["trial_id"] == whole.trial_id else {}) for t in sweep.trials]
    others, early = pc.not_equal(sweep.evals["trial_id"], whole.trial_id), pc.equal(sweep.evals["epoch"], 1)
    evals = sweep.evals.filter(pc.or_(others, early))
    made = front(Sweep(trials, evals))
    [early_point] = [p for p in made.points if p.trial_id == whole.trial_id]
    assert (early_point.variant, early_point.settings) == ("averaged", whole.settings | {"stopped_after": 1})
    assert " x1/2 kl" in describe(early_point.settings)
    reference = counts_of(sweep, "reference", "reference")
    counted = counts_of(Sweep(trials, evals), whole.trial_id, "averaged")
    expected = OBJECTIVES.values(counted, reference, split="validation")
    assert (early_point.goal, early_point.retention) == pytest.approx(tuple(expected.values()))
    assert early_point.test == {}, "it was not worth test pictures"
    assert (made.stopped, made.completed) == (1, front(sweep).completed - 1)


def test_a_search_of_other_objectives_has_a_front_of_its_own(tmp_path: Path) -> None:
    made = make_sweep(8)
    trials = [t | {"device_s": 10.0 * n} for n, t in enumerate(made.trials)]
    store = ResultStore(str(tmp_path))
    Sweep(trials, made.evals).write(store)
    assert front_of(store, "made").searched == []
    path = tmp_path / "sweeps" / "made.json"
    kept = json.loads(path.read_text())
    names = ["attack_success_rate:attacked/seen", "accuracy:reading/held_out", "device_s"]
    kept["config"]["search"] = {"objectives": names}
    path.write_text(json.dumps(kept))

    values = {}
    for t in trials:
        if t["status"] == "completed":
            variant = "reference" if t["trial_id"] == "reference" else "averaged"
            shares = {c.eval_set: c for c in counts_of(made, t["trial_id"], variant)}
            attacked, reading = (shares[f"validation/{n}"] for n in ("attacked/seen", "reading/held_out"))
            fooled = attacked.n_fooled / attacked.n_total
            values[t["trial_id"]] = (fooled, reading.n_correct / reading.n_total, t["device_s"])
    on_front = pareto_mask(list(values.values()), [False, True, False])
    found = {p.trial_id: tuple(v[n] for n in names) for p, v in front_of(store, "made").searched}
    assert found == {i: v for (i, v), on in zip(values.items(), on_front, strict=True) if on}
