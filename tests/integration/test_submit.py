"""`ray job submit` as a user types it: a real head that wants a token, and results on a real S3 server."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from clippo.results import ResultStore
from clippo.train.checkpoint import STATE
from tests.conftest import ROOT, SMALL_SWEEP, S3Server, free_ports

pytestmark = pytest.mark.timeout(600)

RAY = str(Path(sys.executable).parent / "ray")
FLAGS = [*SMALL_SWEEP, "--search.trials", "1", "--search.concurrency", "1", "--search.baselines"]


class Head(NamedTuple):
    """A running head node; the environment is that of whoever submits, who holds the token and no S3 keys."""

    environment: dict[str, str]
    log: Path

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``ray WORDS`` on the submitting side."""
        return subprocess.run(
            [RAY, *words], cwd=ROOT, env=self.environment | environment, capture_output=True, text=True,
            timeout=400, check=False,
        )  # fmt: skip

    def submit(self, *flags: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """A sweep as a job, followed to its end unless the options say otherwise."""
        entry_point = ["python", "sweeps/typo_sweep.py", *FLAGS, *flags]
        return self.ray("job", "submit", *options, "--working-dir", ".", "--", *entry_point)


@pytest.fixture(scope="module")
def head(s3_server: S3Server) -> Iterator[Head]:
    """A head node on ports of its own. Its environment has the project's Python and the bucket's keys."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # Ray's sockets want a short path
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, client = free_ports(3)
    address = f"http://127.0.0.1:{dashboard}"
    plain = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "RAY_", "PYTEST"))}
    plain |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    cluster = plain | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CLIPPO_CACHE": str(folder / "cache"),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": s3_server.key,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={folder / 'ray'}"]
    command += ["--object-store-memory=200000000"]
    log = folder / "head.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, env=cluster, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            _wait_for(address, token.read_text(), log)
            yield Head(plain | {"RAY_API_SERVER_ADDRESS": address}, log)
        finally:
            # `ray stop` would end every Ray on the machine; what this head has started ends with it.
            os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _wait_for(address: str, token: str, log: Path) -> None:
    """Returns when the head has taken a job; its dashboard answers seconds before."""
    job = urllib.request.Request(
        f"{address}/api/jobs/",
        data=b'{"entrypoint": "true"}',
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 100
    while True:
        try:
            urllib.request.urlopen(job, timeout=60).close()
            return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            if time.monotonic() > deadline:
                pytest.fail(f"the head did not start: {error}\n{log.read_text()}")
            time.sleep(0.2)


def statuses(store: ResultStore, sweep: str) -> dict[str, str]:
    return {t["trial_id"]: t["status"] for t in store.trials(sweep).to_pylist()}


def test_a_job_is_followed_to_its_rows_in_the_bucket(head: Head, s3_env: S3Server) -> None:
    results = f"s3://{s3_env.bucket}/submitted"
    done = head.submit("--results", results, "--name", "job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stderr + done.stdout
    assert "1/1  00000" in done.stdout, "the job's log is followed"
    assert "Pareto front of job" in done.stdout
    assert statuses(ResultStore(results), "job") == {"reference": "completed", "00000": "completed"}
    for secret in (s3_env.secret, Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()):
        assert secret not in done.stdout + done.stderr


def test_no_job_without_the_token(head: Head) -> None:
    for refused in (
        head.ray("job", "list", RAY_AUTH_MODE="disabled"),
        head.ray("job", "submit", "--", "true", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64),
    ):
        assert refused.returncode != 0
        assert "nauthorized" in refused.stderr or "nauthenticated" in refused.stderr, refused.stderr


def test_a_sweep_that_fails_fails_its_job(head: Head, s3_env: S3Server) -> None:
    results = f"s3://{s3_env.bucket}/failing"
    done = head.submit("--results", results, "--name", "nan", "--search.learning-rate", "1e6", "1e6")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no trial of the sweep was completed" in done.stdout
    assert "exit code 1" in done.stdout + done.stderr
    assert statuses(ResultStore(results), "nan") == {"reference": "completed", "00000": "failed"}


def test_a_stopped_job_goes_on_when_it_is_submitted_again(head: Head, s3_env: S3Server) -> None:
    results = f"s3://{s3_env.bucket}/stopped"
    flags = ["--results", results, "--name", "long", "--search.epochs", "8", "8"]
    job = "clippo-long"
    assert head.submit(*flags, options=("--submission-id", job, "--no-wait")).returncode == 0
    state = f"{s3_env.bucket}/stopped/checkpoints/sweep=long/00000/{STATE}"
    deadline = time.monotonic() + 200
    while not s3_env.filesystem().exists(state):
        assert time.monotonic() < deadline, head.ray("job", "logs", job).stdout
        time.sleep(0.2)
    stopped = head.ray("job", "stop", job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = head.ray("job", "logs", job).stdout
    assert "Pareto front of long" in log
    assert "--name long" in log, "how to go on"
    assert "Traceback" not in log
    assert "STOPPED" in head.ray("job", "status", job).stderr
    assert statuses(ResultStore(results), "long") == {"reference": "completed"}

    again = head.submit(*flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed" in again.stdout
    store = ResultStore(results)
    trial = next(t for t in store.trials("long").to_pylist() if t["trial_id"] == "00000")
    assert (trial["status"], trial["attempt"], trial["preemptions"]) == ("completed", 1, 1)
    epochs = [m["epoch"] for m in store.metrics("long").to_pylist() if m["name"] == "loss"]
    assert sorted(epochs) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_upload_is_the_code_and_nothing_else(head: Head) -> None:
    listed = head.ray("job", "submit", "--working-dir", ".", "--", "ls", "-A")
    names = re.findall(r"^[\w.]+$", listed.stdout, re.MULTILINE)
    assert {"clippo", "sweeps", "pyproject.toml"} <= {*names}, listed.stdout
    assert not {".git", ".venv", "results", "data", "tests"} & {*names}
