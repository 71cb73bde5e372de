"""Flags: presets, short names, and a dry run that runs nothing."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clippo.cli import _full_flag, _short_flags
from clippo.config import SweepConfig
from sweeps.typo_sweep import paper_sweep, transform_sweep, typo_sweep
from tests.conftest import ROOT, clippo
from tests.data.test_group_sets import released_vl_bias
from tests.tasks.test_test_sets import rta


def typo(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "sweeps" / "typo_sweep.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_a_flag_may_go_without_its_group_where_its_name_is_enough() -> None:
    short = _short_flags(SweepConfig())
    assert _full_flag("--precision", short) == "--train.precision"
    assert _full_flag("--learning-rate=1", short) == "--search.learning-rate=1"
    assert _full_flag("--no-compile", short) == "--train.no-compile"
    assert _full_flag("--name", short) == "--name", "the sweep's, not the model's"
    assert _full_flag("--train.precision", short) == "--train.precision"
    assert _full_flag("precision", short) == "precision"


def test_the_published_setting() -> None:
    paper = paper_sweep()
    assert (paper.train.batch_size, paper.train.optimizer, paper.train.average_beta) == (512, "adamax", 0.7)
    assert paper.search.learning_rate == (2e-5, 2e-5)
    assert paper.search.epochs == (3, 3)
    assert paper.data.picture_size == 168
    betas = (paper.search.beta_dpo, paper.search.beta_ipo, paper.search.beta_kto)
    assert (*betas, paper.search.kl_weight) == ((0.01, 1.5),) * 3 + ((0.01, 2.0),)
    assert {s.partition(":")[0].partition("=")[0] for s in paper.data.test_sets} == {
        "rta-100", "paint", "disentangling", "caltech101", "oxford_pets", "stanford_cars", "flowers102",
        "food101", "fgvc_aircraft", "dtd", "sun397", "eurosat",
    }  # fmt: skip
    assert paper.data.source == "folder:data/imagenet100"
    assert paper.model.prompt == "a photo of a {}."
    assert (paper.model.name, paper.model.pretrained, paper.model.trainable) == (
        "ViT-B-32",
        "openai",
        "image",
    )
    assert transform_sweep().model.trainable == "transform"
    assert typo_sweep() == SweepConfig()


def test_a_dry_run_of_the_paper_says_what_is_missing_and_runs_nothing(tmp_path: Path) -> None:
    flags = ["--preset", "paper", "--dry-run", "--precision", "bf16", "--trials", "9"]
    results = tmp_path / "results[red]:cat:"
    done = typo(*flags, "--results", str(results))
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert f"there    results {results}\n" in printed, "a path is printed as it is"
    assert "results[red]:cat:" in printed.split("there    results")[0].replace("\n", "").replace(" ", "")
    config = SweepConfig()
    told = {line.partition(" ")[0] for line in printed.partition("search space")[0].splitlines()}
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        nested = dataclasses.fields(group) if dataclasses.is_dataclass(group) else ()
        names = {f"{field.name}.{inner.name}" for inner in nested} or {field.name}
        assert names <= told, "the whole configuration is shown"
    assert "cannot be counted before the pictures are there" in printed
    for line in ("train.precision", "bf16", "kl_weight", "0.01 to 2, log", "1 to compare with"):
        assert line in printed
    assert "there    model ViT-B-32, known; its weights are downloaded" in printed
    assert "missing  pictures folder:data/imagenet100" in printed
    assert "missing  test set rta-100:data/rta-100" in printed
    assert not list(results.glob("**/*")), "nothing is left behind"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--preset", "papers"], "must be one of: demo, transform, paper"),
        (["--preset"], "argument --preset: expected one argument: demo, transform, paper"),
        (["--learning-rate", "1e-5", "inf"], "search.learning_rate is (1e-05, inf); it must be a range"),
        (["--folds", "3"], "data.folds is 3; the task typographic has no use for it"),
        (["--seed", "x"], "x"),
        (["--seed", "-1"], "search.seed is -1; it must be in [0, 2^31)"),
        (["--split-seed", "-1"], "data.split_seed is -1; it must be in [0, 2^31)"),
        (["--prompt", "~nobody-of-this-name/" + "a photo " * 99], "as a template it lacks {}"),
    ],
)
def test_flags_that_cannot_be_used(flags: list[str], complaint: str) -> None:
    done = typo(*flags)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_evaluate_prints_counts_with_intervals() -> None:
    done = clippo("evaluate", "--data", "demo", "--pictures", "64", "--json")
    assert done.returncode == 0, done.stderr
    clean, attacked = json.loads(done.stdout)["sets"]
    assert (clean["set"], clean["n_total"]) == ("clean", 64)
    low, high = clean["accuracy_interval"]
    assert low < clean["accuracy"] <= high
    assert attacked["attack_success_rate"] == attacked["n_fooled"] / 64
    seed = clippo("evaluate", "--seed", "-1")
    assert (seed.returncode, seed.stderr) == (2, "error: seed is -1; it must be in [0, 2^31)\n")
    wrong = clippo("evaluate", "--data", "rta-100:/nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_evaluate_tells_what_of_a_published_set_is_left_out(tmp_path: Path) -> None:
    photos = rta(tmp_path / "photos")
    (photos / "label=cat_text=hat.png").write_bytes(b"no picture")
    (photos / "notes.txt").touch()
    flags = ["--data", f"rta-100:{photos}"]
    as_json = clippo("evaluate", *flags, "--json")
    assert as_json.returncode == 0, as_json.stderr
    told = json.loads(as_json.stdout)
    assert [s["n_total"] for s in told["sets"]] == [4]
    unreadable, unfit = told["left_out"]
    assert unreadable.startswith("label=cat_text=hat.png: ")
    assert unfit == "notes.txt: not listed, of no known pattern, or its word names the object itself"
    shown = clippo("evaluate", *flags)
    assert (shown.returncode, shown.stderr) == (0, f"2 left out, the first: {unreadable}\n")


def test_evaluate_ranks_people() -> None:
    flags = ["--data", "people", "--pretrained", "people", "--pictures", "180", "--top-k", "3"]
    done = clippo("evaluate", *flags, "--json")
    assert done.returncode == 0, done.stderr
    concept, group, neutral = json.loads(done.stdout)["sets"]
    assert [s["set"] for s in (concept, group, neutral)] == ["concept", "group", "neutral"]
    for name in ("max_skew", "ndkl", "majority_share"):
        low, high = concept[f"{name}_interval"]
        assert low < concept[name] < high
        assert name not in group
    assert concept["max_skew"] > 0.2, "the bundled bias"
    assert neutral["accuracy"] > 0.6
    shown = clippo("evaluate", *flags)
    assert "MaxSkew" in shown.stdout
    assert "read as the word" not in shown.stdout


def test_evaluate_wants_each_group_once(tmp_path: Path) -> None:
    spec = f"vl-bias:{released_vl_bias(tmp_path)}"
    done = clippo("evaluate", "--data", spec, "--groups", "man", "man")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "groups has 'man' twice" in done.stderr


def test_prepare_builds_what_the_sweep_then_finds(tmp_path: Path) -> None:
    small = ["--data.train-pictures", "40", "--data.eval-pictures", "8", "--workers", "1"]
    done = clippo("prepare", "--results", str(tmp_path), *small)
    assert done.returncode == 0, done.stderr
    assert "40 train/clean" in done.stdout
    assert "40 train/attacked" in done.stdout
    assert "8 test/nonsense/held_out" in done.stdout
    (manifest,) = (tmp_path / "prepared").glob("*/manifest.json")
    built = manifest.stat().st_mtime_ns
    again = clippo("prepare", "--results", str(tmp_path), *small, "--model.prompt", "the {}")
    assert again.stdout == done.stdout
    assert manifest.stat().st_mtime_ns == built
    idle = clippo("prepare", "--results", str(tmp_path), "--workers", "0")
    assert (idle.returncode, idle.stderr) == (2, "error: workers is 0; it must be at least 1\n")
    wrong = clippo("prepare", "--results", str(tmp_path), "--data.source", "folder:/nowhere")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr


def test_a_password_of_a_mirror_is_neither_kept_nor_printed(tmp_path: Path) -> None:
    flags = ["--results", str(tmp_path / "results"), "--mirror", "postgresql://user:hunter2@localhost/db"]
    for more in ([], ["--dry-run"]):
        done = typo(*flags, *more)
        assert done.returncode == 2
        assert "carries a password" in done.stderr
        assert "hunter2" not in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()
