"""A sweep that is ended at some moment and run again at once: nothing is lost, nothing is there twice.

``make test`` ends it at one moment. ``make soak`` does so at ten random ones with SIGKILL, at five each with
SIGTERM and Ctrl-C, and near its two ends. SIGKILL hits the driver alone: what it leaves of its Ray is still
there when the same command begins anew.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState

from clippo.train.checkpoint import POLICY
from tests.conftest import ROOT, SMALL_SWEEP, clippo, processes_of
from tests.front.sweeps import OBJECTIVES

pytestmark = pytest.mark.timeout(900)

TRIALS = 16
ALL = ["reference", "cross_entropy", *(f"{i:05d}" for i in range(TRIALS)), "confirm-"]
"""Every trial of the sweep; of what is confirmed only the beginning is known."""
FLAGS = [
    *SMALL_SWEEP[:4], "--name", "mortal", "--epochs", "3", "3",
    "--trials", str(TRIALS), "--stopping", "halving", "--min-epochs", "1", "--baselines", "cross_entropy",
    "--confirm", "1", "--alphas", "0", "0.5",
]  # fmt: skip
STUDY = """
import json, runpy, sys
import optuna
create, studies = optuna.create_study, []
def kept(**options):
    study = create(**options)
    studies.extend([study] * ("storage" not in options))
    return study
optuna.create_study = kept
file, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    told = [[(t.user_attrs.get("trials"), t.state.name) for t in study.trials] for study in studies]
    open(file, "w").write(json.dumps(told))
"""
"""Runs a program and writes down the studies that it kept in memory: what has ended, what the sampler saw."""


def moments() -> Iterator[Any]:
    """Signals, and the share of the sweep's trials that have ended."""
    yield pytest.param("SIGKILL", 0.3)  # tests/integration/test_submit.py has SIGTERM
    rng = random.Random(0)
    for how, count in (("SIGKILL", 10), ("SIGTERM", 5), ("SIGINT", 5)):
        for _ in range(count):
            share = rng.random()
            yield pytest.param(how, share, id=f"{how}-{share:.2f}", marks=pytest.mark.soak)
    yield pytest.param("SIGKILL", 0.02, marks=pytest.mark.soak)  # nothing is measured yet
    yield pytest.param("SIGKILL", 0.97, marks=pytest.mark.soak)  # only the confirmation is left


