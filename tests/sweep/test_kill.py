"""A sweep that is ended at some moment and run again: nothing is lost, nothing is there twice.

``make test`` ends it at two moments. ``make soak`` (pytest with ``--soak``) does so at ten random ones with
SIGKILL, and at five each with SIGTERM and Ctrl-C.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from clippo.front import pareto_mask
from clippo.results import ResultStore
from tests.conftest import ROOT, clippo

pytestmark = pytest.mark.timeout(900)

TRIALS = 16
FLAGS = [
    "--name", "mortal", "--train-pictures", "128", "--eval-pictures", "16", "--epochs", "3", "3",
    "--trials", str(TRIALS), "--halving", "--min-epochs", "1", "--baselines", "--confirm", "0",
    "--alphas", "0", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prepared set that all of these sweeps share."""
    folder = tmp_path_factory.mktemp("mortal")
    done = clippo(
        "prepare", "--results", str(folder), "--data.train-pictures", "128", "--data.eval-pictures", "16"
    )
    assert done.returncode == 0, done.stderr
    return folder / "prepared"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rng = random.Random(0)
    moments = [("SIGKILL", 0.3), ("SIGINT", 0.6)]
    if metafunc.config.getoption("--soak"):
        moments = [
            (s, rng.random()) for s, n in (("SIGKILL", 10), ("SIGTERM", 5), ("SIGINT", 5)) for _ in range(n)
        ]
    metafunc.parametrize(("how", "share"), moments, ids=[f"{s}-{share:.2f}" for s, share in moments])


def test_a_sweep_that_is_ended_goes_on(how: str, share: float, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "prepared").symlink_to(prepared)
    mirror = f"sqlite:///{tmp_path / 'study.db'}"
    command = [sys.executable, "sweeps/typo_sweep.py", "--results", str(tmp_path), "--mirror", mirror, *FLAGS]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        reference = tmp_path / "trials" / "sweep=mortal" / "reference-0.parquet"
        while not reference.exists() or len(list(reference.parent.iterdir())) <= share * TRIALS:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.02)
        if how == "SIGKILL":
            os.killpg(driver.pid, signal.SIGKILL)
        else:
            driver.send_signal(signal.Signals[how])
        out, err = driver.communicate(timeout=200)
    if how != "SIGKILL":
        assert driver.returncode in (0, 130), out + err
        assert "Traceback" not in out + err
    rows = {p.name: p.stat().st_mtime_ns for p in reference.parent.iterdir()}

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {n: (reference.parent / n).stat().st_mtime_ns for n in rows} == rows, "none is run twice"
    store = ResultStore(str(tmp_path))
    trials = store.trials("mortal").to_pylist()
    assert [t["trial_id"] for t in trials] == [*(f"{i:05d}" for i in range(TRIALS)), "reference"]
    assert len(list(reference.parent.iterdir())) == TRIALS + 1, "each is there once"
    assert {t["status"] for t in trials} <= {"completed", "stopped_early"}
    study = optuna.load_study(study_name="mortal", storage=mirror)
    states = {"completed": TrialState.COMPLETE, "stopped_early": TrialState.PRUNED}
    told = sorted((t.user_attrs["trials"][0], t.state) for t in study.trials)
    assert told == [(int(t["trial_id"]), states[t["status"]]) for t in trials if t["trial_id"] != "reference"]

    shown = clippo("front", str(tmp_path), "--json")
    front = json.loads(shown.stdout)
    assert front["completed"] + front["stopped_early"] == TRIALS
    values = [(p["robustness"], p["retention"]) for p in front["points"]]
    assert pareto_mask(values).all()
    assert {p["trial_id"] for p in front["points"]} <= {
        t["trial_id"] for t in trials if t["status"] == "completed"
    }
