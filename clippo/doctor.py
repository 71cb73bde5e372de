"""Looks for what would stop a sweep, before machines are paid for: store, model, pictures, cluster, memory.

Also what a sweep would take, from a short real trial on the cluster.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clippo.config import SweepConfig, absolute
from clippo.errors import ClippoError, DataError, StoreError
from clippo.model import load_clip
from clippo.results import ResultStore
from clippo.results.objects import MIN_FREE, Objects
from clippo.results.spool import Spool
from clippo.results.spooled import spool_folder
from clippo.sweep.autoscaler import most_resources, one_worker
from clippo.sweep.checks import check_settings
from clippo.sweep.cluster import check_resources, joined_ray
from clippo.sweep.cost import Speed, estimate, price_of, remember, work_of
from clippo.sweep.plan import needs
from clippo.sweep.probe import probes
from clippo.tasks import task_named
from clippo.train.memory import Memory, estimated_memory

DECODED = 3  # pictures of each part that are really decoded
ANSWER = 60.0  # how long a node may take to answer [s]
PROBE = 60.0  # how long the short trials may take, once they run [s]
WORKER_WAIT = 600.0  # how long a node that is added may take [s]


@dataclass(frozen=True)
class Finding:
    """One line of what was looked at."""

    check: str
    detail: str
    problem: bool = False
    waits: bool = False  # nothing is found yet: it says for what, and how long


def examine(
    config: SweepConfig,
    *,
    probe_trial: bool = True,
    prices: Mapping[str, float] = MappingProxyType({}),
    worker_wait: float = WORKER_WAIT,
) -> Iterator[Finding]:
    """Looks at everything that a sweep with this configuration needs; what is wrong is a finding, too.

    Args:
        probe_trial: run a short real trial, and say what the sweep would take.
        prices: of devices for an hour, which go before the list prices (``price_of``).
        worker_wait: how long an autoscaling cluster may take to add a node [s].
    """
    config = absolute(config)
    yield _tried("settings", lambda: _settings(config))
    for what, missing in needs(config):
        yield Finding(what, missing or "there", bool(missing))
    yield _tried("local disk", lambda: _local_disk(config))
    yield (data := _tried("pictures read", lambda: _decoded(config)))
    memory: Memory | None = None
    try:
        clip = load_clip(config.model.name, config.model.pretrained)
        memory = estimated_memory(config, clip)
        yield Finding("model read", f"takes pictures of {clip.image_size[1]} x {clip.image_size[0]} pixels")
    except ClippoError as error:
        yield Finding("model read", str(error), problem=True)
    with contextlib.ExitStack() as stack:
        try:
            _reach_head()
            stack.enter_context(joined_ray(config))
        except (
            Exception
        ) as error:  # Ray raises whatever went wrong: RuntimeError, ConnectionError, ValueError
            yield Finding("Ray", f"{_last_line(error)}; check RAY_ADDRESS and `ray status`", problem=True)
            return
        yield (resources := _tried("resources", lambda: check_resources(config)))
        added = list[Finding]()
        for finding in _first_worker(config, worker_wait):
            yield finding
            added.append(finding)
        nodes = _alive()
        alike: list[Mapping[str, Any]] = []
        for node, finding in _versions(nodes):
            yield finding
            alike += [] if finding.problem else [node]
        if not data.problem:
            yield from _seen_from(alike, config)
        if memory is not None:
            yield from _memory(nodes, config, memory)
        in_order = not any(finding.problem for finding in (data, resources, *added))
        if probe_trial and memory is not None and in_order:
            yield from _estimate(config, prices, worker_wait)


def print_findings(findings: Iterable[Finding], console: Console) -> int:
    """Shows findings as a table that grows as they come; returns how many of them are problems."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("check", overflow="fold", max_width=36)
    table.add_column("")
    table.add_column("detail", overflow="fold")
    problems = 0
    with Live(table, console=console, vertical_overflow="visible"):
        for found in findings:
            if found.waits:  # at once, also where the table is shown at its end
                console.print(Text(f"{found.check}: {found.detail}"))
                continue
            mark = "[red]problem[/]" if found.problem else "[green]ok[/]"
            table.add_row(Text(found.check), mark, Text(found.detail))
            problems += found.problem
    return problems


def _tried(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, look())
    except ClippoError as error:
        return Finding(check, str(error), problem=True)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


# --- here ------------------------------------------------------------------------------------------------


def _settings(config: SweepConfig) -> str:
    check_settings(config)
    return "task, losses and baselines are known"


