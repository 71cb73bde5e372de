"""``clippo doctor``: what is in order, what is not, and what a sweep would take."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clippo.config import DataConfig, ModelConfig, SweepConfig, TrainConfig
from clippo.doctor import Finding, examine, here, nodes
from clippo.errors import ConfigError
from clippo.model import ClipModel, policy_of
from clippo.results import objects
from clippo.sweep.cost import (
    Speed,
    Work,
    estimate,
    price_of,
    read_prices,
    remember,
    remembered,
    work_of,
)
from clippo.sweep.probe import probes
from clippo.train.memory import PROCESS, Memory, estimated_memory
from sweeps.gender_sweep import gender_sweep, tower_sweep
from tests.conftest import SMALL, SMALL_SWEEP, S3Server, clippo, free_ports, on_small_disk, sweep

pytestmark = pytest.mark.timeout(600)


def findings(printed: str) -> dict[str, tuple[str, str]]:
    """State and detail of each check, from the table; lines that go on are joined."""
    found: dict[str, tuple[str, str]] = {}
    detail_at = 0
    for line in printed.splitlines():
        if match := re.match(r"(.+?) +(ok|problem) +(\S.*)", line):
            name = match[1].strip()
            found[name], detail_at = (match[2], match[3].strip()), match.start(3)
        elif found and line[detail_at:].strip():
            state, detail = found[name]
            found[name] = state, f"{detail} {line[detail_at:].strip()}"
    return found


# ---- here: no cluster is needed


def before_ray(config: SweepConfig) -> dict[str, Finding]:
    """What is found before Ray is started."""
    found = {}
    for finding in (looking := examine(config, probe_trial=False)):
        found[finding.check] = finding
        if finding.check == "pictures read":
            looking.close()
            break
    return found


def problem(found: Finding, *secrets: str) -> str:
    """The line that says what is wrong; no secret is in it."""
    assert found.problem, found
    assert "\n" not in found.detail
    assert not [secret for secret in secrets if secret in found.detail]
    return found.detail


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_credential_that_is_refused(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SweepConfig(results=f"s3://{s3_env.bucket}/doctor", data=SMALL)
    secrets = (s3_env.secret, s3_env.reader_secret, "wrong-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    line = problem(before_ray(config)[f"results {config.results}"], *secrets)
    assert "check the credentials" in line
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_env.reader_key)  # which may list and read
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_env.reader_secret)
    line = problem(before_ray(config)[f"results {config.results}"], *secrets)
    assert line.startswith("cannot write to s3://")
    assert "check the credentials" in line


def test_a_bucket_that_is_not_there(s3_env: S3Server) -> None:
    config = SweepConfig(results="s3://vanished/doctor", data=SMALL)
    line = problem(before_ray(config)[f"results {config.results}"], s3_env.secret)
    assert "create the bucket" in line


def test_names_that_nothing_has(tmp_path: Path) -> None:
    model = ModelConfig(name="ViT-B-23", prompt="no braces")
    search = replace(SweepConfig().search, losses=("dpo", "ppo"))
    found = before_ray(SweepConfig(results=str(tmp_path), model=model, search=search, data=SMALL))
    assert "cross_entropy, dpo, ipo, kto" in problem(found["settings"])
    assert "near matches" in problem(found["model ViT-B-23"])
    assert problem(found["prompt no braces"])
    assert not found["pictures read"].problem, "all is looked at, whatever else is wrong"


def test_a_picture_that_cannot_be_decoded(tmp_path: Path) -> None:
    for name in ("cat", "dog", "key", "bus"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.png").write_bytes(b"no picture")
    data = replace(SMALL, source=f"folder:{tmp_path}")
    line = problem(before_ray(SweepConfig(results=str(tmp_path / "r"), data=data))["pictures read"])
    assert re.search(r"\d+\.png: .*mend or remove it", line), line


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "file"))
    found = before_ray(SweepConfig(results=str(tmp_path / "r"), data=SMALL))
    assert "set CLIPPO_CACHE to another folder" in problem(found["local disk"])


@pytest.mark.parametrize("module", [here, objects])
def test_a_disk_with_less_room_than_there_must_be(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the disk is, it must have more room than it has."""
    monkeypatch.setattr(module, "MIN_FREE", 2 * shutil.disk_usage(tmp_path).free)
    config = SweepConfig(results=str(tmp_path / "r"), data=SMALL)
    found = before_ray(config)
    short = "local disk" if module is here else f"results {config.results}"
    assert "left; free at least" in problem(found[short])
    assert [check for check, finding in found.items() if finding.problem] == [short]


