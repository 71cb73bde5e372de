"""`ray job submit` as a user types it: a real cluster that wants a token, and results on a real S3 server."""

import re
import time

import pytest

from clippo.results import ResultStore
from clippo.train.checkpoint import STATE
from tests.conftest import S3Server
from tests.integration.nodes import RayCluster

pytestmark = pytest.mark.timeout(600)


def statuses(store: ResultStore, sweep: str) -> dict[str, str]:
    return {t["trial_id"]: t["status"] for t in store.trials(sweep).to_pylist()}


def test_a_job_is_followed_to_its_rows_in_the_bucket(cluster: RayCluster, s3_env: S3Server) -> None:
    results = f"s3://{s3_env.bucket}/jobs"
    done = cluster.submit("--results", results, "--name", "job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/1  00000" in done.stdout, "the job's log is followed"
    assert "Pareto front of job" in done.stdout
    assert statuses(ResultStore(results), "job") == {"reference": "completed", "00000": "completed"}
    assert not any(secret in done.stdout + done.stderr for secret in (s3_env.secret, cluster.token))


def test_no_job_without_the_token(cluster: RayCluster) -> None:
    for refused in (
        cluster.ray("job", "submit", "--", "true", RAY_AUTH_MODE="disabled"),
        cluster.ray("job", "submit", "--", "true", RAY_AUTH_TOKEN="f" * 64),
    ):
        assert refused.returncode != 0
        assert "AuthenticationError" in refused.stderr, refused.stderr


def test_a_sweep_that_fails_fails_its_job(cluster: RayCluster, s3_env: S3Server) -> None:
    results = f"s3://{s3_env.bucket}/jobs"
    done = cluster.submit("--results", results, "--name", "nan", "--search.learning-rate", "1e6", "1e6")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no trial of the sweep was completed" in done.stdout
    assert "exit code 1" in done.stdout + done.stderr
    assert statuses(ResultStore(results), "nan") == {"reference": "completed", "00000": "failed"}


def test_a_stopped_job_goes_on_when_it_is_submitted_again(cluster: RayCluster, s3_env: S3Server) -> None:
    results = f"s3://{s3_env.bucket}/jobs"
    flags = ["--results", results, "--name", "long", "--search.epochs", "8", "8"]
    job = "clippo-long"
    assert cluster.submit(*flags, options=("--submission-id", job, "--no-wait")).returncode == 0
    state = f"{s3_env.bucket}/jobs/checkpoints/sweep=long/00000/{STATE}"
    deadline = time.monotonic() + 200
    while not s3_env.filesystem().exists(state):
        assert time.monotonic() < deadline, cluster.ray("job", "logs", job).stdout
        time.sleep(0.2)
    stopped = cluster.ray("job", "stop", job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = cluster.ray("job", "logs", job).stdout
    assert "Pareto front of long" in log
    assert "--name long" in log, "how to go on"
    assert "Traceback" not in log
    status = cluster.ray("job", "status", job)
    assert "was stopped" in status.stdout + status.stderr
    assert statuses(ResultStore(results), "long") == {"reference": "completed"}

    again = cluster.submit(*flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed" in again.stdout
    store = ResultStore(results)
    trial = next(t for t in store.trials("long").to_pylist() if t["trial_id"] == "00000")
    assert (trial["status"], trial["attempt"], trial["preemptions"]) == ("completed", 1, 1)
    epochs = [m["epoch"] for m in store.metrics("long").to_pylist() if m["name"] == "loss"]
    assert sorted(epochs) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_upload_is_the_code_and_nothing_else(cluster: RayCluster) -> None:
    listed = cluster.ray("job", "submit", "--working-dir", ".", "--", "ls", "-A")
    names = set(re.findall(r"^[\w.]+$", listed.stdout, re.MULTILINE))
    assert {"clippo", "sweeps", "pyproject.toml"} <= names, listed.stdout
    assert not names & {".git", ".venv", "results", "data", "tests"}
