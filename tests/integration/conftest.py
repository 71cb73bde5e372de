"""A real Ray cluster on this machine: a head that trains nothing, and worker nodes that can be lost."""

import contextlib
import os
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

import pytest

from tests.conftest import ROOT, SMALL_SWEEP, S3Server, free_ports

BIN = Path(sys.executable).parent
FLAGS = [*SMALL_SWEEP, "--search.trials", "1", "--search.concurrency", "1", "--search.confirm", "0"]
FLAGS += ["--search.baselines"]


class RayCluster:
    """Nodes started by ``ray start``, each a process group of its own, with token authentication.

    Attributes:
        user: the environment of whoever submits: the token and the address, and no S3 keys.
    """

    def __init__(self, folder: Path, server: S3Server) -> None:
        self._folder, self._nodes = folder, list[subprocess.Popen[bytes]]()
        self.token = secrets.token_hex(32)
        (folder / "token").write_text(self.token)
        plain = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "RAY_", "PYTEST"))}
        plain |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        # What a machine of cluster/ has: the project's Python, and access to the bucket.
        self._machine = plain | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CLIPPO_CACHE": str(folder / "cache"),
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": server.key,
            "AWS_SECRET_ACCESS_KEY": server.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        gcs, dashboard, client = free_ports(3)
        self._address, self._dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.user = plain | {"RAY_API_SERVER_ADDRESS": self._dashboard}
        self._start(
            "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--temp-dir={folder / 'ray'}", "--num-cpus=0", '--resources={"trial_driver": 2}',
        )  # fmt: skip
        self._wait_for_the_head()

    def _start(self, *flags: str) -> None:
        agent, metrics = free_ports(2)
        command = [BIN / "ray", "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command += ["--object-store-memory=200000000", *flags]
        with (self._folder / f"node-{len(self._nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                command, env=self._machine, stdout=log, stderr=log, start_new_session=True
            )
        self._nodes.append(node)

    def _wait_for_the_head(self) -> None:
        """Returns when the head has taken a job; its dashboard answers seconds before."""
        job = urllib.request.Request(
            f"{self._dashboard}/api/jobs/",
            data=b'{"entrypoint": "true"}',
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
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
                    pytest.fail(f"no head: {error}\n{(self._folder / 'node-0.log').read_text()}")
                time.sleep(0.2)

    def add_node(self, cpus: int = 2) -> None:
        """One machine more, as an autoscaler would start it; it joins within seconds."""
        self._start(f"--address={self._address}", f"--num-cpus={cpus}")

    def lose_node(self) -> None:
        """The machine that was added last is gone at once, as a spot machine without a notice."""
        node = self._nodes.pop()
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``ray WORDS`` on the submitting side."""
        return subprocess.run(
            [BIN / "ray", *words], cwd=ROOT, env=self.user | environment, capture_output=True, text=True,
            timeout=400, check=False,
        )  # fmt: skip

    def submit(self, *flags: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """A sweep as a job, followed to its end unless the options say otherwise."""
        entry_point = ["python", "sweeps/typo_sweep.py", *FLAGS, *flags]
        return self.ray("job", "submit", *options, "--working-dir", ".", "--", *entry_point)

    def close(self) -> None:
        """Ends its nodes; ``ray stop`` would end every Ray on the machine."""
        for node in reversed(self._nodes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@pytest.fixture(scope="session")
def cluster(s3_server: S3Server) -> Iterator[RayCluster]:
    """A head and one worker node of two CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # Ray's sockets want a short path
    started = RayCluster(folder, s3_server)
    try:
        started.add_node()
        yield started
    finally:
        started.close()
        shutil.rmtree(folder, ignore_errors=True)
