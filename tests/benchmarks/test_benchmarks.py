"""The benchmarks: the published procedure computes what it says, and every program still runs (tiny)."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import default_collate

from benchmarks import report
from benchmarks.common import RESULTS, Line, Spread, alternate, data_of, ratios
from benchmarks.growth import lines_of, peak_memory
from benchmarks.published import Pairs, Published
from clippo.model import BetaAverage, ClipModel
from clippo.train.step import class_logps

ROOT = Path(__file__).parents[2]
B = 4  # pairs of a batch


@pytest.fixture
def pairs(clip: ClipModel) -> Pairs:
    return Pairs(data_of(B, prompts=6), "train", clip.image_size[0])


@pytest.fixture
def published(clip: ClipModel, pairs: Pairs) -> Published:
    prompts = [f"a photo of a {name}" for name in pairs.names]
    torch.manual_seed(0)
    return Published(clip, prompts, loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=1e-3, steps=10)


def batch_of(pairs: Pairs) -> list[torch.Tensor]:
    batch: list[torch.Tensor] = default_collate([pairs[i] for i in range(len(pairs))])
    return batch


def test_pairs_come_smaller_than_the_model_takes_them_and_differ_in_a_word(pairs: Pairs) -> None:
    clean, attacked, chosen, rejected = batch_of(pairs)
    assert clean.shape == attacked.shape == (B, 3, 72, 72)  # 168 / 224 of 96
    assert clean.dtype == torch.uint8
    assert (clean != attacked).any(1).flatten(1).any(1).all()
    assert (chosen != rejected).all()
    assert max(chosen.max(), rejected.max()) < len(pairs.candidates) == 6
    assert torch.equal(pairs[1][1], attacked[1])  # drawn anew, but the same


def test_published_log_probabilities_are_those_of_the_reference(
    clip: ClipModel, pairs: Pairs, published: Published
) -> None:
    pictures = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)  # the size that needs no resizing
    torch.testing.assert_close(
        published.processed(pictures), clip.normalized(pictures.permute(0, 2, 3, 1)), atol=1e-5, rtol=0
    )
    with torch.no_grad():
        image_BD = clip.model.encode_image(clip.normalized(pictures.permute(0, 2, 3, 1)), normalize=True)
        text_CD = clip.text_features([f"a photo of a {name}" for name in pairs.names])
        expected = class_logps(image_BD, text_CD, clip.logit_scale)
        logps = published.logps(published.reference, pictures, published.tokens_CL)
        shorter = published.padded_to_the_longest()
        assert shorter.shape[1] < published.tokens_CL.shape[1] == 16
        logps_of_shorter = published.logps(published.reference, pictures, shorter)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logps_of_shorter, expected, atol=1e-4, rtol=0)


def test_a_published_step_trains_both_towers_and_averages_all_weights(
    pairs: Pairs, published: Published
) -> None:
    before = {n: w.detach().clone() for n, w in published.policy.named_parameters()}
    average = BetaAverage(before, total=10, beta=0.7)
    first = published.step(*batch_of(pairs))
    assert first == pytest.approx(math.log(2), abs=1e-5)
    average.update(dict(published.policy.named_parameters()))
    second = published.step(*batch_of(pairs))
    assert second < first
    average.update(dict(published.policy.named_parameters()))
    after = dict(published.policy.named_parameters())
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert {"logit_scale", "text_projection", "token_embedding.weight", "visual.conv1.weight"} <= moved
    for name, weight in published.reference.named_parameters():
        assert torch.equal(weight, before[name])
    for name, weight in published.average.named_parameters():
        torch.testing.assert_close(weight, average.weights[name])


def test_rounds_take_turns_and_ratios_are_taken_in_each() -> None:
    calls: list[str] = []
    clock = iter((2.0, 1.0, 9.0, 3.0))

    def run(name: str) -> float:
        calls.append(name)
        return next(clock)

    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    seconds = alternate({n: lambda n=n: run(n) for n in "AB"}, 2, console)
    console.file.close()
    assert calls == ["A", "B", "A", "B"]
    assert ratios(seconds["A"], seconds["B"]) == [2.0, 3.0]


def test_a_goal_is_judged_by_the_median() -> None:
    spread = Spread.of([4.0, 5.0, 9.0])
    assert (spread.low, spread.median, spread.high, spread.n) == (4.5, 5.0, 7.0, 3)
    assert Line("", spread, "x", 5.0).met is True
    assert Line("", spread, "x", 5.1).met is False
    assert Line("", spread, "x", 5.0, at_least=False).met is True
    assert Line("", spread, "x", 4.9, at_least=False).met is False
    assert Line("", spread, "x").met is None


def test_growth_tells_linear_from_quadratic() -> None:
    def measured(power: float) -> list[dict[str, float]]:
        return [
            {
                "pictures": n,
                "build_s": n**power,
                "epoch_s": n**power,
                "epoch_waiting_s": n**power / 50,
                "build_peak_mib": 9,
                "epoch_peak_mib": 9,
            }
            for n in (1000, 3000, 30000)
        ]

    def of(lines: list[Line], what: str) -> float:
        return next(line.value.median for line in lines if line.what.startswith(what))

    linear, quadratic = lines_of([measured(1)]), lines_of([measured(2), measured(2.1), measured(1)])
    assert of(linear, "building: seconds a picture") == pytest.approx(1)
    assert of(linear, "building: exponent") == pytest.approx(1)
    assert of(quadratic, "building: seconds a picture") == pytest.approx(10)
    assert of(quadratic, "an epoch: exponent") == pytest.approx(2)
    assert of(quadratic, "building: peak memory") == 1
    assert of(quadratic, "an epoch: waiting for data, 30,000 pictures") == pytest.approx(0.02)
    assert {line.value.n for line in quadratic} == {3}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_sees_what_this_process_and_its_children_hold() -> None:
    program = "import numpy, time; a = numpy.ones(32_000_000); time.sleep(2)"  # 256 MB
    with peak_memory() as idle:
        pass
    with peak_memory() as peak:
        held = np.ones(16_000_000)  # 128 MB
        subprocess.run([sys.executable, "-c", program], check=True)
    assert held.sum() == 16_000_000
    assert 330e6 < peak() - idle() < 650e6


def test_the_readme_shows_the_results_that_are_there() -> None:
    text = report.README.read_text()
    assert report.with_section(text, report.section(RESULTS)) == text, "run python -m benchmarks.report"


# --- the programs, tiny -------------------------------------------------------------------------------------


def ran(program: str, results: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{program}", "--smoke", "--results", str(results), *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (path,) = results.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert str(results) not in path.read_text(), "a path of this machine"
    assert found["benchmark"] in done.stdout
    assert all(line["median"] > 0 for line in found["lines"] if line["unit"])  # an exponent can be anything
    return found


def line_of(found: dict[str, Any], what: str) -> dict[str, Any]:
    line: dict[str, Any] = next(line for line in found["lines"] if line["what"] == what)
    return line


def test_step(tmp_path: Path) -> None:
    found = ran("step", tmp_path)
    seconds = found["seconds"]
    published, short, *cuts = seconds
    assert cuts == ["image fp32", "image bf16", "last:4 bf16", "transform fp32"]
    for against in (published, short):
        for cut in cuts:
            line = line_of(found, f"{against} / {cut}")
            expected = np.median(np.array(seconds[against]) / np.array(seconds[cut]))
            assert line["median"] == pytest.approx(expected)
            assert line["n"] == len(seconds[cut]) == 2
            assert line["goal"] is None  # goals are for 16 pairs
    assert line_of(found, f"{published} / transform fp32")["median"] > 1


def test_loop(tmp_path: Path) -> None:
    found = ran("loop", tmp_path)
    for name, measured in found["measured"].items():
        line = line_of(found, f"loop / bare: {name}")
        assert line["median"] == pytest.approx(
            np.median(np.array(measured["loop"]) / np.array(measured["bare"]))
        )
        assert len(measured["loop"]) == len(measured["averaged"]) == len(measured["warm"]) == 2
        for kind in ("cold", "warm") if measured["cold"] else ("warm",):
            assert line_of(found, f"waiting, {kind}: {name}")["median"] == pytest.approx(
                np.median(measured[kind])
            )
            assert 0 < np.min(measured[kind]) < np.max(measured[kind]) < 1
    read = {name: len(measured["cold"]) for name, measured in found["measured"].items()}
    assert sorted(read.values()) == [0, 2], "embeddings are in memory"


@pytest.mark.timeout(900)
def test_workers(tmp_path: Path) -> None:
    found = ran("workers", tmp_path)
    assert {name: np.shape(e) for name, e in found["epochs"].items()} == {
        "torch.distributed": (1, 1), "Ray Train": (1, 1)
    }  # fmt: skip
    ratio = line_of(found, "Ray Train / torch.distributed: an epoch after launch")
    assert ratio["median"] == pytest.approx(
        found["epochs"]["Ray Train"][0][0] / found["epochs"]["torch.distributed"][0][0]
    )
    assert ratio["goal_is"] == "at most"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_sweep(tmp_path: Path) -> None:
    found = ran("sweep", tmp_path)
    assert len(found["published"]) == len(found["clippo"]) == found["settings"]["trials"] == 1
    whole = line_of(found, "published / clippo: whole sweep")
    assert whole["median"] == pytest.approx(
        line_of(found, "published: whole sweep, 1 epochs")["median"]
        / line_of(found, "clippo: whole sweep, 1 epochs")["median"]
    )
    for trial in found["published"]:
        assert trial["epoch"] == trial["settings"]["epochs"] == 1
        # groups x (validation + test): all kinds of the average, clean and attacked of the other models
        assert len(trial["accuracy"]) == 2 * ((3 + 2) + (4 + 2 * 2))
        assert all(0 <= share <= 1 for share in trial["accuracy"].values())
        assert trial["accuracy"]["test/clean/seen reference"] > 0.5


def test_growth(tmp_path: Path) -> None:
    found = ran("growth", tmp_path)
    with (tmp_path / "growth.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["pictures"]) for row in rows] == [32, 64]
    assert float(rows[1]["disk_mib"]) > float(rows[0]["disk_mib"])
    assert [m["pictures"] for m in found["measured"]] == [32, 64]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_scale(tmp_path: Path) -> None:
    found = ran("scale", tmp_path)
    assert line_of(found, "PUTs of a trial")["median"] == 4, "a note that it begins, and three tables"
    assert line_of(found, "driver, processor time of a trial")["median"] < 5
    assert len(found["ended"]) == 1, "every fiftieth"
