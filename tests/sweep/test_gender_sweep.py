"""The gender sweep as a user runs it: folds and rankings through Ray, the store and a confirmation."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gender_goal import NUMBERS, reached
from clippo.front.points import front_of
from clippo.results import ResultStore

ROOT = Path(__file__).parents[2]
SMALL = (
    "--search.trials", "2", "--search.epochs", "1", "1", "--data.train-pictures", "240",
    "--data.eval-pictures", "144", "--data.top-k", "6", "--search.confirm", "1", "--min-retention", "0.9",
    "--name", "g",
)  # fmt: skip


@pytest.mark.timeout(900)  # Ray is started once
def test_folds_and_rankings_go_through_the_whole_sweep(tmp_path: Path) -> None:
    command = [sys.executable, "sweeps/gender_sweep.py", *SMALL, "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pareto front of g" in done.stdout
    assert "MaxSkew" in done.stdout
    assert "Recommended (R): trial 0000" in done.stdout
    assert "confirmed with" in done.stdout
    store = ResultStore(str(tmp_path))
    trials = {row["trial_id"]: row for row in store.trials("g").to_pylist()}
    [confirming] = trials.keys() - {"reference", "00000", "00001"}
    confirmed = confirming.removeprefix("confirm-")
    assert trials[confirming]["seed"] != trials[confirmed]["seed"]
    assert {row["status"] for row in trials.values()} == {"completed"}
    sets = {f"{split}/concept/{which}" for split in ("validation", "test") for which in ("seen", "unpaired")}
    for trial in trials:
        ranked = [row for row in store.rankings("g").to_pylist() if row["trial_id"] == trial]
        assert sets <= {row["eval_set"] for row in ranked}, trial
        evals = [row for row in store.evals("g").to_pylist() if row["trial_id"] == trial]
        assert sets | {"test/minority/unpaired"} <= {row["eval_set"] for row in evals}, trial

    front = front_of(store, "g")
    assert front.reference.test.keys() <= {*front.words.numbers, *front.objectives.names}, "all have a name"
    found = reached(store)
    assert (found["trial"], found["split_seed"]) == (confirmed, 0)
    assert {model: tuple(numbers) for model, numbers in found["numbers"].items()} == dict.fromkeys(
        ("untouched", "recommended", "fresh_seed"), NUMBERS
    )

    def objects() -> dict[Path, int]:
        report = tmp_path / "reports"  # written anew
        return {
            p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and report not in p.parents
        }

    before = objects()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Pareto front of g" in again.stdout
    assert objects() == before
