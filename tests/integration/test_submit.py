"""`ray job submit` as a user types it: a real cluster that wants a token, and results on a real S3 server."""

import re
import time
import urllib.error
import urllib.request

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
    secrets = (s3_env.secret, cluster.token)
    assert not any(secret in done.stdout + done.stderr for secret in secrets)
    logs = {path: path.read_text(errors="replace") for path in cluster.logs()}
    assert any("job-00000-0" in log for log in logs.values()), "the trial's lines are there"
    assert not [path for path, log in logs.items() if any(secret in log for secret in secrets)]


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
    flags = ["--results", results, "--name", "long", "--search.epochs", "24", "24"]
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
    assert sorted(epochs) == list(range(1, 25))


def test_the_upload_is_the_code_and_nothing_else(cluster: RayCluster) -> None:
    listed = cluster.ray("job", "submit", "--working-dir", ".", "--", "ls", "-A")
    names = set(re.findall(r"^[\w.]+$", listed.stdout, re.MULTILINE))
    assert {"clippo", "sweeps", "pyproject.toml"} <= names, listed.stdout
    assert not names & {".git", ".venv", "results", "data", "tests"}


WHERE = """
import clippo, ray
ray.init()
there = ray.remote(lambda: __import__('clippo').__file__)
print('of the driver:', clippo.__file__)
print('of a worker:', ray.get(there.options(num_cpus=1).remote()))
"""


def test_the_upload_goes_before_what_is_installed(cluster: RayCluster) -> None:
    """Every node has this project installed, as a machine has it from its image."""
    installed = cluster.ray("job", "submit", "--", "python", "-c", f'exec("""{WHERE}""")')
    uploaded = cluster.ray(
        "job", "submit", "--working-dir", ".", "--", "python", "-c", f'exec("""{WHERE}""")'
    )
    folder = "/runtime_resources/working_dir_files/"
    for process in ("of the driver", "of a worker"):
        assert folder not in _told(process, installed.stdout)
        assert folder in _told(process, uploaded.stdout)


def _told(process: str, log: str) -> str:
    found = re.search(rf"^{process}: (.*/clippo/__init__.py)$", log, re.MULTILINE)
    assert found is not None, log
    return found[1]


def test_the_dashboard_asks_for_the_token(cluster: RayCluster) -> None:
    """The page comes to everybody, what it shows does not (docs/WATCHING.md)."""
    dashboard = cluster.user["RAY_API_SERVER_ADDRESS"]

    def status(path: str, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(dashboard + path, headers=headers)) as answer:
                assert path != "/" or b"<title>Ray Dashboard</title>" in answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    told = cluster.ray("get-auth-token")
    assert told.stdout == cluster.token
    assert status("/") == 200
    assert status("/api/jobs/") == 401
    assert status("/api/jobs/", Authorization=f"Bearer {'f' * 64}") == 403
    assert status("/api/jobs/", Cookie=f"ray-authentication-token={told.stdout}") == 200