def _local_disk(config: SweepConfig) -> str:
    """Whether results can wait on local disk while the store is away."""
    spool = Spool(spool_folder(ResultStore(config.results).uri), config.results)
    failure, waiting = spool.probe(), len(spool.items)
    spool.close()
    if failure:
        raise StoreError(f"{spool.root} cannot be written ({failure}); set CLIPPO_CACHE to another folder")
    free = shutil.disk_usage(spool.root).free
    if free < MIN_FREE:
        raise StoreError(
            f"{spool.root} has {decimal(free)} left; free at least {decimal(MIN_FREE)} or set CLIPPO_CACHE"
        )
    return f"{decimal(free)} free in {spool.root.parents[1]}" + (
        f"; {waiting} objects of an earlier sweep wait there, the next one delivers them" if waiting else ""
    )


def _decoded(config: SweepConfig) -> str:
    """Decodes some pictures of every part."""
    task = task_named(config.task)(config.data)
    read = 0
    for part in task.parts.values():
        if not part.pictures:
            raise DataError(f"{config.data.source} has no pictures for {part.name}; add some")
        for picture in part.pictures[:: max(1, len(part.pictures) // DECODED)][:DECODED]:
            try:
                picture.load()
            except DataError as error:
                raise DataError(f"{picture.key}: {error}; mend or remove it") from error
            read += 1
    pictures = sum(len(part.pictures) for part in task.parts.values())
    seen = len(task.parts["train"].candidates)
    return f"{read} of {pictures} decoded, {len(task.classes)} classes, {seen} of them seen"


def _reach_head() -> None:
    """Raises OSError when nothing listens where RAY_ADDRESS points to; Ray itself tries for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {address} ({error})") from error


# --- the nodes -------------------------------------------------------------------------------------------


def _alive() -> list[Any]:
    return [node for node in ray.nodes() if node["Alive"]]


def _first_worker(config: SweepConfig, seconds: float) -> Iterator[Finding]:
    """Has an autoscaling cluster at rest add a node, of which all else is then asked, too."""
    wanted = {kind: n for kind, n in (("CPU", 1.0), ("GPU", config.gpus_per_worker)) if n}

    def has_room(resources: Mapping[str, float]) -> bool:
        return all(resources.get(kind, 0.0) >= n for kind, n in wanted.items())

    if not config.autoscaling or any(has_room(node["Resources"]) for node in _alive()):
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


def _versions(nodes: list[Any]) -> Iterator[tuple[Any, Finding]]:
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


def _seen_from(nodes: list[Any], config: SweepConfig) -> Iterator[Finding]:
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
        _decoded(config)

    look(sees_what_was_written)
    look(has_the_same_pictures)
    look(lambda: _local_disk(config))
    return problems


def _asked(nodes: list[Any], question: Callable[..., Any], *args: Any) -> Iterator[tuple[Any, Any]]:
    """The answer of each node, all asked at once; a string says why there is none."""
    asked = []
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(question).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        asked.append(task.remote(*args))
    end = time.monotonic() + ANSWER
    for node, ref in zip(nodes, asked, strict=True):
        try:
            yield node, ray.get(ref, timeout=max(0.1, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            yield node, f"no answer in {ANSWER:.0f} s; see `ray status` and the logs of the node"
        except ray.exceptions.RayError as error:
            yield node, _last_line(error)


# --- memory ----------------------------------------------------------------------------------------------


def _memory(nodes: list[Any], config: SweepConfig, memory: Memory) -> Iterator[Finding]:
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


# --- what it would take ----------------------------------------------------------------------------------


def _probes_once_begun(config: SweepConfig) -> Iterator[Speed | None]:
    yield None  # so that waiting for a node is not counted
    yield from probes(config)


def _estimate(config: SweepConfig, prices: Mapping[str, float], worker_wait: float) -> Iterator[Finding]:
    """What the sweep takes, by the longest of the short trials that ended in time."""
    task = ray.remote(_probes_once_begun).options(num_cpus=1, num_gpus=config.gpus_per_worker, max_retries=0)
    running: Any = task.remote(config)
    begin_in = worker_wait if config.autoscaling else PROBE
    if not ray.wait([running], timeout=begin_in)[0]:
        ray.cancel(running, force=True)
        yield Finding("a short trial", f"no node had room for it in {begin_in:g} s; no estimate")
        return
    end, speed = time.monotonic() + PROBE, None
    while ray.wait([running], timeout=max(0.0, end - time.monotonic()))[0]:
        try:
            speed = ray.get(next(running))
        except StopIteration:
            break
        except ray.exceptions.RayError as error:
            yield Finding("a short trial", _last_line(error), problem=True)
            return
    else:
        ray.cancel(running, force=True)
    if speed is None:
        yield Finding("a short trial", f"not finished in {PROBE:.0f} s; no estimate")
        return
    speed = replace(speed, price=price_of(speed.device, prices))
    remember(config, speed)
    for what, taken in estimate(config, work_of(config), speed):
        yield Finding(what, taken)