def test_a_head_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for minutes, and end in words of its own."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    *_, last = examine(SweepConfig(results=str(tmp_path), data=SMALL))
    assert last.check == "Ray"
    assert re.fullmatch(
        rf"ConnectionError: nothing answers at {address} \(.*refused\); check RAY_ADDRESS and `ray status`",
        problem(last),
    )


FULL_DISK = """
import contextlib, os, sys
from clippo.config import SweepConfig
from tests.conftest import SMALL
from tests.test_doctor import before_ray

disk, found = sys.argv[1], []
os.environ["CLIPPO_CACHE"] = f"{disk}/cache"
config = SweepConfig(results=f"{disk}/results", data=SMALL)
for _ in range(2):
    looked = before_ray(config)
    for check in (f"results {config.results}", "local disk"):
        print(looked[check].problem, looked[check].detail)
    with open(f"{disk}/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
sys.argv[1:] = ["--results", config.results]
import runpy
runpy.run_path("sweeps/typo_sweep.py", run_name="__main__")
"""


def test_a_disk_that_is_small_and_then_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    done = on_small_disk(disk, sys.executable, "-c", FULL_DISK, str(disk))
    assert done.returncode == 2, done.stdout + done.stderr
    small, cache, full, no_cache = done.stdout.splitlines()
    assert re.search(rf"^True {disk}/results has [01] MiB left; free at least 64 MiB on its disk$", small)
    assert re.search(
        rf"^True {disk}/cache/\S+ has .* left; free at least 67.1 MB or set CLIPPO_CACHE$", cache
    )
    assert re.search(r"^True cannot write to .*No space left.*; free some on its disk$", full)
    assert re.search(r"^True .*/cache/\S+ cannot be written \(.*No space left", no_cache)
    refused = done.stderr.splitlines()
    assert len(refused) == 1, "the sweep ends before its first trial, in one line"
    assert re.search(r"^error: cannot write to .*No space left.*; free some on its disk$", refused[0])


@pytest.mark.parametrize("config", [gender_sweep(), tower_sweep()])
def test_the_second_task(config: SweepConfig, tmp_path: Path) -> None:
    """Few pictures have no deep top of a ranking, and pairs are those that the sweep searches."""
    found = before_ray(replace(config, results=str(tmp_path)))
    assert not [finding for finding in found.values() if finding.problem]
    assert found["pictures people"].detail == "there"
    speed = next(probes(config))
    assert min(speed.pair, speed.measured, speed.prepared) > 0


# ---- the arithmetic


def test_the_work_of_a_sweep() -> None:
    data = DataConfig(train_pictures=100, attacked_copies=2, eval_pictures=10)
    search = replace(SweepConfig().search, epochs=(1, 3))
    work = work_of(SweepConfig(data=data, search=search))
    assert work.pairs == 2 * 200, "two epochs on average"
    # 6 validation sets and 8 test sets of 10; the curve of 11 points on 5 sets of each split.
    assert work.measured == 60 + 2 * 140 + 11 * 2 * 50
    assert work.prepared == 100 + 200 + 140


