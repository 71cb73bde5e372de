"""Looks for what would stop a sweep, before machines are paid for: store, model, pictures, cluster, memory.

Also what a sweep would take, from a short real trial on the cluster.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
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
from clippo.model import load_clip, policy_of
from clippo.prepared import Location, prepare
from clippo.results import ResultStore
from clippo.results.objects import MIN_FREE, Objects
from clippo.results.spool import Spool
from clippo.results.spooled import spool_folder
from clippo.sweep.cluster import check_resources, cluster_resources, joined_ray, resources_of_a_trial
from clippo.sweep.plan import needs
from clippo.sweep.tuner import check_settings
from clippo.tasks import TASKS, TypographicTask
from clippo.train import TrialSettings, fit
from clippo.train.memory import Memory, estimated_memory
from clippo.train.ray_train import Shared, load_shared

DECODED = 3  # pictures of each part that are really decoded
ANSWER = 60.0  # how long a node may take to answer [s]
PROBE = 60.0  # how long the short trials may take [s]
PROBE_STEPS = 8
PROBE_PICTURES = (4, 32, 128)  # of an evaluation set, of one short trial after another


@dataclass(frozen=True)
class Finding:
    """One line of what was looked at."""

    check: str
    detail: str
    problem: bool = False


def examine(
    config: SweepConfig, *, probe_trial: bool = True, price_per_device_hour: float | None = None
) -> Iterator[Finding]:
    """Looks at everything that a sweep with this configuration needs; what is wrong is a finding, too.

    Args:
        probe_trial: run a short real trial, and say what the sweep would take.
        price_per_device_hour: of a CPU, or of a GPU where workers have them.
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
            stack.enter_context(joined_ray(config))
        except (
            Exception
        ) as error:  # Ray raises whatever went wrong: RuntimeError, ConnectionError, ValueError
            yield Finding("Ray", f"{_last_line(error)}; check RAY_ADDRESS and `ray status`", problem=True)
            return
        nodes = [node for node in ray.nodes() if node["Alive"]]
        alike: list[Mapping[str, Any]] = []
        for node, finding in _versions(nodes):
            yield finding
            alike += [] if finding.problem else [node]
        if not data.problem:
            yield from _seen_from(alike, config)
        yield (resources := _tried("resources", lambda: _resources(config)))
        if memory is not None:
            yield from _memory(nodes, config, memory)
        if probe_trial and memory is not None and not (data.problem or resources.problem):
            yield from _estimate(config, price_per_device_hour)


