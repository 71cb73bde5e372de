"""Of a very large sweep, only what may matter to its front is looked at."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from clippo.front import nearest, points
from clippo.front.front import Front
from clippo.front.points import front_of
from clippo.front.report import report_of
from clippo.front.table import print_front
from clippo.results import ResultStore, sealing
from tests.front.sweeps import OBJECTIVES, Sweep, make_sweep


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return make_sweep(150)


@pytest.fixture(scope="module")
def store(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    store = ResultStore(tmp_path_factory.mktemp("large"))
    sweep.write(store)
    store.compact("made")
    return store


@pytest.fixture(scope="module")
def whole(store: ResultStore) -> Front:
    return front_of(store, "made")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep counts as very large from 100 trials on."""
    monkeypatch.setattr(points, "LARGE", 100)
    monkeypatch.setattr(nearest, "NEAREST", 60)


@pytest.mark.usefixtures("large")
def test_what_is_left_out_changes_nothing_that_is_chosen(store: ResultStore, whole: Front) -> None:
    part = front_of(store, "made")
    assert part.left_out > 60
    assert len(part.points) < 0.6 * len(whole.points)
    for name in ("completed", "failed", "stopped", "hypervolume"):
        assert getattr(part, name) == getattr(whole, name), name
    assert part.device_s == pytest.approx(whole.device_s)
    assert [(p.trial_id, p.variant, p.goal, p.retention) for p in part.front] == [
        (p.trial_id, p.variant, p.goal, p.retention) for p in whole.front
    ]
    # Chances are drawn, and other points are among those that are drawn.
    assert part.recommended.goal == pytest.approx(whole.recommended.goal, abs=0.03)
    for mine, theirs in zip(part.comparisons, whole.comparisons, strict=True):
        assert mine.hypervolume == theirs.hypervolume
        assert len(mine.front) == len(theirs.front)
    for mine, theirs in zip(part.front, whole.front, strict=True):
        assert mine.probability == pytest.approx(theirs.probability, abs=0.1)


@pytest.mark.parametrize("seed", [1, 3])
def test_no_point_of_any_front_is_lost(seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # With few pictures many points have all of the retention; some trials were stopped, half are baselines.
    sweep, store = make_sweep(60, seed=seed, pictures=48), ResultStore(tmp_path)
    for i, row in enumerate(sweep.trials):
        if row["trial_id"].isdigit() and row["status"] == "completed":
            row["status"] = "stopped_early" if i % 5 == 0 else "completed"
            row["loss"] = "cross_entropy" if i % 2 else row["loss"]
    sweep.write(store)
    whole = front_of(store, "made")
    monkeypatch.setattr(points, "LARGE", 10)
    monkeypatch.setattr(nearest, "NEAREST", 14)
    part = front_of(store, "made")
    assert part.left_out > 0
    for mine, theirs in zip(part.comparisons, whole.comparisons, strict=True):
        places = [[(p.trial_id, p.variant) for p in c.front] for c in (mine, theirs)]
        assert places[0] == places[1], mine.method
        assert mine.hypervolume == theirs.hypervolume
    assert part.hypervolume == whole.hypervolume


def test_all_seeds_of_a_setting_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nearest, "NEAREST", 3)
    sweep, store = make_sweep(6, seeds=3, seed_sd=0.01), ResultStore(tmp_path)
    sweep.write(store)
    found = nearest.nearest_trials(store, "made", sweep.trial_table, OBJECTIVES)["trial_id"].to_pylist()
    taken = [sum(s in found for s in (f"{i:05d}", f"{i:05d}-s1", f"{i:05d}-s2")) for i in range(4)]
    assert set(taken) == {0, 3}, taken
    assert len({i[:5] for i in found if i[0].isdigit()}) == 3
    assert {"reference", "cross_entropy"} <= set(found)


def test_the_same_are_near_however_the_rows_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nearest, "NEAREST", 5)
    monkeypatch.setattr(sealing, "BATCH", 4)
    sweep, store = make_sweep(20), ResultStore(tmp_path)
    # Better numbers of an earlier epoch, which count for nothing, and a trial that ends later.
    rows = sweep.evals.to_pylist()
    early = [{**row, "epoch": row["epoch"] - 1, "n_correct": row["n_total"]} for row in rows]
    both = pa.Table.from_pylist([*rows, *early], schema=sweep.evals.schema)
    Sweep(sweep.trials, both).write(store)
    known = sweep.trial_table.filter(pa.compute.not_equal(sweep.trial_table["trial_id"], "00003"))
    open_ = nearest.nearest_trials(store, "made", known, OBJECTIVES)
    only_last = ResultStore(tmp_path / "last")
    sweep.write(only_last)
    assert open_.equals(nearest.nearest_trials(only_last, "made", known, OBJECTIVES))
    assert 5 <= len(open_) < len(known) - 5
    store.compact("made")
    assert nearest.nearest_trials(store, "made", known, OBJECTIVES).equals(open_)


@pytest.mark.usefixtures("large")
def test_it_is_said(store: ResultStore, tmp_path: Path) -> None:
    part = front_of(store, "made")
    console = Console(record=True, width=80)
    print_front(part, console)
    said = f"{part.left_out:,} completed trials are only counted"
    assert said in " ".join(console.export_text().split())
    assert json.loads(json.dumps(part.to_json()))["left_out"] == part.left_out
    page = report_of(store, "made")
    assert said in page
    shown = {i for p in part.points for i in p.trial_ids}
    left = next(i for i in store.trials("made")["trial_id"].to_pylist() if i not in shown)
    assert f'"{left}"' not in page


@pytest.mark.usefixtures("large")
def test_a_sweep_that_has_measured_nothing_is_taken_whole(store: ResultStore, sweep: Sweep) -> None:
    trials = sweep.trial_table
    without = trials.filter(pa.compute.not_equal(trials["trial_id"], "reference"))
    assert nearest.nearest_trials(store, "made", without, OBJECTIVES) is without
