"""The loop: equal configurations give equal trajectories."""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from clippo.config import TrainConfig
from clippo.errors import DivergedError
from clippo.evaluate import Counts, objectives
from clippo.model import ClipModel, Policy
from clippo.prepared import PreparedSet, open_prepared
from clippo.train import FileCheckpoints, TrialSettings, evaluate_reference, fit
from clippo.train.checkpoint import POLICY, STATE, load_policy
from clippo.train.loop import Frozen

SETTINGS = TrialSettings(loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=2e-4, epochs=2, seed=3)
CONFIG = TrainConfig(batch_size=16, precision="fp32")  # 160 pairs: 10 steps an epoch
UNEVEN = TrainConfig(
    batch_size=15, precision="fp32"
)  # 11 steps of 15 or 14 pairs, which two ranks share 8 : 7


def run(
    clip: ClipModel, prepared: PreparedSet, frozen: Frozen, folder: Path,
    settings: TrialSettings = SETTINGS, config: TrainConfig = CONFIG, report: Any = None,
) -> list[dict[str, Any]]:  # fmt: skip
    torch.set_num_threads(1)
    reports: list[dict[str, Any]] = []
    fit(
        Policy(clip, "last:2"), prepared, frozen, settings, config,
        report=report or reports.append, checkpoints=FileCheckpoints(folder),
    )  # fmt: skip
    return reports


def policy_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    policy = load_policy(FileCheckpoints(folder))
    assert policy is not None
    return policy


def test_reports_hold_counts_of_every_set(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    reports = run(clip, small_set, frozen, tmp_path)
    assert [r["epoch"] for r in reports] == [1, 2]
    assert [r["step"] for r in reports] == [10, 20]
    first, last = ({(e["eval_set"], e["variant"]) for e in r["evals"]} for r in reports)
    validation = {s.name for s in small_set.evaluation_of("validation")}
    everything = {s.name for s in small_set.evaluation}
    assert first == {(name, "averaged") for name in validation}
    assert last == {(name, v) for name in everything for v in ("averaged", "last")}
    assert all(e["n_total"] == 24 and 0 <= e["n_correct"] <= 24 for r in reports for e in r["evals"])
    assert reports[1]["metrics"]["preference_loss"] < reports[0]["metrics"]["preference_loss"] < 0.6931


@pytest.mark.parametrize(
    ("loss", "beta"), [("dpo", 0.1), ("ipo", 0.03), ("kto", 0.3), ("cross_entropy", None)]
)
def test_tuning_makes_robust(
    loss: str, beta: float | None, clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, loss=loss, beta=beta, learning_rate=3e-4, epochs=4)
    reports = run(clip, small_set, frozen, tmp_path, settings)
    reference = evaluate_reference(Policy(clip, "last:2"), small_set, frozen, CONFIG)

    def robustness(counts: list[Counts]) -> float:
        sets = ("attacked/seen", "attacked/held_out")
        found = objectives(
            counts, reference, split="test", robustness_sets=sets, retention_sets=("clean/seen",)
        )
        return found["robustness"]

    tuned = [Counts(**e) for e in reports[-1]["evals"] if e["variant"] == "last"]
    assert robustness(tuned) > robustness(reference) + 0.15


def test_a_policy_that_does_not_move_counts_like_the_reference(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    still = dataclasses.replace(SETTINGS, learning_rate=0.0, epochs=1)
    reports = run(clip, small_set, frozen, tmp_path, still)
    reference = evaluate_reference(Policy(clip, "last:2"), small_set, frozen, CONFIG)
    counts = [
        dataclasses.replace(Counts(**e), variant="reference")
        for e in reports[0]["evals"]
        if e["variant"] == "last"
    ]
    assert counts == reference
    assert reports[0]["metrics"]["preference_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert reports[0]["metrics"]["kl"] == pytest.approx(0, abs=1e-6)


def _killed(clip: ClipModel, small_set_folder: Path, frozen: Frozen, folder: Path) -> None:
    def report(row: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run(clip, open_prepared(small_set_folder), frozen, folder, report=report)


def test_killed_after_an_epoch_and_resumed_equals_uninterrupted(
    clip: ClipModel, small_set: PreparedSet, small_cache: Path, frozen: Frozen, tmp_path: Path
) -> None:
    whole = run(clip, small_set, frozen, tmp_path / "whole")
    process = torch.multiprocessing.get_context("spawn").Process(
        target=_killed, args=(clip, small_cache / small_set.digest, frozen, tmp_path / "killed")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / STATE).exists()
    resumed = run(clip, small_set, frozen, tmp_path / "killed")

    assert [r["evals"] for r in resumed] == [r["evals"] for r in whole]  # the first epoch's report is kept
    expected, found = policy_of(tmp_path / "whole"), policy_of(tmp_path / "killed")
    for variant, weights in expected.items():
        for name, weight in weights.items():
            assert torch.equal(weight, found[variant][name]), (variant, name)


def _rank(rank: int, port: int, clip: ClipModel, folder_of_set: Path, frozen: Frozen, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    run(clip, open_prepared(folder_of_set), frozen, folder, dataclasses.replace(SETTINGS, loss="kto"), UNEVEN)
    dist.destroy_process_group()


def test_two_workers_give_the_weights_of_one(
    clip: ClipModel, small_set: PreparedSet, small_cache: Path, frozen: Frozen, tmp_path: Path
) -> None:
    # KTO is the hard case: its baseline is a mean over the global batch.
    run(clip, small_set, frozen, tmp_path / "one", dataclasses.replace(SETTINGS, loss="kto"), UNEVEN)
    from tests.conftest import free_ports

    torch.multiprocessing.spawn(
        _rank,
        args=(free_ports(1)[0], clip, small_cache / small_set.digest, frozen, tmp_path / "two"),
        nprocs=2,
    )
    one, two = policy_of(tmp_path / "one"), policy_of(tmp_path / "two")
    start = Policy(clip, "last:2").trainable_weights()

    def flat(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([weights[n].detach().flatten() for n in sorted(start)])

    # Sums are taken in another order, and AdamW makes a step of any gradient, be it only rounding noise (as
    # that of the key bias, which no softmax sees); so the whole change is compared: 2 % of its length.
    moved = (flat(one["last"]) - flat(start)).norm()
    assert (flat(one["last"]) - flat(two["last"])).norm() <= 0.02 * moved


def test_a_diverging_run_says_at_which_step(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    with pytest.raises(
        DivergedError, match=r"the loss became (nan|inf|-inf) at step \d+ of 20; lower the learning"
    ):
        run(clip, small_set, frozen, tmp_path, dataclasses.replace(SETTINGS, learning_rate=1e6, loss="ipo"))


def test_a_finished_run_only_reports_again(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    first = run(clip, small_set, frozen, tmp_path)
    policy, state = (tmp_path / name for name in (POLICY, STATE))
    written = policy.stat().st_mtime_ns
    assert state.stat().st_size < policy.stat().st_size / 10, (
        "no optimizer is kept when nothing is left to train"
    )
    assert run(clip, small_set, frozen, tmp_path) == first
    assert policy.stat().st_mtime_ns == written
