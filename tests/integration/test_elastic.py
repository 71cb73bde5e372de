"""Workers that change in number while a trial runs, and machines that are told that they will go."""

import contextlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from clippo.config import ModelConfig, TrainConfig
from clippo.model import policy_of
from clippo.prepared import Location
from clippo.results import ResultStore
from clippo.train import FileCheckpoints, TrialSettings, fit
from clippo.train.checkpoint import STATE
from clippo.train.shared import Shared, load_shared
from tests.conftest import S3Server, free_ports
from tests.integration.nodes import RayCluster
from tests.integration.test_node_loss import followed

pytestmark = pytest.mark.timeout(1200)

Found = TypeVar("Found")


def awaited(look: Callable[[], Found | None], cluster: RayCluster, job: str, seconds: float = 400) -> Found:
    """What is found at last."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline, cluster.ray("job", "logs", job).stdout
        time.sleep(0.1)
    return found


def state_of(server: S3Server, sweep: str) -> dict[str, Any] | None:
    """What a trial would be resumed from."""
    path = f"{server.bucket}/jobs/checkpoints/sweep={sweep}/00000/{STATE}"
    files = server.filesystem()
    if not files.exists(path):
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(files.cat_file(path)), weights_only=True)
    return state


class EnoughError(Exception):
    pass


def _rank(
    rank: int, port: int, workers: int, shared: Shared, settings: dict[str, Any], epochs: int, folder: Path
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    if workers > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    losses: list[float] = []

    def report(row: dict[str, Any]) -> None:
        losses.append(row["metrics"]["loss"])
        if len(losses) == epochs:
            raise EnoughError

    clip, prepared, frozen = load_shared(shared)
    with contextlib.suppress(EnoughError):
        fit(
            policy_of(clip, shared.model.trainable), prepared, frozen, TrialSettings(**settings),
            shared.train, report=report, checkpoints=FileCheckpoints(folder),
        )  # fmt: skip
    if workers > 1:
        dist.destroy_process_group()
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def undisturbed(
    store: ResultStore, sweep: str, config: TrainConfig, epochs: int, workers: int, folder: Path
) -> list[float]:
    """The loss of the first epochs of trial 00000, were it not moved or stopped; without Ray."""
    (started,) = {json.dumps(s["settings"]) for s in store.started(sweep) if s["trial_id"] == "00000"}
    (reference,) = (t for t in store.trials(sweep).to_pylist() if t["trial_id"] == "reference")
    shared = Shared(
        model=ModelConfig(), train=config, prepared=reference["prepared_digest"],
        location=Location(folder / "cache", f"{store.uri}/prepared"),
    )  # fmt: skip
    args = (free_ports(1)[0], workers, shared, json.loads(started), epochs, folder)
    torch.multiprocessing.spawn(_rank, args=args, nprocs=workers)
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def test_a_trial_starts_with_what_is_there_grows_and_shrinks_to_the_same_result(
    cluster: RayCluster, s3_env: S3Server, tmp_path: Path
) -> None:
    results, job = f"s3://{s3_env.bucket}/jobs", "clippo-grow"
    flags = ["--results", results, "--name", "grow", "--workers", "1:3", "--precision", "fp32"]
    # Steps so small that rounding, which differs with the number of workers, stays rounding.
    flags += ["--search.epochs", "1000", "1000", "--search.learning-rate", "1e-5", "1e-5"]
    assert cluster.submit(*flags, options=("--submission-id", job, "--no-wait")).returncode == 0

    def of_workers(count: int, epochs: int) -> list[dict[str, Any]]:
        """The reports of a trial whose last epochs had so many workers."""

        def look() -> list[dict[str, Any]] | None:
            reports: list[dict[str, Any]] = (state_of(s3_env, "grow") or {"reports": []})["reports"]
            there = [r["metrics"]["workers"] for r in reports[-epochs:]] == epochs * [count]
            return reports if there else None

        return awaited(look, cluster, job)

    with contextlib.ExitStack() as added:
        try:
            of_workers(2, 1)
            cluster.add_node(cpus=1)
            added.callback(cluster.lose_node)
            grown = of_workers(3, 2)
            added.close()  # the machine goes without a notice
            reports = of_workers(2, 2)
        finally:
            assert cluster.ray("job", "stop", job).returncode == 0
    counts = [r["metrics"]["workers"] for r in reports]
    assert [count for count, _ in itertools.groupby(counts)] == [2, 3, 2]
    assert [r["epoch"] for r in reports] == list(range(1, len(reports) + 1))
    assert reports[: len(grown)] == grown, "a kept epoch was trained again"
    config = TrainConfig(precision="fp32")
    alone = undisturbed(ResultStore(results), "grow", config, len(reports), 1, tmp_path)
    assert [r["metrics"]["loss"] for r in reports] == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < 0.9 * alone[0], "it has learned, so a step that was lost or made twice would show"


@pytest.mark.parametrize(
    ("workers", "epochs", "deadlines"),
    [(0, 24, (600, 40)), pytest.param(2, 24, (600, 40, 1), marks=pytest.mark.soak)],
)
def test_a_drained_machine_keeps_what_it_has_trained(
    workers: int, epochs: int, deadlines: Sequence[int], cluster: RayCluster, s3_env: S3Server, tmp_path: Path
) -> None:
    """It is told more than once, as a cloud may, and nothing else writes a checkpoint before it goes.

    Args:
        epochs: so many that the last notice comes before the trial ends.
        deadlines: seconds after each notice; at one second there may be no time for a checkpoint.
    """
    results, name = f"s3://{s3_env.bucket}/jobs", f"drain-{workers}"
    job = f"clippo-{name}"
    flags = ["--results", results, "--name", name, "--workers", f"{workers}", "--precision", "fp32"]
    flags += ["--search.epochs", f"{epochs}", f"{epochs}", "--batch-size", "2"]  # of 80 steps each
    flags += ["--epochs-between-checkpoints", "100", "--minutes-between-checkpoints", "0"]
    (node,) = awaited(lambda: nodes if len(nodes := cluster.nodes()) == 1 else None, cluster, "")
    assert cluster.submit(*flags, options=("--submission-id", job, "--no-wait")).returncode == 0
    kind = "RayTrainWorker" if workers else "ImplicitFunc"
    awaited(lambda: node in [a["node_id"] for a in cluster.actors(kind)] or None, cluster, job)
    cluster.add_node()

    def kept_after(step: int) -> int:
        """The step of the next checkpoint, in the middle of the trial."""

        def look() -> int | None:
            if (state := state_of(s3_env, name)) is None:
                return None
            assert "part" in state, f"it had ended: {cluster.ray('job', 'logs', job).stdout}"
            done: int = state["part"]["step"] if state["part"] else 80 * len(state["reports"])
            return done if done > step else None

        return awaited(look, cluster, job)

    kept = 0
    assert state_of(s3_env, name) is None
    for seconds in deadlines:
        cluster.drain_node(node, seconds)
        if seconds > 1:
            kept = kept_after(kept)
    time.sleep(1)
    cluster.lose_node(oldest=True)
    kept = kept_after(kept - 1)
    ended = followed(cluster, job)
    assert "succeeded" in ended.stdout + ended.stderr, ended.stdout

    store = ResultStore(results)
    (trial,) = (t for t in store.trials(name).to_pylist() if t["trial_id"] == "00000")
    assert (trial["status"], trial["workers"], trial["preemptions"]) == ("completed", workers, 1)
    rows = [m for m in store.metrics(name).to_pylist() if m["name"] == "loss" and m["trial_id"] == "00000"]
    assert sorted(m["epoch"] for m in rows) == list(range(1, epochs + 1))
    losses = [m["value"] for m in sorted(rows, key=lambda m: m["epoch"])]
    # To the last bit: with other rounding, so many steps of two pairs would end per cents away.
    looked_at = min(epochs, kept // 80 + 2)
    config = TrainConfig(batch_size=2, precision="fp32")
    assert losses[:looked_at] == undisturbed(store, name, config, looked_at, max(1, workers), tmp_path)
