"""The whole sweep as a user runs it: a process, real Ray, real stores."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.compute as pc
import pytest
import torch
from optuna.trial import TrialState
from PIL import Image

from clippo.prepared import PreparedSet
from clippo.results import ENDED, INTERRUPTED, ResultStore
from clippo.train.checkpoint import POLICY, STATE
from tests.conftest import SMALL_SWEEP, S3Server, clippo, processes_of, running_sweep, sweep
from tests.test_export import counts_of_file

pytestmark = pytest.mark.timeout(900)  # each test starts Ray once or twice

ROOT = Path(__file__).parents[2]


def test_it_prints_progress_the_front_and_where_things_are(finished: tuple[Path, str]) -> None:
    results, printed = finished
    assert "   6/6  " in printed
    assert "confirmed with" in printed
    assert "Pareto front of four" in printed
    assert "untouched" in printed
    assert f"clippo front {results} --sweep four" in printed
    assert f"report: {results}/reports/four.html" in printed
    assert "Recommended" in (results / "reports/four.html").read_text(encoding="utf-8")
    assert "Traceback" not in printed
    assert len(printed.splitlines()) < 80, "a wall of logs"


@pytest.mark.soak
def test_of_two_drivers_of_one_sweep_one_ends(ready: Path) -> None:
    command = [
        sys.executable, "sweeps/typo_sweep.py", "--results", str(ready), "--name", "two", "--trials", "40",
        *SMALL_SWEEP[:4], "--epochs", "4", "4", "--alphas", "0", "--confirm", "0", "--baselines",
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet) as first:
        try:
            while not list(ready.glob("trials/sweep=two/00*.parquet")):
                assert first.poll() is None
                time.sleep(0.1)
            second = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
            )
            if second.returncode == 2:  # the first one has the sweep for itself, and much left to do
                first.send_signal(signal.SIGTERM)
            assert first.wait(timeout=300) in (0, 2, 130)
        finally:
            first.kill()
    said = second.stdout + second.stderr
    assert "its last driver did not end in good order" in said
    assert 2 in (first.returncode, second.returncode), "they met, so one has ended"
    assert "Traceback" not in said
    if second.returncode == 2:
        assert re.search("^error: another driver of sweep 'two' has begun trial 000", said, re.MULTILINE)
    attempts = [path.stem for path in ready.glob("started/sweep=two/*.json")]
    rows = [path.stem for path in ready.glob("trials/sweep=two/0*.parquet")]
    assert set(rows) <= set(attempts)


def test_every_trial_has_its_rows(finished: tuple[Path, str]) -> None:
    store = ResultStore(str(finished[0]))
    trials = store.trials("four").to_pylist()
    numbered = ["00000", "00001", "00002", "00003"]
    [confirming] = [t for t in trials if t["trial_id"].startswith("confirm-")]
    assert sorted(t["trial_id"] for t in trials if t is not confirming) == [
        *numbered, "cross_entropy", "reference",
    ]  # fmt: skip
    [confirmed] = [t for t in trials if f"confirm-{t['trial_id']}" == confirming["trial_id"]]
    same = ("loss", "beta", "kl_weight", "learning_rate", "epochs")
    assert [confirming[n] for n in same] == [confirmed[n] for n in same]
    assert (confirming["seed"], confirming["workers"]) == (1, 2 if (os.cpu_count() or 1) > 1 else 0)
    tuned = [t for t in trials if t["trial_id"] in numbered]
    beside = [sum(a["started_at"] <= b["started_at"] < a["finished_at"] for a in tuned) for b in tuned]
    assert max(beside) <= 2, "no more at once than search.concurrency"
    assert {t["status"] for t in trials} == {"completed"}
    for t in tuned:
        assert t["loss"] in ("dpo", "ipo", "kto")
        assert 0 < t["device_s"] < t["wall_s"]
        assert t["prepared_digest"]
        assert t["seed"] == 0
        assert Path(t["checkpoint_uri"]).name == POLICY
        assert Path(t["checkpoint_uri"]).is_file()
    [plain] = [t for t in trials if t["trial_id"] == "cross_entropy"]
    assert (plain["beta"], plain["orthogonality"]) == (None, None), "what a trial does not use is no number"
    assert {n["name"] for n in store.metrics("four").to_pylist()} >= {
        "loss",
        "preference_loss",
        "kl",
        "train_s",
    }
    evals = store.evals("four")
    assert pc.min(pc.subtract(evals["n_total"], evals["n_correct"])).as_py() >= 0
    variants = {(r["trial_id"], r["variant"]) for r in evals.to_pylist()}
    curve = [f"alpha={a / 10:g}" for a in range(11)]
    tuned_trials = ("cross_entropy", *(f"0000{i}" for i in range(4)))
    assert variants == {("reference", "reference")} | {
        (trial, v) for trial in (*tuned_trials, confirming["trial_id"]) for v in ("averaged", "last", *curve)
    }
    by_set = {(r["trial_id"], r["variant"], r["eval_set"]): r["n_correct"] for r in evals.to_pylist()}
    for (trial, variant, name), correct in by_set.items():
        if variant == "alpha=0":
            assert correct == by_set["reference", "reference", name], (trial, name)


def test_whoever_follows_it_sees_that_it_has_ended(finished: tuple[Path, str]) -> None:
    store = ResultStore(str(finished[0]))
    state = store.state("four")
    assert state is not None
    assert state["state"] == ENDED
    assert state["trials"] == len(store.finished("four").keys() - {"reference"})


def test_the_front_of_the_rows(finished: tuple[Path, str]) -> None:
    printed = clippo("front", str(finished[0]), "--json")
    front = json.loads(printed.stdout)
    assert front["completed"] == 5, "four trials and plain fine-tuning"
    assert front["failed"] == 0
    assert [p["trial_id"] for p in front["points"] if p["confirmed"]], "a point of the front was confirmed"
    assert 0 < front["hypervolume_interval"][0] <= front["hypervolume_interval"][1] <= 1
    assert front["hypervolume_interval"][0] <= front["hypervolume"] <= 1
    assert front["reference"]["retention"] == 1.0
    for point in front["points"]:
        for name in ("robustness", "retention"):
            low, high = point[f"{name}_interval"]
            assert 0 <= low <= point[name] <= high <= 1
        assert 0 < point["probability"] <= 1
        assert {"robustness", "retention", "attack_success_rate"} <= point["test"].keys()
    by_retention = [(p["retention"], p["robustness"]) for p in front["points"]]
    assert by_retention == sorted(by_retention, key=lambda p: (-p[0], p[1]))


def test_a_finished_sweep_just_shows_its_front(finished: tuple[Path, str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*.parquet")}
    again = sweep("--results", str(finished[0]), "--name", "four")
    assert again.returncode == 0
    assert "resumed" in again.stdout
    assert "Pareto front of four" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in finished[0].rglob("*.parquet")} == before


def test_a_name_of_another_configuration_is_refused(finished: tuple[Path, str]) -> None:
    other = sweep("--results", str(finished[0]), "--name", "four", "--data.split-seed", "9")
    assert other.returncode == 2
    assert other.stderr.count("\n") == 1
    assert "data.split_seed" in other.stderr
    assert "another --name" in other.stderr


@pytest.mark.soak
def test_killed_and_run_again_it_goes_on(ready: Path) -> None:
    flags = ["--name", "killed", "--search.concurrency", "1", "--search.trials", "2", "--epochs", "6", "6"]
    flags += ["--search.baselines"]
    state = ready / "checkpoints" / "sweep=killed" / "00001" / STATE
    with running_sweep(ready, state.exists, *flags) as driver:
        os.killpg(driver.pid, signal.SIGKILL)
    store = ResultStore(str(ready))
    finished_before = sorted(store.trials("killed")["trial_id"].to_pylist())
    assert finished_before == ["00000", "reference"]
    before = {p: p.stat().st_mtime_ns for p in ready.glob("trials/*/*.parquet")}
    kept = torch.load(state, weights_only=True)["reports"]
    assert 1 <= len(kept) < 6

    done = sweep("--results", str(ready), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before, "no finished trial is run or written twice"
    attempts = {t["trial_id"]: t["attempt"] for t in store.trials("killed").to_pylist()}
    assert attempts == {"reference": 0, "00000": 0, "00001": 1}
    rows = [
        m for m in store.metrics("killed").to_pylist() if m["trial_id"] == "00001" and m["name"] == "eval_s"
    ]
    assert sorted(m["epoch"] for m in rows) == [1, 2, 3, 4, 5, 6]
    first = next(m["value"] for m in rows if m["epoch"] == 1)
    assert first == kept[0]["metrics"]["eval_s"], "the first epoch was not trained again"


def test_interrupted_it_shows_what_there_is(ready: Path) -> None:
    def a_trial_is_written() -> bool:
        return bool(list(ready.glob("trials/*/0*.parquet")))

    with running_sweep(ready, a_trial_is_written, "--name", "stopped") as driver:
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        out, err = driver.communicate(timeout=100)
    assert driver.returncode == 130, out + err
    assert "Pareto front of stopped" in out
    state = ResultStore(ready).state("stopped")
    assert state is not None
    assert state["state"] == INTERRUPTED
    assert "--name stopped" in err
    assert "Traceback" not in out + err


def test_seeds_of_a_setting_of_which_one_fails_three_objectives_a_warm_start_and_a_budget_that_is_spent(
    finished: tuple[Path, str], ready: Path
) -> None:
    unreadable = ready / "checkpoints" / "sweep=seeds" / "00001" / STATE
    unreadable.parent.mkdir(parents=True)
    unreadable.write_bytes(b"a disk has lost what was here")
    mirror = f"sqlite:///{ready / 'study.db'}"
    objectives = ["robustness", "attack_success_rate:attacked/seen", "device_s"]
    flags = [
        "--results", str(ready), "--name", "seeds", "--baselines", "--replicates", "3", "--trials", "9",
        "--device-hours", "1e-6", "--objectives", *objectives, "--min-retention", "0.5", "--mirror", mirror,
        "--warm-start", f"{finished[0]}/four",
    ]  # fmt: skip
    done = sweep(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warm start from 4 trials" in done.stdout
    assert "of 1e-06 device-hours are spent" in done.stdout
    first, failed, second, _ = ResultStore(str(ready)).trials("seeds").to_pylist()
    seeds = [(t["trial_id"], t["seed"], t["status"]) for t in (first, failed, second)]
    assert seeds == [
        ("00000", 0, "completed"), ("00001", 1, "failed"), ("00002", 2, "completed")
    ], "a setting is run with all its seeds"  # fmt: skip
    assert (bool(failed["error"]), failed["checkpoint_uri"]) == (True, None)
    for name in ("loss", "beta", "kl_weight"):
        assert first[name] == failed[name] == second[name]
    *known, told = optuna.load_study(study_name="seeds", storage=mirror).trials
    assert [trial.user_attrs for trial in known] == 4 * [{"warm_start": True}], "the sampler has them"
    assert told.state == TrialState.COMPLETE
    assert told.values[2] == pytest.approx((first["device_s"] + second["device_s"]) / 2)
    assert told.user_attrs["trials"] == [0, 1, 2]
    assert set(told.user_attrs["sd"]) >= set(objectives)
    front = json.loads(clippo("front", str(ready), "--json").stdout)
    assert front["seeds"]["repeated_settings"] == 1
    searched = {s["trial_id"]: list(s["objectives"].values()) for s in front["searched"]}
    assert searched["00000"] == pytest.approx(told.values), "Optuna and the front's reader agree"
    again = sweep(*flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(ResultStore(str(ready)).trials("seeds")) == 4, "what was spent is remembered"


def test_it_ends_when_its_hours_are_over_and_when_nothing_gets_better(ready: Path) -> None:
    flags = ["--results", str(ready), "--name", "patient", "--trials", "8"]
    flags += ["--learning-rate", "1e-9", "1e-9", "--baselines"]  # so that nothing moves
    over = sweep(*flags, "--wall-hours", "1e-9")
    assert over.returncode == 1, over.stdout + over.stderr
    assert "no more trials: 1e-09 hours are over" in over.stdout
    assert ResultStore(str(ready)).finished("patient").keys() == {"reference"}
    done = sweep(*flags, "--patience", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    [why] = re.findall(r"no more trials: the hypervolume has not grown for (\d+) trials", done.stdout)
    # Two run at once, so one more may have begun before the second ended.
    assert 2 <= int(why) < len(ResultStore(str(ready)).finished("patient")) <= 5


def test_a_diverging_trial_fails_and_the_sweep_goes_on(ready: Path) -> None:
    done = sweep("--results", str(ready), "--name", "nan", "--search.learning-rate", "1e6", "1e6")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no trial of the sweep was completed" in done.stdout
    tuned = [t for t in ResultStore(str(ready)).trials("nan").to_pylist() if t["trial_id"] != "reference"]
    assert len(tuned) == 5, "four trials and plain fine-tuning"
    for t in tuned:
        assert t["status"] == "failed"
        assert "the loss became" in t["error"]
        assert "at step" in t["error"]
        assert t["checkpoint_uri"] is None


def has_a_limit() -> bool:
    """Whether this process may have less memory than the machine has (Linux, cgroup v2)."""
    limit = Path("/sys/fs/cgroup/memory.max")
    return limit.exists() and limit.read_text().strip() != "max"


def memory(name: str) -> int:
    """A line of what Linux says of the machine's memory [bytes]; 0 elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.alone
