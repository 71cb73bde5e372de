"""The loop: equal configurations give equal trajectories."""

import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from clippo.config import DataConfig, ModelConfig, TrainConfig
from clippo.errors import DivergedError
from clippo.evaluate import Counts, Goal, Objectives
from clippo.model import ClipModel, Policy, policy_of
from clippo.prepared import Location, PreparedSet, open_prepared, prepare
from clippo.train import FileCheckpoints, TrialSettings, evaluate_reference, fit
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.checkpoint import POLICY, STATE, load_policy, load_state, weights_after, weights_of
from clippo.train.loop import AGAIN
from clippo.train.step import Batch, Frozen, Step

SETTINGS = TrialSettings(loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=2e-4, epochs=2, seed=3)
CONFIG = TrainConfig(batch_size=16, precision="fp32")  # 160 pairs: 10 steps an epoch
UNEVEN = TrainConfig(
    batch_size=15, precision="fp32"
)  # 11 steps of 15 or 14 pairs, which two ranks share 8 : 7


KTO = dataclasses.replace(SETTINGS, loss="kto")  # the hard case: its baseline is a mean over the global batch


def run(
    clip: ClipModel, prepared: PreparedSet, frozen: Frozen, folder: Path,
    settings: TrialSettings = SETTINGS, config: TrainConfig = CONFIG, report: Any = None,
    trainable: str = "last:2", curve_sets: Sequence[str] = (), **more: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    torch.set_num_threads(1)
    reports: list[dict[str, Any]] = []
    fit(
        policy_of(clip, trainable), prepared, frozen, settings, config,
        report=report or reports.append, checkpoints=FileCheckpoints(folder), curve_sets=curve_sets,
        **more,
    )  # fmt: skip
    return reports


def tuned_in(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    policy = load_policy(FileCheckpoints(folder))
    assert policy is not None
    return policy


def losses_in(folder: Path) -> list[float]:
    """The loss of each epoch of a run that has ended."""
    state = load_state(FileCheckpoints(folder))
    assert state is not None
    return [r["metrics"]["loss"] for r in state["reports"]]


def test_reports_hold_counts_of_every_set(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    began = time.perf_counter()
    reports = run(clip, small_set, frozen, tmp_path)
    took = time.perf_counter() - began
    assert [r["epoch"] for r in reports] == [1, 2]
    assert [r["step"] for r in reports] == [10, 20]
    early, late = ({(e["eval_set"], e["variant"]) for e in r["evals"]} for r in reports)
    validation = {s.name for s in small_set.evaluation_of("validation")}
    everything = {s.name for s in small_set.evaluation}
    assert early == {(name, "averaged") for name in validation}
    assert late == {(name, v) for name in everything for v in ("averaged", "last")}
    assert all(e["n_total"] == 24 and 0 <= e["n_correct"] <= 24 for r in reports for e in r["evals"])
    first, second = metrics = [r["metrics"] for r in reports]
    assert second["preference_loss"] < first["preference_loss"] < 0.6931
    assert all(0 <= m["data_s"] < m["train_s"] for m in metrics)
    assert sum(m["train_s"] + m["eval_s"] for m in metrics) < took, "each epoch has its own seconds"


@pytest.mark.parametrize(
    ("loss", "beta"), [("dpo", 0.1), ("ipo", 0.03), ("kto", 0.3), ("cross_entropy", None)]
)
def test_tuning_makes_robust(
    loss: str, beta: float | None, clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, loss=loss, beta=beta, learning_rate=3e-4, epochs=4)
    reports = run(clip, small_set, frozen, tmp_path, settings)
    reference = evaluate_reference(policy_of(clip, "last:2"), small_set, frozen, CONFIG)

    def robustness(counts: list[Counts]) -> float:
        sets = ("attacked/seen", "attacked/held_out")
        goal = Goal(name="robustness", measure="right", sets=sets)
        own = Objectives(goal=goal, retention_sets=("clean/seen",))
        return own.values(counts, reference, split="test")["robustness"]

    tuned = [Counts(**e) for e in reports[-1]["evals"] if e["variant"] == "last"]
    assert robustness(tuned) > robustness(reference) + 0.15


def test_a_policy_that_does_not_move_counts_like_the_reference(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    still = dataclasses.replace(SETTINGS, learning_rate=0.0, epochs=1)
    reports = run(clip, small_set, frozen, tmp_path, still)
    reference = evaluate_reference(policy_of(clip, "last:2"), small_set, frozen, CONFIG)
    counts = [
        dataclasses.replace(Counts(**e), variant="reference")
        for e in reports[0]["evals"]
        if e["variant"] == "last"
    ]
    assert counts == reference
    assert reports[0]["metrics"]["preference_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert reports[0]["metrics"]["kl"] == pytest.approx(0, abs=1e-6)


def counts_of(reports: list[dict[str, Any]], variant: str) -> dict[str, Counts]:
    last = [Counts(**e) for e in reports[-1]["evals"]]
    return {c.eval_set: dataclasses.replace(c, variant="") for c in last if c.variant == variant}


def test_the_curve_leads_from_the_reference_to_the_averaged_weights(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    sets = ("attacked/seen", "clean/held_out")
    settings = dataclasses.replace(SETTINGS, learning_rate=3e-4, epochs=3)
    reports = run(clip, small_set, frozen, tmp_path, settings, curve_sets=sets)
    variants = [e["variant"] for e in reports[-1]["evals"] if e["eval_set"] == "test/attacked/seen"]
    assert variants == ["averaged", "last", *(f"alpha={a / 10:g}" for a in range(11))]
    reference = {
        c.eval_set: dataclasses.replace(c, variant="")
        for c in evaluate_reference(policy_of(clip, "last:2"), small_set, frozen, CONFIG)
    }
    on_curve = {f"{split}/{name}" for split in ("validation", "test") for name in sets}
    start, end = (counts_of(reports, f"alpha={a}") for a in (0, 1))
    assert start.keys() == on_curve
    assert start == {name: reference[name] for name in on_curve}
    assert end == {name: counts_of(reports, "averaged")[name] for name in on_curve}
    assert end["test/attacked/seen"].n_fooled < start["test/attacked/seen"].n_fooled
    saved, policy = tuned_in(tmp_path), policy_of(clip, "last:2")
    for name, weight in weights_of(policy, saved, "alpha=1").items():
        assert torch.equal(weight, saved["averaged"][name]), name


def test_what_is_known_or_not_reported_is_not_measured(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    known = [
        Counts(eval_set=s.name, variant="reference", n_correct=1, n_total=2, n_fooled=0)
        for s in small_set.evaluation
    ]
    asked: list[set[str]] = []

    def worth_testing(counts: Sequence[Counts]) -> list[str]:
        asked.append({c.eval_set.partition("/")[0] for c in counts})
        return ["last", "alpha=0.5"]

    reports = run(
        clip, small_set, frozen, tmp_path, dataclasses.replace(SETTINGS, epochs=1),
        dataclasses.replace(CONFIG, alphas=(0.0, 0.5, 0.9, 1.0)), curve_sets=["attacked/seen"],
        reference_counts=known, worth_testing=worth_testing,
    )  # fmt: skip
    assert asked == [{"validation"}]
    measured = {
        split: [e["variant"] for e in reports[-1]["evals"] if e["eval_set"] == f"{split}/attacked/seen"]
        for split in ("validation", "test")
    }
    assert measured["validation"] == ["averaged", "last", "alpha=0", "alpha=0.5", "alpha=0.9", "alpha=1"]
    assert measured["test"] == ["averaged", "last", "alpha=0", "alpha=0.5", "alpha=1"]
    assert {c.n_total for c in counts_of(reports, "alpha=0").values()} == {2}, "they are those handed in"
    assert counts_of(reports, "alpha=1").items() <= counts_of(reports, "averaged").items()


def test_what_a_trial_has_when_it_is_stopped_is_what_its_report_counts(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    """Each epoch after which it may be stopped leaves its own weights; a run that ends there has the same."""
    settings, worth = dataclasses.replace(SETTINGS, epochs=4), {2: ["averaged"], 3: []}
    asked: list[Sequence[Counts]] = []

    def worth_testing(counts: Sequence[Counts]) -> list[str]:
        asked.append(counts)
        return worth.get(len(asked) + 1, [])

    more: dict[str, Any] = {"may_stop_after": 2, "worth_testing": worth_testing}
    reports = run(clip, small_set, frozen, tmp_path / "whole", settings, **more)
    saved = {p.name for p in (tmp_path / "whole").iterdir()}
    assert saved == {POLICY, STATE, "averaged-002.safetensors", "averaged-003.safetensors"}
    on_test = [{e["variant"] for e in r["evals"] if e["eval_set"].startswith("test/")} for r in reports]
    assert on_test == [set(), {"averaged"}, set(), {"averaged"}]
    for epoch in (2, 3):
        stopped = dataclasses.replace(settings, stopped_after=epoch)
        ended = run(clip, small_set, frozen, tmp_path / str(epoch), stopped)
        assert [r["epoch"] for r in ended] == list(range(1, epoch + 1))
        kept = load_policy(FileCheckpoints(tmp_path / "whole"), weights_after(epoch))
        assert kept is not None
        assert kept.keys() == {"averaged"}
        for name, weight in tuned_in(tmp_path / str(epoch))["averaged"].items():
            assert torch.equal(weight, kept["averaged"][name]), name
        averaged = [e for e in ended[-1]["evals"] if e["variant"] == "averaged"]
        assert all(e in averaged for e in reports[epoch - 1]["evals"])


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_micro_batches_give_the_weights_of_whole_batches(
    loss: str, clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, loss=loss, epochs=1)
    for size in (0, 5):
        config = dataclasses.replace(CONFIG, micro_batch=size)
        run(clip, small_set, frozen, tmp_path / str(size), settings, config)
    assert_same_change(clip, tuned_in(tmp_path / "0")["last"], tuned_in(tmp_path / "5")["last"])


def gradients(policy: Policy, step: Step, batch: Batch) -> dict[str, torch.Tensor]:
    step(batch, 0.0)
    return {n: p.grad.clone() for n, p in policy.trainable_weights().items() if p.grad is not None}


def moved_policy(clip: ClipModel) -> Policy:
    """A policy that has left the reference, so that the KL and KTO's baseline are far from zero."""
    policy, generator = policy_of(clip, "last:2").eval(), torch.Generator().manual_seed(0)
    noisy = {
        n: w + 0.4 * w.std(correction=0) * torch.randn(w.shape, generator=generator)
        for n, w in policy.trainable_weights().items()
    }
    policy.load_weights(noisy)
    return policy


def test_micro_batches_have_the_penalty_of_the_whole_batch(
    clip: ClipModel, transform_set: PreparedSet, frozen: Frozen
) -> None:
    """It is of the transform and not of pictures, so a part of a batch has a part of it."""
    cpu, pairs = torch.device("cpu"), Pairs.of(transform_set, frozen)
    batch = next(epoch_batches(pairs, 16, 0, 0, 0, 1, cpu))
    found = {}
    for size, weight in ((0, 100.0), (3, 100.0), (0, None)):
        policy = policy_of(clip, "transform").eval()
        policy.load_weights({n: 1.1 * w for n, w in policy.trainable_weights().items()})
        settings = dataclasses.replace(SETTINGS, orthogonality=weight)
        step = Step(
            policy, frozen, settings, dataclasses.replace(CONFIG, micro_batch=size), pairs.captions, cpu
        )
        (found[size, weight],) = gradients(policy, step, batch).values()
    whole, parts, without = found.values()
    assert (whole - parts).norm() <= 1e-3 * whole.norm()
    assert (whole - without).norm() > 0.5 * whole.norm(), "the penalty counts"


@pytest.mark.parametrize(
    ("loss", "precision", "tolerance"),
    [("dpo", "fp32", 1e-3), ("kto", "fp32", 1e-3), ("kto", "bf16", 0.03), ("kto", "fp16", 0.01)],  # rounding
)
def test_micro_batches_have_the_gradients_of_the_whole_batch(
    loss: str, precision: Any, tolerance: float, clip: ClipModel, small_set: PreparedSet, frozen: Frozen
) -> None:
    cpu = torch.device("cpu")
    settings = dataclasses.replace(SETTINGS, loss=loss, beta=2.0)
    pairs = Pairs.of(small_set, frozen)
    batch = next(epoch_batches(pairs, 16, 0, 0, 0, 1, cpu))
    found = {}
    for size in (0, 3):
        policy = moved_policy(clip)
        config = dataclasses.replace(CONFIG, micro_batch=size, precision=precision)
        step = Step(policy, frozen, settings, config, pairs.captions, cpu)
        assert step(batch, 0.0)[2] > 0.1, "the KL counts"
        found[size] = gradients(policy, step, batch)
    whole, parts = (torch.cat([g.flatten() for g in found[size].values()]) for size in (0, 3))
    assert (whole - parts).norm() <= tolerance * whole.norm()


def assert_same_change(
    clip: ClipModel, one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]
) -> None:
    """Sums are taken in another order, and AdamW makes a step of any gradient, be it only rounding noise (as
    that of the key bias, which no softmax sees); so the whole change is compared: 2 % of its length.
    """
    start = policy_of(clip, "last:2").trainable_weights()

    def flat(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([weights[n].detach().flatten() for n in sorted(start)])

    moved = (flat(one) - flat(start)).norm()
    assert moved > 0
    assert (flat(one) - flat(two)).norm() <= 0.02 * moved


@pytest.mark.parametrize(("precision", "pairs", "epochs"), [("bf16", 160, 2), ("fp16", 64, 1)])
def test_lower_precision_learns_what_full_precision_does(
    precision: Any,
    pairs: int,
    epochs: int,
    clip: ClipModel,
    small_cache: Path,
    frozen: Frozen,
    tmp_path: Path,
) -> None:
    data = DataConfig(train_pictures=pairs, eval_pictures=4)
    prepared = open_prepared(small_cache / prepare("typographic", data, ModelConfig(), Location(small_cache)))
    curves, settings = {}, dataclasses.replace(SETTINGS, stopped_after=epochs)
    for p in ("fp32", precision):
        config = dataclasses.replace(CONFIG, precision=p)
        reports = run(clip, prepared, frozen, tmp_path / p, settings, config)
        assert {r["precision"] for r in reports} == {p}
        curves[p] = [r["metrics"]["loss"] for r in reports]
    assert curves["fp32"][-1] < 0.9 * math.log(2), "one that stands still would not be told from it"
    assert curves[precision] == pytest.approx(curves["fp32"], rel=0.1)


def test_half_precision_scales_the_loss_and_makes_no_step_that_overflows(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen
) -> None:
    cpu = torch.device("cpu")
    pairs, config = Pairs.of(small_set, frozen), dataclasses.replace(CONFIG, precision="fp16")
    batch = next(epoch_batches(pairs, 16, 0, 0, 0, 1, cpu))
    policy = moved_policy(clip)
    step = Step(policy, frozen, SETTINGS, config, pairs.captions, cpu)

    def weights() -> torch.Tensor:
        return torch.cat([w.detach().flatten() for w in policy.trainable_weights().values()]).clone()

    before, state = weights(), step.state_dict()
    assert state["scaler"]["scale"] == 1024
    state["scaler"]["scale"] = 2.0**100
    step.load_state_dict(state)
    step(batch, 1e-3)
    assert torch.equal(weights(), before)
    assert step.state_dict()["scaler"]["scale"] == 2.0**99
    state["scaler"]["scale"] = 1024.0
    step.load_state_dict(state)
    step(batch, 1e-3)
    assert not torch.equal(weights(), before)


def test_a_transform_learns_and_its_power_turns_the_attack_up_and_down(
    clip: ClipModel, transform_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    settings = TrialSettings(
        loss="dpo", beta=0.5, kl_weight=1.0, learning_rate=3e-3, epochs=8, seed=0, orthogonality=0.05
    )
    config = dataclasses.replace(CONFIG, batch_size=64)
    sets = ("attacked/seen", "attacked/held_out", "clean/seen")
    reports = run(
        clip, transform_set, frozen, tmp_path, settings, config, trainable="transform", curve_sets=sets
    )
    assert reports[-1]["metrics"]["loss"] < reports[0]["metrics"]["loss"]
    fooled = []
    for t in CONFIG.powers:
        counts = counts_of(reports, f"t={t:g}")
        fooled.append(sum(c.n_fooled for name, c in counts.items() if "attacked" in name))
    assert all(b < a for a, b in itertools.pairwise(fooled)), "the higher t, the fewer are read as the word"
    assert fooled[-1] < 0.75 * fooled[CONFIG.powers.index(0)]
    untouched = counts_of(reports, "t=0")
    for c in evaluate_reference(policy_of(clip, "transform"), transform_set, frozen, config):
        if c.eval_set in untouched:
            assert dataclasses.replace(c, variant="") == untouched[c.eval_set]
    assert counts_of(reports, "t=1").items() <= counts_of(reports, "averaged").items()


def test_compiling_changes_nothing_but_the_speed(
    clip: ClipModel, transform_set: PreparedSet, frozen: Frozen, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compile_, compiled_modules = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module: compiled_modules.append(module) or compile_(module))
    settings = dataclasses.replace(SETTINGS, epochs=1, orthogonality=0.05)
    curves = [
        run(
            clip, transform_set, frozen, tmp_path / str(compiled), settings,
            dataclasses.replace(CONFIG, compile=compiled), trainable="transform",
        )[0]["metrics"]["loss"]
        for compiled in (False, True)
    ]  # fmt: skip
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert len(compiled_modules) == 1


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
    expected, found = tuned_in(tmp_path / "whole"), tuned_in(tmp_path / "killed")
    for variant, weights in expected.items():
        for name, weight in weights.items():
            assert torch.equal(weight, found[variant][name]), (variant, name)


class MachineGoneError(Exception):
    pass


def told_after(steps: int) -> Callable[[], bool]:
    """A machine that is told after so many steps that it will go, and goes two steps later."""
    asked = itertools.count(1)

    def is_leaving() -> bool:
        if (step := next(asked)) == steps + 2:
            raise MachineGoneError
        return step == steps

    return is_leaving


@pytest.mark.parametrize("steps", [4, 10, 13])
def test_told_to_go_and_resumed_in_mid_epoch_equals_undisturbed(
    steps: int, clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    whole = run(clip, small_set, frozen, tmp_path / "whole", KTO)
    with pytest.raises(MachineGoneError):
        run(clip, small_set, frozen, tmp_path / "told", KTO, is_leaving=told_after(steps))
    trained: list[None] = []
    resumed = run(
        clip, small_set, frozen, tmp_path / "told", KTO, is_leaving=lambda: bool(trained.append(None))
    )
    assert len(trained) == 20 - steps, "of 20 steps none was made again"
    assert [r["evals"] for r in resumed] == [r["evals"] for r in whole]
    losses = [[r["metrics"]["loss"] for r in reports] for reports in (resumed, whole)]
    assert losses[0] == losses[1]
    for name, weight in tuned_in(tmp_path / "whole")["averaged"].items():
        assert torch.equal(weight, tuned_in(tmp_path / "told")["averaged"][name]), name


def test_a_long_epoch_is_kept_every_so_often(
    clip: ClipModel, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, minutes_between_checkpoints=1e-9)
    with pytest.raises(MachineGoneError):
        run(clip, small_set, frozen, tmp_path, config=config, is_leaving=told_after(5))
    state = load_state(FileCheckpoints(tmp_path))
    assert state is not None
    assert (state["part"]["step"], state["reports"]) == (6, [])


def _rank(rank: int, port: int, clip: ClipModel, folder_of_set: Path, frozen: Frozen, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for size in (0, 3):
        config = dataclasses.replace(UNEVEN, micro_batch=size)
        run(clip, open_prepared(folder_of_set), frozen, folder / str(size), KTO, config)
    run(clip, open_prepared(folder_of_set), frozen, folder / "grown", KTO, UNEVEN)
    dist.destroy_process_group()


def test_two_workers_give_the_trajectory_of_one_also_in_micro_batches_and_after_one_has_begun(
    clip: ClipModel, small_set: PreparedSet, small_cache: Path, frozen: Frozen, tmp_path: Path
) -> None:
    run(clip, small_set, frozen, tmp_path / "one", KTO, UNEVEN)
    with pytest.raises(MachineGoneError):
        run(clip, small_set, frozen, tmp_path / "two/grown", KTO, UNEVEN, is_leaving=told_after(7))
    from tests.conftest import free_ports

    torch.multiprocessing.spawn(
        _rank,
        args=(free_ports(1)[0], clip, small_cache / small_set.digest, frozen, tmp_path / "two"),
        nprocs=2,
    )
    for size in ("0", "3", "grown"):
        two = tmp_path / "two" / size
        assert_same_change(clip, tuned_in(tmp_path / "one")["last"], tuned_in(two)["last"])
        assert losses_in(two) == pytest.approx(losses_in(tmp_path / "one"), rel=1e-4), size


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
    again = run(clip, small_set, frozen, tmp_path)
    assert [r.pop(AGAIN) for r in again] == [True] * (len(again) - 1) + [False]
    assert again == first
    assert policy.stat().st_mtime_ns == written
