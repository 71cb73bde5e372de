"""Sealed sweeps as large as planned; benchmarks/store.py measures the largest."""

from pathlib import Path

import pytest

from benchmarks.store import COMMAND, SETS, SWEEP, VALIDATION, VARIANTS, make_sealed, read
from clippo.results import ResultStore, View

TRIALS = 6_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    make_sealed(str(folder), TRIALS)
    return folder


@pytest.mark.alone
def test_front_of_many_trials_is_read_in_little_time_and_memory(large: Path) -> None:
    runs = [read(str(large)) for _ in range(3)]
    assert {run["trial_rows"] for run in runs} == {TRIALS + 1}, "with the untouched model"
    counted = TRIALS * len(VALIDATION) * (len(VARIANTS) + 1) + len(VALIDATION)
    assert {run["eval_rows"] for run in runs} == {counted}
    assert min(run["seconds"] for run in runs) < 2
    assert max(run["memory"] for run in runs) < 400  # MiB; what Python and pyarrow need is 100
    assert len([path for path in large.rglob("*") if path.is_file()]) < 10


def test_the_whole_command_takes_little_memory(large: Path) -> None:
    assert read(str(large), COMMAND)["memory"] < 500


def test_views_of_many_row_groups(large: Path) -> None:
    store = ResultStore(large)
    final = View(columns=["n_total"], where={"epoch": [2]})
    assert len(store.evals(SWEEP, final)) == TRIALS * len(SETS) * len(VARIANTS) + len(SETS)
    one = View(
        columns=["trial_id", "eval_set"],
        where={"eval_set": SETS[:2], "variant": ["last"], "trial_id": ["000007", "005999", "none"]},
        dictionary=True,
    )
    found = store.evals(SWEEP, one).to_pylist()
    assert sorted((row["trial_id"], row["eval_set"]) for row in found) == [
        (trial, name) for trial in ("000007", "005999") for name in sorted(SETS[:2])
    ]
    assert len(store.trials(SWEEP, View(columns=["beta"], where={"trial_id": ["000007"]}))) == 1
