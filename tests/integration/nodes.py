"""Real Ray nodes on this machine: a head that trains nothing, and workers that come and go."""

import contextlib
import json
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
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, SMALL_SWEEP, S3Server, free_ports

BIN = Path(sys.executable).parent
FAKE_HEAD_NODE_ID = f"{0:0>5}".rjust(56, "f")
OBJECT_STORE = "--object-store-memory=200000000"
FLAGS = [*SMALL_SWEEP, "--search.trials", "1", "--search.concurrency", "1", "--search.confirm", "0"]
FLAGS += ["--search.baselines"]


class RayCluster:
    """Nodes started by ``ray start``, each a process group of its own, with token authentication.

    Attributes:
        user: the environment of whoever submits: the token and the address, and no S3 keys.

    Args:
        folder: for everything that the nodes write; Ray's sockets want a short path.
        autoscaled: whether the head adds nodes of one CPU, and takes away what is idle for 6 s.
        most: how many it may add.
    """

    def __init__(self, folder: Path, server: S3Server, *, autoscaled: bool = False, most: int = 3) -> None:
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
            "RAY_memory_monitor_refresh_ms": "0",  # each node would kill its own for what all others take
            "RAY_health_check_period_ms": "1000",  # five of these without an answer, and a node is lost
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": server.key,
            "AWS_SECRET_ACCESS_KEY": server.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        gcs, dashboard, client = free_ports(3)
        self._address, self._dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.user = plain | {"RAY_API_SERVER_ADDRESS": self._dashboard}
        self._head = [
            "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            "--num-cpus=0", '--resources={"trial_driver": 3}', OBJECT_STORE,
            *(self._autoscaling(most) if autoscaled else []),
        ]  # fmt: skip

    def start_head(self) -> None:
        """Returns when the head has taken a job; its dashboard answers seconds before."""
        self._start(*self._head)
        deadline = time.monotonic() + 100
        while True:
            try:
                self._asked("/api/jobs/", b'{"entrypoint": "true"}')
                return
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                if time.monotonic() > deadline:
                    pytest.fail(f"no head: {error}\n{(self._folder / 'node-0.log').read_text()}")
                time.sleep(0.2)

    def _autoscaling(self, most: int) -> list[str]:
        """Flags of a head that adds nodes itself, by the autoscaler v2 as on Kubernetes."""
        config = yaml.safe_load(Path(__file__).with_name("autoscaling.yaml").read_text())
        config["max_workers"] = config["available_node_types"]["spot"]["max_workers"] = most
        config["provider"] |= {"gcs_address": self._address, "head_node_id": FAKE_HEAD_NODE_ID}
        self._machine |= {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        file = self._folder / "autoscaling.yaml"
        file.write_text(yaml.safe_dump(config))
        return [f"--autoscaling-config={file}"]

    def _start(self, *flags: str, **environment: str) -> None:
        agent, metrics = free_ports(2)
        command = [BIN / "ray", "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        # A node unpacks what a job brings with it anew, even over the folder of a node that shares its own.
        command += [f"--temp-dir={self._folder / f'{len(self._nodes)}'}"]
        command += flags
        with (self._folder / f"node-{len(self._nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                command, env=self._machine | environment, stdout=log, stderr=log, start_new_session=True
            )
        self._nodes.append(node)

    def _asked(self, path: str, data: bytes | None = None) -> Any:
        """What the dashboard answers."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._dashboard + path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def workers(self) -> int:
        """Worker nodes that are alive."""
        return len(self.nodes())

    def nodes(self) -> list[str]:
        """Their ids."""
        return [
            n["node_id"] for n in self._listed("nodes") if n["state"] == "ALIVE" and not n["is_head_node"]
        ]

    def actors(self, kind: str) -> list[dict[str, Any]]:
        """The actors of a class that are alive."""
        return [a for a in self._listed("actors") if a["class_name"] == kind and a["state"] == "ALIVE"]

    def _listed(self, what: str) -> list[dict[str, Any]]:
        """What the head knows now; what the dashboard shows of nodes may be minutes old."""
        answer = self._asked(f"/api/v0/{what}?limit=10000&detail=true")
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    def add_node(self, cpus: int = 2, *flags: str, **environment: str) -> None:
        """One machine more, as an autoscaler would start it; it joins within seconds."""
        flags = flags or (OBJECT_STORE,)
        self._start(f"--address={self._address}", f"--num-cpus={cpus}", *flags, **environment)

    def drain_node(self, node: str, seconds: int) -> None:
        """A machine is told that it will be taken away, as by whoever passes a cloud's notice on to Ray."""
        told = self.ray(
            "drain-node", "--address", self._address, "--node-id", node, "--reason-message", "spot",
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", f"{seconds}",
        )  # fmt: skip
        assert told.returncode == 0, told.stdout + told.stderr

    def kill_driver(self, sweep: str) -> None:
        """The driver of a submitted sweep is gone at once, as by the kernel out of memory."""
        pattern = f"sweeps/typo_sweep.py .*--name {sweep}"
        for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):  # the shell around it may have ended by then
                os.kill(int(pid), signal.SIGKILL)

    def lose_autoscaled_node(self) -> None:
        """The same for the youngest of the nodes that the autoscaler has started."""
        raylets = ["pgrep", "--newest", "--full", f"raylet --raylet_socket_name={self._folder}"]
        newest = subprocess.run(raylets, capture_output=True, text=True, check=True).stdout
        os.kill(int(newest), signal.SIGKILL)

    def lose_node(self, *, oldest: bool = False) -> None:
        """The machine that was added last, or first, is gone at once, as a spot machine without a notice."""
        nodes = self._nodes[1:] if oldest else reversed(self._nodes)
        node = next(node for node in nodes if node.poll() is None)
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``ray WORDS`` on the submitting side."""
        return subprocess.run(
            [BIN / "ray", *words], cwd=ROOT, env=self.user | environment, capture_output=True, text=True,
            timeout=400, check=False,
        )  # fmt: skip

    def logs(self) -> list[Path]:
        """What Ray keeps of all nodes and processes."""
        return [path for path in self._folder.glob("*/session_2*/logs/**/*") if path.is_file()]

    def submit(self, *flags: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """A sweep of the code here as a job, followed to its end unless the options say otherwise."""
        entry_point = ["python", "sweeps/typo_sweep.py", *FLAGS, *flags]
        return self.ray("job", "submit", *options, "--working-dir", ".", "--", *entry_point)

    def submit_installed(
        self, *flags: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """The same of the code that the nodes have, as in cluster/kuberay."""
        entry_point = ["python", str(ROOT / "sweeps/typo_sweep.py"), *FLAGS, *flags]
        return self.ray("job", "submit", *options, "--", *entry_point)

    def doctor(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """``clippo doctor`` on the head, with lines so long that none is folded."""
        wide = ("job", "submit", "--", "env", "COLUMNS=1000", "python", "-m", "clippo", "doctor")
        return self.ray(*wide, *SMALL_SWEEP, *flags)

    def close(self) -> None:
        """Ends its nodes; ``ray stop`` would end every Ray on the machine."""
        for node in reversed(self._nodes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@contextlib.contextmanager
def ray_cluster(server: S3Server, *, autoscaled: bool = False, most: int = 3) -> Iterator[RayCluster]:
    """A running head, and after it nothing that it has started."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # Ray's sockets want a short path
    cluster = RayCluster(folder, server, autoscaled=autoscaled, most=most)
    try:
        cluster.start_head()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