def test_time_and_cost_of_a_sweep() -> None:
    search = replace(SweepConfig().search, trials=8, concurrency=2)
    config = SweepConfig(search=search, workers=2, gpus_per_worker=0.5)
    work = Work(pairs=7200, measured=36_000, prepared=1000)
    speed = Speed(pair=0.5, measured=0.1, prepared=0.001, device="NVIDIA A10G")
    # A trial is (3600 + 3600) / 2 s; 9 of them on two halves of a GPU are 9 GPU-hours, two at a time.
    found = dict(estimate(config, work, speed))
    assert found["a trial"].startswith("60.0 min: ")
    assert "2 trials an hour, 9 GPU-hours, 9.05 USD at 1.006 each" in found["the sweep"]
    assert found["the sweep"].endswith("and 4.5 h for 9 trials")
    assert found["preparing"] == "1.0 s of one CPU for 1000 pictures, once"
    own = dict(estimate(config, work, replace(speed, price=2.0)))
    assert "9 GPU-hours, 18.00 at 2 each and" in own["the sweep"]
    unknown = dict(estimate(config, work, replace(speed, device="NVIDIA H900")))
    assert "no list price of NVIDIA H900" in unknown["the sweep"]


def test_own_prices_go_before_the_list(tmp_path: Path) -> None:
    table = tmp_path / "prices.csv"
    table.write_text('A100, 3.67\n\nA100 80GB, 5\n"RTX 4090",0\n')
    prices = read_prices(str(table))
    assert prices == {"A100": 3.67, "A100 80GB": 5.0, "RTX 4090": 0.0}
    devices = ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA L4")
    assert [price_of(device, prices) for device in devices] == [3.67, 5.0, 0.0, None]
    assert price_of("NVIDIA L4", prices | {"": 9.0}) == 9.0


@pytest.mark.parametrize(
    "line", ["A100", "A100,much", "A100,-1", "A100,nan", "A100,inf", ",3", "A100,3,USD", "device,price"]
)
def test_a_line_that_is_no_price(line: str, tmp_path: Path) -> None:
    table = tmp_path / "prices.csv"
    table.write_text(f"L4,0.8\n{line}\n")
    with pytest.raises(ConfigError, match=re.escape(f"{table}: line 2 is {line!r}; write a device and its")):
        read_prices(str(table))


def test_a_table_of_prices_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    for path in (tmp_path, tmp_path / "none.csv", tmp_path / "picture.png"):
        with pytest.raises(ConfigError, match=r"cannot be read .*; give a CSV file"):
            read_prices(str(path))