@pytest.mark.parametrize(("how", "share"), [*moments()])
def test_a_sweep_that_is_ended_goes_on(how: str, share: float, ready: Path) -> None:
    mirror, memory = f"sqlite:///{ready / 'study.db'}", ready / "study.json"
    command = ["sweeps/typo_sweep.py", "--results", str(ready), "--mirror", mirror, *FLAGS]
    rows, started = ready / "trials" / "sweep=mortal", ready / "started" / "sweep=mortal"
    with (
        (ready / "log").open("w+") as log,
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        ) as driver,
    ):
        try:
            there, within = divmod(share * len(ALL), 1.0)
            while len(names(rows)) < there:
                assert driver.poll() is None, (ready / "log").read_text()
                time.sleep(0.02)
            # Not always just after a row; before the first one and in the last trial there is more to see.
            time.sleep(within * (10.0 if there in (0, len(ALL) - 1) else 0.5))
            if how == "SIGINT":  # a terminal sends it to all of its processes
                os.killpg(driver.pid, signal.SIGINT)
            else:
                driver.send_signal(signal.Signals[how])
            status = driver.wait(timeout=200)
        finally:
            driver.kill()
    said = (ready / "log").read_text()
    if how != "SIGKILL":
        assert status in (0, 130), said
        assert "Traceback" not in said
    before = {rows / name: (rows / name).stat().st_mtime_ns for name in names(rows)}
    begun = attempts(started)
    whole = len(before) == len(ALL) and (ready / "examples").exists()

    again = subprocess.run(
        [sys.executable, "-c", STUDY, str(memory), *command],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before, "none is written twice"
    finished = {path.stem.rpartition("-")[0] for path in before}
    for trial_id, numbers in attempts(started).items():
        assert numbers == list(range(len(numbers)))
        new = numbers[len(begun.get(trial_id, [])) :]
        assert len(new) == (trial_id not in finished), "what had not finished is run once more, nothing else"
        assert (rows / f"{trial_id}-{numbers[-1]}.parquet").exists()
    trials = table(ready, "trials")
    ended = [t["trial_id"][: len("confirm-")] if is_confirming(t) else t["trial_id"] for t in trials]
    assert sorted(ended) == sorted(ALL)
    assert len(names(rows)) == len(ALL), "each is there once"
    assert {t["status"] for t in trials} <= {"completed", "stopped_early"}

    rungs = {
        (m["trial_id"], m["epoch"]): m["value"] for m in table(ready, "metrics") if m["name"] == "rung_stop"
    }
    for t in trials:
        last = max((epoch for i, epoch in rungs if i == t["trial_id"]), default=None)
        was_stopped = last is not None and rungs[t["trial_id"], last] == 1
        if is_searched(t):
            assert [e for i, e in sorted(rungs) if i == t["trial_id"]] == [1, 2][:last], "of every rung"
        assert was_stopped == (t["status"] == "stopped_early"), "the metrics say why"
        if t["trial_id"] != "reference":
            weights = Path(t["checkpoint_uri"])
            assert weights.name == (f"averaged-{last:03d}.safetensors" if was_stopped else POLICY)
            assert weights.is_file(), "what it offers can be exported"

    states = {"completed": TrialState.COMPLETE, "stopped_early": TrialState.PRUNED}
    expected = sorted(([int(t["trial_id"])], states[t["status"]].name) for t in trials if is_searched(t))
    kept = [sorted(map(tuple, study)) for study in json.loads(memory.read_text())]
    in_memory = [study for study in kept if study and study[0][0]]  # the report makes some of its own
    seen = [(trials, TrialState.COMPLETE.name) for trials, _ in expected]
    assert in_memory == ([] if whole else [expected, seen]), "none is left RUNNING"
    shown = optuna.load_study(study_name="mortal", storage=mirror).trials
    assert sorted((t.user_attrs["trials"], t.state.name) for t in shown) == expected

    front = json.loads(clippo("front", str(ready), "--json").stdout)
    assert front["completed"] + front["stopped_early"] == TRIALS + 1
    points = {(p["trial_id"], p["variant"]): (p["robustness"], p["retention"]) for p in front["points"]}
    found = front_of_rows([e for e in table(ready, "evals") if not is_confirming(e)])
    assert points.keys() == found.keys()
    assert all(points[key] == pytest.approx(found[key]) for key in points)
    deadline = time.monotonic() + 150  # the agents of a raylet that is gone look around once in a while
    while (left := processes_of(driver.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, "what the first driver had started is gone"


def is_searched(row: Mapping[str, Any]) -> bool:
    return bool(row["trial_id"].isdigit())


def is_confirming(row: Mapping[str, Any]) -> bool:
    return bool(row["trial_id"].startswith("confirm-"))


def names(folder: Path) -> list[str]:
    """The rows in a folder; nothing but rows and what is being written may be there."""
    if not folder.exists():
        return []
    found = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    assert all(name.endswith(".parquet") for name in found), found
    return found


def attempts(folder: Path) -> dict[str, list[int]]:
    """The attempts that were begun, by trial."""
    found = sorted(tuple(path.stem.rsplit("-", 1)) for path in folder.glob("*.json"))
    return {i: [int(n) for _, n in group] for i, group in itertools.groupby(found, key=lambda key: key[0])}


def table(results: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table by pyarrow alone."""
    files = sorted((results / name / "sweep=mortal").glob("*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def front_of_rows(evals: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """The front by the definitions, without the project's code: every point against every other."""
    last = {e["trial_id"]: max(o["epoch"] for o in evals if o["trial_id"] == e["trial_id"]) for e in evals}
    counts: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for e in evals:
        split, _, name = e["eval_set"].partition("/")
        if split == "validation" and e["epoch"] == last[e["trial_id"]]:
            counts.setdefault((e["trial_id"], e["variant"]), {})[name] = e["n_correct"], e["n_total"]
    accuracy = {key: {name: n / of for name, (n, of) in sets.items()} for key, sets in counts.items()}
    untouched = accuracy["reference", "reference"]

    def point(key: tuple[str, str]) -> tuple[float, float]:
        right, of = zip(*(counts[key][name] for name in OBJECTIVES.goal.sets), strict=True)
        kept = [min(1.0, accuracy[key][name] / untouched[name]) for name in OBJECTIVES.retention_sets]
        return sum(right) / sum(of), sum(kept) / len(kept)

    # alpha=0 are the weights of the untouched model, which is there under its own name
    return dict(undominated({key: point(key) for key in counts if key[1] != "alpha=0"}))


def undominated(
    points: Mapping[tuple[str, str], tuple[float, float]],
) -> Iterator[tuple[tuple[str, str], tuple[float, float]]]:
    for key, (a, b) in points.items():
        if not any(c >= a and d >= b and (c > a or d > b) for c, d in points.values()):
            yield key, (a, b)