@pytest.mark.skipif(memory("MemAvailable") < 14 << 30, reason="takes 9 GiB of memory for a moment")
@pytest.mark.skipif(has_a_limit(), reason="a container's own limit would end the tests")
def test_a_machine_whose_memory_is_used_up(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray kills a trial before the system would kill whatever comes first."""
    total, available = memory("MemTotal"), memory("MemAvailable")
    threshold = (total - available + (8 << 30)) / total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    rows, flags = ready / "trials" / "sweep=full", ["--name", "full", "--trials", "60"]
    with running_sweep(ready, lambda: any(rows.glob("0*.parquet")), *flags) as driver:
        used = []
        while driver.poll() is None and len(used) < 36:
            used.append(b"x" * (256 << 20))
        out, err = driver.communicate(timeout=120)
        del used
    assert driver.returncode == 2, out + err
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith(
        "error: Ray killed a trial, as its machine was about to run out of"
    )


def test_a_folder_named_from_here(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for c in ("cat", "dog", "key", "bus"):
        (tmp_path / "pictures" / c).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / c / f"{i}.png")
    source = f"folder:{os.path.relpath(tmp_path / 'pictures', ROOT)}"
    flags = [
        "--name",
        "folder",
        "--data.source",
        source,
        "--search.trials",
        "1",
        "--retention-sets",
        "clean/seen",
    ]
    done = sweep("--results", str(tmp_path / "r"), *flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_on_s3_with_two_workers_and_a_trial_that_is_stopped(
    s3_env: S3Server, small_set: PreparedSet, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gain is enough, so the trial is stopped when its second epoch is compared with its first."""
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    uri = f"s3://{s3_env.bucket}/two"
    prepared = str(ready / "prepared" / small_set.digest)
    s3_env.filesystem().put(prepared, f"{s3_env.bucket}/two/prepared/", recursive=True)
    common = ["--search.concurrency", "1", "--search.trials", "1", "--train.precision", "fp32", "--verbose"]
    common += ["--epochs", "3", "3", "--stopping", "no_better", "--min-epochs", "1", "--min-gain", "1"]
    done = sweep(*common, "--results", uri, "--name", "two", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    one = sweep(*common, "--results", str(ready), "--name", "one")
    assert one.returncode == 0, one.stdout + one.stderr
    for run, name in ((done, "two"), (one, "one")):
        logged = re.findall(rf"\[{name}-(\S+)\] epoch 1, step \d+: loss ", run.stdout + run.stderr)
        assert sorted(logged) == ["00000-0", "cross_entropy-0"], "by one rank of each trial"

    def last(store: ResultStore, name: str) -> dict[str, Any]:
        row = next(t for t in store.trials(name).to_pylist() if t["trial_id"] == "00000")
        last = {("00000", "averaged", 2), ("cross_entropy", "last", 3)}
        counts = {
            (e["trial_id"], e["eval_set"]): e["n_correct"]
            for e in store.evals(name).to_pylist()
            if (e["trial_id"], e["variant"], e["epoch"]) in last
        }
        assert {i for i, _ in counts} == {"00000", "cross_entropy"}
        return row | {"counts": counts}

    two_workers, in_process = last(ResultStore(uri), "two"), last(ResultStore(str(ready)), "one")
    for name in ("loss", "beta", "kl_weight", "learning_rate"):
        assert two_workers[name] == in_process[name]
    assert (two_workers["workers"], in_process["workers"]) == (2, 0)
    # The same weights but for the order of sums, so at most a picture on the edge is read otherwise.
    assert all(abs(two_workers["counts"][s] - n) <= 1 for s, n in in_process["counts"].items())
    for row, store, name in ((two_workers, uri, "two"), (in_process, str(ready), "one")):
        assert (row["status"], row["params_json"]) == ("stopped_early", '{"stopped_after": 2}')
        assert row["checkpoint_uri"].endswith("/00000/averaged-002.safetensors")
        metrics = ResultStore(store).metrics(name).to_pylist()
        why = {
            (m["epoch"], m["name"]): m["value"]
            for m in metrics
            if m["trial_id"] == "00000" and m["name"].startswith("rung_")
        }
        numbers = ("rung_stop", "rung_rank", "rung_place", "rung_trials")
        assert [[why[epoch, n] for n in numbers] for epoch in (1, 2)] == [[0, 0, 0, 1], [1, 1, 1, 2]]
        # Two workers may be in the third epoch by then; what is handed out is still of the second.
        out = tmp_path / f"{name}.safetensors"
        done = clippo("export", store, "--trial", "00000", "--out", str(out))
        assert done.returncode == 0, done.stderr
        stored = {s: n for (i, s), n in row["counts"].items() if i == "00000"}
        found = counts_of_file(out)
        assert all(abs(found[s][0] - stored[s]) <= 1 for s in found.keys() & stored.keys())
        assert "- stopped after: 2" in out.with_suffix(".md").read_text()
    secrets = (s3_env.key, s3_env.secret)
    assert not any(s in done.stdout + done.stderr for s in secrets)
    shown = clippo("front", uri)
    assert "Pareto front of two" in shown.stdout, shown.stderr
    assert "1 trials completed, 1 stopped early, 0 failed" in " ".join(shown.stdout.split())


MENDABLE = [
    (["--search.concurrency", "64"], "64 trials at once"),
    (["--data.seen-share", "2"], "between 0 and 1"),
    (["--model.name", "ViT-B-23"], "near matches"),
    (["--model.trainable", "last:9"], "K from 1 to 4"),
    (["--data.source", "folder:/nowhere"], "no such folder"),
    (["--search.losses", "dpo", "ppo"], "cross_entropy, dpo, ipo, kto"),
    (["--retention-sets", "clean/unseen"], "clean/seen"),
    (["--results", "/proc/nowhere"], "/proc/nowhere"),
    (["--results", "s3://"], "no bucket"),
    (["--task", "gender-reveal"], "typographic"),
    (["--name", "a/b"], "a/b"),
    (["--nope", "1"], "--nope"),
    (["--search.trials", "many"], "many"),
    (["--data.train-fonts", "Papyrus.ttf"], "bundled fonts"),
    (["--results", "s3://bucket/r", "--track", "mlflow"], "set MLFLOW_TRACKING_URI"),
]
ONE_BY_ONE = """
import contextlib, io, json, runpy, sys, traceback
told = []
for flags in json.load(sys.stdin):
    sys.argv = ["sweeps/typo_sweep.py", *flags]
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
    told.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, str]]:
    """Status, output and errors of the program with each wrong flag; in one process, as it starts slowly."""
    results = ["--results", str(tmp_path_factory.mktemp("wrong"))]
    commands = [[*SMALL_SWEEP, *results, *flags] for flags, _ in MENDABLE]
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE],
        input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[tuple[int, str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("number", range(len(MENDABLE)), ids=[" ".join(flags) for flags, _ in MENDABLE])
def test_what_the_user_can_mend_is_one_line(number: int, complaints: list[tuple[int, str, str]]) -> None:
    status, printed, error = complaints[number]
    assert status == 2, printed + error
    assert MENDABLE[number][1] in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in printed


@pytest.mark.parametrize(("flags", "complaint"), [MENDABLE[0], (["--nope", "1"], "--nope")])
def test_what_the_user_can_mend_is_the_end_of_the_process(
    flags: list[str], complaint: str, tmp_path: Path
) -> None:
    done = sweep("--results", str(tmp_path), *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert complaint in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("bucket", "secret", "complaint"),
    [("vanished", "", "create the bucket"), ("", "another-secret", "check the credentials")],
)
def test_a_store_that_cannot_be_used_is_told_before_the_first_trial(
    bucket: str, secret: str, complaint: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret or s3_env.secret)
    done = sweep("--results", f"s3://{bucket or s3_env.bucket}/refused")
    assert done.returncode == 2, done.stdout + done.stderr
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not [s for s in (s3_env.secret, "another-secret") if s in done.stdout + done.stderr]


def test_the_lines_of_the_readme_read_the_rows(finished: tuple[Path, str]) -> None:
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    code = next(b.split("```")[0] for b in blocks if "duckdb" in b)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=finished[0].parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "00003" in done.stdout
    assert "n_correct" in done.stdout


def test_the_gallery_shows_what_each_model_said(finished: tuple[Path, str]) -> None:
    rows = ResultStore(str(finished[0])).examples("four").to_pylist()
    assert len(rows) == 24
    for row in rows:
        said = json.loads(row["predictions_json"])
        assert {"reference", "cross_entropy"} <= said.keys() <= {"reference", "cross_entropy", "recommended"}
        assert row["label"] != row["attack_word"]
        assert Image.open(io.BytesIO(row["picture"])).size == (96, 96)
    fooled = sum(json.loads(r["predictions_json"])["reference"] == r["attack_word"] for r in rows)
    assert fooled >= 8, "the untouched model reads most of them as the word"


def test_the_gallery_belongs_to_the_end_of_the_sweep(finished: tuple[Path, str], tmp_path: Path) -> None:
    results = tmp_path / "results[red]:cat:"  # neither a style nor an emoji
    shutil.copytree(finished[0], results)
    flags = ["--results", str(results), "--name", "four", "--confirm", "1"]
    store = ResultStore(str(results))

    def rows() -> dict[Path, int]:
        tables = [results / name for name in ("trials", "metrics", "evals", "started")]
        return {p: p.stat().st_mtime_ns for folder in tables for p in folder.glob("*/*")}

    shutil.rmtree(results / "examples")  # as if it had been killed after its last trial
    before = rows()
    again = sweep(*flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert store.examples("four").num_rows == 24
    assert rows() == before, "nothing else is done"
    assert f"results in {results}\n" in again.stdout, "a path is printed as it is"
    assert f"clippo front '{results}' --sweep four" in again.stdout

    def it_goes_on() -> bool:
        return bool(list(results.glob("started/sweep=four/00004-*.json")))

    with running_sweep(results, it_goes_on, *flags[2:], "--search.trials", "5"):
        assert store.examples("four").num_rows == 0, "what it would show is no longer recommended"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="confirms in its own process where there is one core")
@pytest.mark.soak
def test_a_confirming_trial_outlives_its_driver(ready: Path) -> None:
    """It dies while its workers start, which hold all CPUs; Ray Train does not free them then."""

    def driver_with_workers() -> list[int]:
        running = processes_of(sweeping.pid)
        if not any(command.startswith("ray::RayTrainWorker") for command in running.values()):
            return []
        return [pid for pid, command in running.items() if command.startswith("ray::ImplicitFunc")]

    flags = ["--name", "orphans", "--search.trials", "1", "--search.baselines", "--search.confirm", "1"]
    with running_sweep(ready, lambda: True, *flags) as sweeping:
        deadline = time.monotonic() + 300
        while not (found := driver_with_workers()):
            assert sweeping.poll() is None, sweeping.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(found[0], signal.SIGKILL)
        out, err = sweeping.communicate(timeout=200)
    assert sweeping.returncode == 0, out + err
    trials = {t["trial_id"]: t for t in ResultStore(str(ready)).trials("orphans").to_pylist()}
    confirming = trials["confirm-00000"]
    assert (confirming["status"], confirming["workers"], confirming["preemptions"]) == ("completed", 2, 1)


@pytest.mark.alone
def test_interrupted_twice_it_is_gone_at_once(ready: Path) -> None:
    def it_searches() -> bool:
        return bool(list(ready.glob("started/*/*.json")))

    with running_sweep(ready, it_searches, "--name", "twice") as driver:
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.3)
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        began = time.monotonic()
        out, err = driver.communicate(timeout=100)
        assert time.monotonic() - began < 2
    assert driver.returncode == 130, out + err
    assert "interrupted; the same command" not in err, "which is said at the end of all that is put in order"
    assert "Traceback" not in out + err