@pytest.mark.parametrize("flag", ["--prices", "--price-per-device-hour", "--worker-wait"])
def test_a_number_that_is_refused(flag: str, tmp_path: Path) -> None:
    (tmp_path / "-1").write_text("L4")
    done = subprocess.run(
        [sys.executable, "-m", "clippo", "doctor", f"{flag}=-1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {flag}.* -?1.*(write|give) .*\n", done.stderr), done.stderr


def test_a_speed_is_remembered_for_sweeps_that_train_alike() -> None:
    config = SweepConfig()
    assert remembered(config) is None
    remember(config, Speed(pair=1.0, measured=2.0, prepared=3.0))
    longer = replace(config, name="other", search=replace(config.search, trials=99))
    found = remembered(longer)
    assert found is not None
    assert (found.pair, found.measured, found.prepared) == (1.0, 2.0, 3.0)
    assert remembered(replace(config, model=ModelConfig(trainable="image"))) is None


def kept_by(policy: torch.nn.Module, inputs: torch.Tensor, text_CD: torch.Tensor) -> int:
    """Bytes that the graph of a forward pass holds besides weights and inputs, found by walking it."""
    known = {w.untyped_storage().data_ptr() for w in (*policy.parameters(), *policy.buffers(), inputs)}
    storages: dict[int, int] = {}
    nodes, seen = [policy(inputs, text_CD)[0].grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(saved := getattr(node, name), torch.Tensor):
                storage = saved.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(n for pointer, n in storages.items() if pointer not in known)


@pytest.mark.parametrize("trainable", ["last:1", "image"])
def test_activations_are_those_of_a_whole_batch(clip: ClipModel, trainable: str) -> None:
    train = TrainConfig(batch_size=32, precision="fp32")
    memory = estimated_memory(SweepConfig(model=ModelConfig(trainable=trainable), train=train), clip)
    policy = policy_of(clip, trainable).eval()
    pixels = torch.randint(0, 256, (64, 96, 96, 3), dtype=torch.uint8)
    kept = kept_by(policy, policy.frozen(pixels), clip.text_features(["a picture"]))
    assert memory.pairs * memory.activations + memory.fixed == pytest.approx(kept, rel=0.05)


def test_memory_by_what_is_trained(clip: ClipModel) -> None:
    def memory(**train: int) -> int:
        return estimated_memory(
            SweepConfig(model=ModelConfig(trainable="image"), train=TrainConfig(**train)), clip
        ).step

    assert memory(batch_size=64, micro_batch=16) == memory(batch_size=16) < memory(batch_size=64)
    whole = estimated_memory(SweepConfig(model=ModelConfig(trainable="image")), clip)
    part = estimated_memory(SweepConfig(model=ModelConfig(trainable="last:1")), clip)
    towers = sum(p.numel() for p in clip.model.visual.parameters())
    assert whole.trained == 4 * towers > part.trained
    assert str(whole).startswith(f"{whole.device / 1e6:.1f} MB = ")


NEEDS = Memory(
    model=300_000_000, policy=600_000_000, trained=100_000_000, copies=4, curve=2,
    activations=10_000_000, fixed=0, pairs=50,
)  # fmt: skip


def memory_of(resources: list[dict[str, float]], **fields: Any) -> list[Finding]:
    """Of nodes with these resources, as ``ray.nodes()`` gives them."""
    described = [{"NodeName": f"node {i}", "Resources": node} for i, node in enumerate(resources)]
    config = SweepConfig(**fields)
    return list(
        nodes.memory_of(described, replace(config, search=replace(config.search, concurrency=4)), NEEDS)
    )


def test_memory_of_nodes() -> None:
    # 700 MB + 300 MB for the process, 600 MB + 4 x 100 MB + 50 x 10 MB for the policy.
    assert (PROCESS + NEEDS.model, NEEDS.device) == (10**9, 1_500_000_000)
    small, large, exact = memory_of(
        [{"CPU": 3, "memory": 7.4e9}, {"CPU": 8, "memory": 10e9}, {"CPU": 1, "memory": 2.5e9}, {"CPU": 0}]
    )
    assert small.check == "memory of node 0"
    assert problem(small).startswith(
        "3 processes x 2.5 GB = 7.5 GB of 7.4 GB (the process, both towers, 1.5 GB ="
    )
    assert small.detail.endswith(
        "; lower train.batch_size, set train.micro_batch, or train less (model.trainable)"
    )
    # Of 8 CPUs the sweep uses those of 4 trials, and just enough is enough.
    assert large.detail.startswith("4 processes x 2.5 GB = 10.0 GB of 10.0 GB (")
    assert exact.detail.startswith("1 processes x 2.5 GB = 2.5 GB of 2.5 GB (")
    assert not [finding for finding in (large, exact) if finding.problem or "lower" in finding.detail]


def test_memory_where_the_policy_is_on_a_gpu() -> None:
    """Of which none is up; a node with GPUs is asked itself."""
    (finding,) = memory_of([{"CPU": 8, "memory": 1e9}], workers=1, gpus_per_worker=1.0)
    assert finding.check == "GPU memory"
    assert finding.detail.startswith(
        "no node with a GPU is up now; a worker needs 1.5 GB = 600.0 MB weights + "
    )
    assert not finding.problem, "the cluster may add one"


# ---- as a user runs it


def test_all_is_well(s3_env: S3Server, tmp_path: Path) -> None:
    results, table = f"s3://{s3_env.bucket}/healthy", tmp_path / "prices.csv"
    table.write_text("L4,5\nCPU,2\n")
    prices = ("--prices", str(table), "--price-per-device-hour", "9")  # of what the table lacks
    done = clippo("doctor", *SMALL_SWEEP, "--results", results, *prices)
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(done.stdout)
    assert {state for state, _ in found.values()} == {"ok"}
    names = " | ".join(found)
    for check in ("settings", "model clippo-demo", "pictures demo", "local disk", "versions on", "seen from"):
        assert check in names
    (versions,) = (detail for check, (_, detail) in found.items() if check.startswith("versions on"))
    installed = {name: metadata.version(name) for name in ("ray", "torch", "open_clip_torch", "clippo")}
    for name, version in {"Python": platform.python_version(), **installed}.items():
        assert f"{name} {version}, " in versions
    assert "2 trials at once x 1 CPU = 2 of" in found["resources"][1]
    assert re.search(r"160 pairs x [\d.e-]+ ms", found["a trial"][1])
    hours, cost = re.findall(r"([\d.e-]+) CPU-hours, ([\d.]+) at 2 each", found["the sweep"][1])[0]
    assert float(cost) == pytest.approx(2 * float(hours), abs=0.006)
    assert "for 5 trials" in found["the sweep"][1]
    plan = sweep("--results", results, "--dry-run", "--trials", "40")
    assert plan.returncode == 0, plan.stderr
    taken = re.search(r"the sweep +.* ([\d.]+) at 2 each", plan.stdout)
    assert taken is not None, plan.stdout
    # From the same measurement: 40 trials and one to compare with instead of 5.
    assert float(taken[1]) == pytest.approx(float(cost) * 41 / 5, abs=0.05)
    assert "by clippo doctor on CPU at 20" in plan.stdout
    folder = f"{s3_env.bucket}/healthy"  # which SeaweedFS lists itself
    assert [key for key in s3_env.filesystem().find(folder) if key != folder] == [], "nothing is left behind"
    printed = done.stdout + done.stderr
    assert not [secret for secret in (s3_env.key, s3_env.secret) if secret in printed]
    assert "Traceback" not in printed


@contextlib.contextmanager
def ray_node(log: Path, *flags: str, **environment: str) -> Iterator[None]:
    """A node of a cluster, whose processes have this environment."""
    agent, metrics = free_ports(2)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", *flags]
    command += ["--disable-usage-stats", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ``ray stop`` would end every Ray on the machine
        process.wait()


@pytest.mark.alone
def test_every_node_is_asked(s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has no credentials of its own, and a second node other sources."""
    port = free_ports(1)[0]
    shutil.copytree(Path(__file__).parents[1] / "clippo", tmp_path / "other" / "clippo")
    with (tmp_path / "other" / "clippo" / "errors.py").open("a") as file:
        file.write("\n# changed\n")
    address = f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = ["--head", f"--port={port}", "--include-dashboard=false", "--node-name=head"]
    with (
        ray_node(tmp_path / "head.log", *head, AWS_SECRET_ACCESS_KEY="another-secret"),
        ray_node(
            tmp_path / "other.log",
            f"--address={address}",
            "--node-name=other",
            PYTHONPATH=str(tmp_path / "other"),
        ),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.chdir(tmp_path)  # Ray's workers find what is in the driver's folder first
        flags = ["--results", f"s3://{s3_env.bucket}/nodes", "--no-probe-trial", "--concurrency", "64"]
        done = clippo("doctor", *SMALL_SWEEP, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    problems = {n: detail for n, (state, detail) in findings(done.stdout).items() if state == "problem"}
    assert "64 CPU, the cluster has 4" in problems.pop("resources")
    assert re.match(
        r"its sources: \w+ there and \w+ here; install the same", problems.pop("versions on other")
    )
    assert "check the credentials" in problems.pop("seen from head")
    assert not problems
    printed = done.stdout + done.stderr
    assert not [secret for secret in (s3_env.key, s3_env.secret, "another-secret") if secret in printed]