def print_findings(findings: Iterable[Finding], console: Console) -> int:
    """Shows findings as a table that grows as they come; returns how many of them are problems."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("check", overflow="fold", max_width=36)
    table.add_column("")
    table.add_column("detail", overflow="fold")
    problems = 0
    with Live(table, console=console, vertical_overflow="visible"):
        for found in findings:
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
    task = TASKS[config.task](config.data)
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
    return f"{read} of {pictures} decoded, {len(task.source.classes)} classes, {len(task.seen)} of them seen"


def _reach_head() -> None:
    """Raises OSError when nothing listens where RAY_ADDRESS points to; Ray itself tries for minutes."""
    host, colon, port = os.environ.get("RAY_ADDRESS", "").rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


# --- the nodes -------------------------------------------------------------------------------------------


def _versions(nodes: list[Any]) -> Iterator[tuple[Any, Finding]]:
    """Compares the versions on every node with those here."""

    def versions() -> dict[str, str]:
        # Inside a function, so that Ray sends the code itself: a node may lack this module, or have another.
        import hashlib
        import importlib.util
        import platform
        from importlib import metadata
        from pathlib import Path

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
    fingerprint, objects = TASKS[config.task](config.data).fingerprint, Objects(config.results)
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
        if TASKS[config.task](config.data).fingerprint != fingerprint:
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


# --- resources -------------------------------------------------------------------------------------------


def _resources(config: SweepConfig) -> str:
    check_resources(config)
    have, at_once = cluster_resources(), config.search.concurrency
    return ", ".join(
        f"{at_once} trials at once x {each:g} {kind} = {at_once * each:g} of {have.get(kind, 0.0):g}"
        for kind, each in resources_of_a_trial(config).items()
        if each
    ) + (" now; the cluster adds what it lacks" if config.autoscaling else "")


def _memory(nodes: list[Any], config: SweepConfig, memory: Memory) -> Iterator[Finding]:
    """Compares what the processes of trials need with what nodes and their GPUs have."""
    processes = config.search.concurrency * max(1, config.workers)
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


@dataclass(frozen=True)
class Probe:
    """What a short trial took [s]: for each pair of a step, each picture measured, each picture prepared."""

    pair: float
    measured: float
    prepared: float


class _Nowhere:
    """Checkpoints that nobody needs."""

    def read(self, name: str) -> bytes | None:
        return None

    def write(self, name: str, data: bytes) -> None:
        pass


def _estimate(config: SweepConfig, price: float | None) -> Iterator[Finding]:
    """What the sweep takes, by the longest of the short trials that ended in time."""
    task = ray.remote(_probes).options(num_cpus=1, num_gpus=config.gpus_per_worker, max_retries=0)
    running: Any = task.remote(config)
    end, probe = time.monotonic() + PROBE, None
    while ray.wait([running], timeout=max(0.0, end - time.monotonic()))[0]:
        try:
            probe = ray.get(next(running))
        except StopIteration:
            break
        except ray.exceptions.RayError as error:
            yield Finding("a short trial", _last_line(error), problem=True)
            return
    else:
        ray.cancel(running, force=True)
    if probe is None:
        yield Finding(
            "a short trial", f"not finished in {PROBE:.0f} s (perhaps nodes start first); no estimate"
        )
    else:
        yield from _expected(config, probe, price)


def _expected(config: SweepConfig, probe: Probe, price: float | None) -> Iterator[Finding]:
    """What a trial and the sweep take when everything is as fast as in the probe."""
    pairs, measured, pictures = work_of(config)
    processes, search = max(1, config.workers), config.search
    trial = (pairs * probe.pair + measured * probe.measured) / processes
    work = (
        f"{pairs:g} pairs x {1e3 * probe.pair:.3g} ms + {measured:g} measured x {1e3 * probe.measured:.3g} ms"
    )
    over = f", over {processes} workers without what they tell each other" if processes > 1 else ""
    yield Finding("a trial", f"{_duration(trial)}: {work}{over}")
    trials, kind = search.trials + len(search.baselines), "GPU" if config.gpus_per_worker else "CPU"
    hours = trials * trial * processes * (config.gpus_per_worker or 1.0) / 3600
    cost = "" if price is None else f", {hours * price:.2f} at {price:g} each"
    yield Finding(
        "the sweep",
        f"{3600 * search.concurrency / trial:.3g} trials an hour, {hours:.3g} {kind}-hours{cost} and "
        f"{_duration(trials * trial / search.concurrency)} for {trials} trials",
    )
    yield Finding(
        "preparing", f"{_duration(pictures * probe.prepared)} of one CPU for {pictures} pictures, once"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def work_of(config: SweepConfig) -> tuple[float, float, int]:
    """Pairs that an average trial trains on, pictures that it measures, and pictures to prepare.

    >>> work_of(SweepConfig())[0]
    1536.0
    """
    task: TypographicTask = TASKS[config.task](config.data)
    epochs = sum(config.search.epochs) / 2
    sets = {name: len(part.pictures) for part in task.parts.values() for name in part.sets}
    evaluation = {name: n for name, n in sets.items() if not name.startswith("train/")}
    on_tower = config.model.trainable != "transform"
    curve = len(config.train.alphas if on_tower else config.train.powers)
    curve_sets = (*config.robustness_sets, *config.retention_sets)
    # The average after every epoch; after the last also the last weights, and the curve on what counts.
    measured = (epochs - 1) * sum(n for name, n in evaluation.items() if name.startswith("validation/"))
    measured += 2 * sum(evaluation.values())
    measured += curve * sum(n for name, n in evaluation.items() if name.partition("/")[2] in curve_sets)
    pairs = len(task.parts["train"].pictures) * config.data.attacked_copies
    prepared = pairs + sets["train/clean"] + sum(evaluation.values())
    return epochs * pairs, measured, prepared


def _probes(config: SweepConfig) -> Iterator[Probe]:
    """Short trials on ever more pictures of the sweep; the first ones also warm the caches."""
    torch.set_num_threads(1)
    for pictures in PROBE_PICTURES:
        yield _short_trial(config, pictures)


def _short_trial(config: SweepConfig, pictures: int) -> Probe:
    """An epoch of some steps; on CPUs, where time goes with the pairs, of few pairs each.

    Args:
        pictures: of each evaluation set.
    """
    search, on_gpu = config.search, config.gpus_per_worker > 0
    batch = -(-config.train.batch_size // max(1, config.workers))
    batch = batch if on_gpu else min(batch, pictures)
    data = replace(
        config.data,
        train_pictures=min(PROBE_STEPS * batch, config.data.train_pictures),
        attacked_copies=1,
        eval_pictures=min(pictures, config.data.eval_pictures),
        test_sets=(),
    )
    train = replace(config.train, batch_size=batch)
    loss = search.losses[0]
    settings = TrialSettings(
        loss=loss,
        beta=getattr(search, f"beta_{loss}", (None,))[0],
        kl_weight=search.kl_weight[0],
        learning_rate=search.learning_rate[0],
        epochs=1,
        seed=search.seed,
        orthogonality=search.orthogonality[0] if config.model.trainable == "transform" else None,
    )
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="clippo-doctor-") as folder:
        location = Location(Path(folder))
        ticks: list[float] = []  # the first when the model is loaded and the first picture is begun
        name = prepare(
            config.task, data, config.model, location,
            on_progress=lambda done, total: ticks.append(time.perf_counter()),
        )  # fmt: skip
        shared = Shared(model=config.model, train=train, prepared=name, location=location, on_gpu=on_gpu)
        clip, prepared, frozen = load_shared(shared)
        device = torch.device("cuda" if on_gpu else "cpu")
        fit(
            policy_of(clip, config.model.trainable), prepared, frozen, settings, train,
            report=reports.append, checkpoints=_Nowhere(), device=device,
        )  # fmt: skip
    metrics, pairs = reports[-1]["metrics"], len(prepared.attacked)
    measured = sum(len(evaluated.rows) for evaluated in prepared.evaluation)
    return Probe(
        pair=metrics["train_s"] / pairs,
        measured=metrics["eval_s"] / (2 * measured),
        prepared=(ticks[-1] - ticks[0]) / (2 * pairs + measured),
    )
