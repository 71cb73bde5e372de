"""A worker machine is lost in the middle of a trial of two workers, and another one comes."""

import io
import subprocess
import time

import pytest
import torch

from clippo.results import ResultStore
from clippo.train.checkpoint import STATE
from tests.conftest import S3Server
from tests.integration.nodes import RayCluster

pytestmark = pytest.mark.timeout(600)


def test_a_trial_outlives_its_machine(cluster: RayCluster, s3_env: S3Server) -> None:
    results = f"s3://{s3_env.bucket}/jobs"
    flags = ["--results", results, "--name", "lost", "--search.epochs", "10", "10", "--workers", "2"]
    state = f"{s3_env.bucket}/jobs/checkpoints/sweep=lost/00000/{STATE}"
    job = "clippo-lost"
    assert cluster.submit(*flags, options=("--submission-id", job, "--no-wait")).returncode == 0
    files, deadline = s3_env.filesystem(), time.monotonic() + 200
    while not files.exists(state):
        assert time.monotonic() < deadline, cluster.ray("job", "logs", job).stdout
        time.sleep(0.1)
    cluster.lose_node()
    kept = torch.load(io.BytesIO(files.cat_file(state)), weights_only=True)["reports"]
    assert 1 <= len(kept) < 10, "lost in the middle of the trial"
    cluster.add_node()
    done = followed(cluster, job)
    assert "succeeded" in done.stdout + done.stderr, done.stdout

    store = ResultStore(results)
    trial = next(t for t in store.trials("lost").to_pylist() if t["trial_id"] == "00000")
    assert (trial["status"], trial["attempt"], trial["workers"]) == ("completed", 0, 2)
    assert trial["preemptions"] == 1
    seconds = [m for m in store.metrics("lost").to_pylist() if m["name"] == "eval_s"]
    assert sorted(m["epoch"] for m in seconds) == list(range(1, 11))
    again = {m["epoch"]: m["value"] for m in seconds}
    assert all(again[r["epoch"]] == r["metrics"]["eval_s"] for r in kept), "a kept epoch was trained again"


def followed(cluster: RayCluster, job: str) -> subprocess.CompletedProcess[str]:
    """The log of a job to its end, and then its status."""
    log = cluster.ray("job", "logs", "--follow", job)
    status = cluster.ray("job", "status", job)
    status.stdout += log.stdout
    return status
