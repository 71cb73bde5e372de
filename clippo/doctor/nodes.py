"""What every node of the cluster says, and what it has."""

from __future__ import annotations

import contextlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.filesize import decimal

from clippo.config import SweepConfig
from clippo.doctor.finding import Finding, last_line
from clippo.doctor.here import decoded, local_disk
from clippo.errors import ClippoError, DataError, StoreError
from clippo.results import ResultStore
from clippo.results.objects import Objects
from clippo.sweep.autoscaler import most_resources, one_worker
from clippo.tasks import task_named
from clippo.train.memory import Memory

ANSWER = 180.0  # how long a node may take to answer; its disk may be slow and torch is large [s]


def alive() -> list[Any]:
    return [node for node in ray.nodes() if node["Alive"]]


def first_worker(config: SweepConfig, seconds: float) -> Iterator[Finding]:
    """Has an autoscaling cluster at rest add a node, of which all else is then asked, too."""
    wanted = {kind: n for kind, n in (("CPU", 1.0), ("GPU", config.gpus_per_worker)) if n}

    def has_room(resources: Mapping[str, float]) -> bool:
        return all(resources.get(kind, 0.0) >= n for kind, n in wanted.items())

    if not config.autoscaling or any(has_room(node["Resources"]) for node in alive()):
        return
    check, size = "a worker", " and ".join(f"{n:g} {kind}" for kind, n in wanted.items())
    most = most_resources()
    if most and not has_room(most):
        never = f"the cluster may add none with {size}: nothing of workers was checked; raise its max_workers"
        yield Finding(check, never, problem=True)
        return
    yield Finding(check, f"none is up; waiting for one with {size}, at most {seconds:g} s", waits=True)
    began = time.monotonic()
    if one_worker(wanted, seconds):
        yield Finding(check, f"one with {size} came up in {time.monotonic() - began:.0f} s")
        return
    late = (
        f"no worker with {size} came up in {seconds:g} s: nothing of workers was checked; see `ray status` "
    )
    yield Finding(check, late + "and the logs of the autoscaler, or raise --worker-wait", problem=True)


def versions_of(nodes: list[Any]) -> Iterator[tuple[Any, Finding]]:
    """Compares the versions on every node with those here."""

    def versions() -> dict[str, str]:
        # Inside a function, so that Ray sends the code itself: a node may lack this module, or have another.
        import hashlib
        import importlib.util
        import platform
        from importlib import metadata

        found = {"Python": platform.python_version()}
        for name in ("ray", "torch", "open_clip_torch", "clippo"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "none"
        spec = importlib.util.find_spec("clippo")
        files = sorted(Path(spec.origin).parent.rglob("*.py")) if spec and spec.origin else []
        # The same version may be another checkout.
        found["its sources"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
        return found

    here = versions()
    for node, answer in _asked(nodes, versions):
        check = f"versions on {node['NodeName']}"
        if isinstance(answer, str):
            yield node, Finding(check, answer, problem=True)
            continue
        other = [f"{n}: {answer[n]} there and {v} here" for n, v in here.items() if answer[n] != v]
        told = ", ".join(f"{name} {version}" for name, version in here.items())
        remedy = "; install the same there (the image of the cluster)"
        yield node, Finding(check, ", ".join(other) + remedy if other else told, bool(other))


def seen_from(nodes: list[Any], config: SweepConfig) -> Iterator[Finding]:
    """Whether every node reads the same pictures and uses the same store, with credentials of its own."""
    fingerprint, objects = task_named(config.task)(config.data).fingerprint, Objects(config.results)
    key = f".doctor-{uuid.uuid4().hex}"
    try:
        objects.put(key, b"doctor")
    except StoreError:
        return  # said before
    for node, answer in _asked(nodes, _looked_around, config, key, fingerprint):
        problem = answer if isinstance(answer, str) else "; ".join(answer)
        told = problem or "reads the pictures, uses the store, and has room in its cache"
        yield Finding(f"seen from {node['NodeName']}", told, bool(problem))
    with contextlib.suppress(StoreError):
        objects.delete([key])


def _looked_around(config: SweepConfig, key: str, fingerprint: str) -> list[str]:
    """What is wrong on the node that this runs on."""
    problems = []

    def look(check: Callable[[], object]) -> None:
        try:
            check()
        except ClippoError as error:
            problems.append(str(error))

    def sees_what_was_written() -> None:
        store = ResultStore(config.results)
        store.check()
        if not store.exists(key):
            raise StoreError(
                f"{config.results} is another place there; use s3://, or a folder that all nodes share"
            )

    def has_the_same_pictures() -> None:
        if task_named(config.task)(config.data).fingerprint != fingerprint:
            raise DataError(f"{config.data.source} has other pictures there; give every node the same")
        decoded(config)

    look(sees_what_was_written)
    look(has_the_same_pictures)
    look(lambda: local_disk(config))
    return problems


def _asked(nodes: list[Any], question: Callable[..., Any], *args: Any) -> Iterator[tuple[Any, Any]]:
    """The answer of each node, all asked at once; a string says why there is none."""
    answers = []
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(question).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        answers.append(task.remote(*args))
    end = time.monotonic() + ANSWER
    for node, answer in zip(nodes, answers, strict=True):
        try:
            yield node, ray.get(answer, timeout=max(0.1, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            yield node, f"no answer in {ANSWER:.0f} s; see `ray status` and the logs of the node"
        except ray.exceptions.RayError as error:
            yield node, last_line(error)


def memory_of(nodes: list[Any], config: SweepConfig, memory: Memory) -> Iterator[Finding]:
    """Compares what the processes of trials need with what nodes and their GPUs have."""
    processes = config.search.concurrency * max(1, config.max_workers)
    remedy = "; lower train.batch_size, set train.micro_batch, or train less (model.trainable)"
    host = memory.host if config.gpus_per_worker else memory.host + memory.device
    parts = "the process and both towers" if config.gpus_per_worker else f"the process, both towers, {memory}"
    for node in nodes:
        have = node["Resources"]
        kind, each = ("GPU", config.gpus_per_worker) if config.gpus_per_worker else ("CPU", 1.0)
        fits = min(processes, int(have.get(kind, 0) / each))
        if not fits:
            continue
        room, address = have.get("memory", math.inf), node["NodeName"]
        sum_ = (
            f"{fits} processes x {decimal(host)} = {decimal(fits * host)} of {decimal(int(room))} ({parts})"
        )
        yield Finding(f"memory of {address}", sum_ + remedy * (fits * host > room), fits * host > room)
    if not config.gpus_per_worker:
        return
    with_gpus = [node for node in nodes if node["Resources"].get("GPU")]
    if not with_gpus:
        yield Finding("GPU memory", f"no node with a GPU is up now; a worker needs {memory}")
    for node, answer in _asked(with_gpus, _gpu_memory):
        check = f"GPU memory of {node['NodeName']}"
        if isinstance(answer, str):
            yield Finding(check, answer, problem=True)
            continue
        room = int(answer * min(1.0, config.gpus_per_worker))
        told = f"{memory} of {decimal(room)}"
        yield Finding(check, told + remedy * (memory.device > room), memory.device > room)


def _gpu_memory() -> int | str:
    """Bytes of the smallest GPU of the node that this runs on, which asks for none of them."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides what a task has not asked for
    if not torch.cuda.is_available():
        return "torch finds no GPU there; install a build of torch for them, or mend the driver"
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(i).total_memory for i in devices)
