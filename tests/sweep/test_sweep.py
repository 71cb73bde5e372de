"""The whole sweep as a user runs it: a process, real Ray, real stores."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from clippo.results import ENDED, INTERRUPTED, ResultStore
from clippo.train.checkpoint import POLICY, STATE
from tests.conftest import S3Server, clippo, running_sweep, sweep

pytestmark = pytest.mark.timeout(900)  # each test starts Ray once or twice

ROOT = Path(__file__).parents[2]


def test_it_prints_progress_the_front_and_where_things_are(finished: tuple[Path, str]) -> None:
    results, printed = finished
    assert "   6/6  " in printed
    assert "confirmed with" in printed
    assert "Pareto front of four" in printed
    assert "untouched" in printed
    assert f"clippo front {results} --sweep four" in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) < 80, "a wall of logs"


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
    assert {t["status"] for t in trials} == {"completed"}
    for t in tuned:
        assert t["loss"] in ("dpo", "ipo", "kto")
        assert 0 < t["device_s"] < t["wall_s"]
        assert t["prepared_digest"]
        assert t["seed"] == 0
        assert Path(t["checkpoint_uri"]).name == POLICY
        assert Path(t["checkpoint_uri"]).is_file()
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


def test_killed_and_run_again_it_goes_on(tmp_path: Path) -> None:
    flags = [
        "--name",
        "killed",
        "--search.concurrency",
        "1",
        "--search.trials",
        "2",
        "--search.epochs",
        "6",
        "6",
    ]
    state = tmp_path / "checkpoints" / "sweep=killed" / "00001" / STATE
    with running_sweep(tmp_path, state.exists, *flags) as driver:
        os.killpg(driver.pid, signal.SIGKILL)
    store = ResultStore(str(tmp_path))
    finished_before = sorted(store.trials("killed")["trial_id"].to_pylist())
    assert finished_before == ["00000", "cross_entropy", "reference"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("trials/*/*.parquet")}
    kept = torch.load(state, weights_only=True)["reports"]
    assert 1 <= len(kept) < 6

    done = sweep("--results", str(tmp_path), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before, "no finished trial is run or written twice"
    attempts = {t["trial_id"]: t["attempt"] for t in store.trials("killed").to_pylist()}
    assert attempts == {"reference": 0, "cross_entropy": 0, "00000": 0, "00001": 1}
    rows = [
        m for m in store.metrics("killed").to_pylist() if m["trial_id"] == "00001" and m["name"] == "eval_s"
    ]
    assert sorted(m["epoch"] for m in rows) == [1, 2, 3, 4, 5, 6]
    first = next(m["value"] for m in rows if m["epoch"] == 1)
    assert first == kept[0]["metrics"]["eval_s"], "the first epoch was not trained again"


def test_interrupted_it_shows_what_there_is(tmp_path: Path) -> None:
    def a_trial_is_written() -> bool:
        return bool(list(tmp_path.glob("trials/*/0*.parquet")))

    with running_sweep(tmp_path, a_trial_is_written, "--name", "stopped") as driver:
        driver.send_signal(signal.SIGINT)
        out, err = driver.communicate(timeout=100)
    assert driver.returncode == 130, out + err
    assert "Pareto front of stopped" in out
    state = ResultStore(tmp_path).state("stopped")
    assert state is not None
    assert state["state"] == INTERRUPTED
    assert "--name stopped" in err
    assert "Traceback" not in out + err


def test_a_diverging_trial_fails_and_the_sweep_goes_on(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = sweep("--results", str(results), "--name", "nan", "--search.learning-rate", "1e6", "1e6")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no trial of the sweep was completed" in done.stdout
    tuned = [t for t in ResultStore(str(results)).trials("nan").to_pylist() if t["trial_id"] != "reference"]
    assert len(tuned) == 5, "four trials and plain fine-tuning"
    for t in tuned:
        assert t["status"] == "failed"
        assert "the loss became" in t["error"]
        assert "at step" in t["error"]
        assert t["checkpoint_uri"] is None


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


def test_on_s3_with_two_workers(s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path))
    uri = f"s3://{s3_env.bucket}/two"
    common = ["--search.concurrency", "1", "--search.trials", "1", "--train.precision", "fp32", "--verbose"]
    done = sweep(*common, "--results", uri, "--name", "two", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    one = sweep(*common, "--results", str(tmp_path / "one"), "--name", "one")
    assert one.returncode == 0, one.stdout + one.stderr
    for run, name in ((done, "two"), (one, "one")):
        logged = re.findall(rf"\[{name}-(\S+)\] epoch 1, step \d+: loss ", run.stdout + run.stderr)
        assert sorted(logged) == ["00000-0", "cross_entropy-0"], "by one rank of each trial"

    def last(store: ResultStore, name: str) -> dict[str, Any]:
        row = next(t for t in store.trials(name).to_pylist() if t["trial_id"] == "00000")
        evals = store.evals(name).to_pylist()
        counts = {
            e["eval_set"]: e["n_correct"]
            for e in evals
            if e["trial_id"] == "00000" and e["variant"] == "last"
        }
        return row | {"counts": counts}

    two_workers, in_process = last(ResultStore(uri), "two"), last(ResultStore(str(tmp_path / "one")), "one")
    for name in ("loss", "beta", "kl_weight", "learning_rate"):
        assert two_workers[name] == in_process[name]
    assert (two_workers["workers"], in_process["workers"]) == (2, 0)
    # The same weights but for the order of sums, so at most a picture on the edge is read otherwise.
    assert all(abs(two_workers["counts"][s] - n) <= 1 for s, n in in_process["counts"].items())
    secrets = (s3_env.key, s3_env.secret)
    assert not any(s in done.stdout + done.stderr for s in secrets)
    shown = clippo("front", uri)
    assert "Pareto front of two" in shown.stdout, shown.stderr


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
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
    ],
)
def test_what_the_user_can_mend_is_one_line(flags: list[str], complaint: str, tmp_path: Path) -> None:
    results = [] if "--results" in flags else ["--results", str(tmp_path)]
    done = sweep(*results, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert complaint in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout


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


def test_interrupted_twice_it_is_gone_at_once(tmp_path: Path) -> None:
    def it_searches() -> bool:
        return bool(list(tmp_path.glob("started/*/*.json")))

    with running_sweep(tmp_path, it_searches, "--name", "twice") as driver:
        driver.send_signal(signal.SIGINT)
        time.sleep(0.3)
        driver.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = driver.communicate(timeout=100)
        assert time.monotonic() - began < 2
    assert driver.returncode == 130, out + err
    assert "Traceback" not in out + err
