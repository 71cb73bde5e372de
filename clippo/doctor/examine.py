"""Looks at everything that a sweep needs, in the order in which it needs it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import ray

from clippo.config import SweepConfig, absolute
from clippo.data.prompts import without_file
from clippo.doctor.finding import Finding, last_line, tried
from clippo.doctor.here import decoded, local_disk, reach_head, settings
from clippo.doctor.nodes import alive, first_worker, memory_of, seen_from, versions_of
from clippo.errors import ClippoError, ConfigError
from clippo.model import load_clip
from clippo.sweep.cluster import check_resources, joined_ray
from clippo.sweep.cost import Speed, estimate, price_of, remember, work_of
from clippo.sweep.plan import needs
from clippo.sweep.probe import probes
from clippo.train.memory import Memory, estimated_memory

PROBE = 60.0  # how long the short trials may take, once they run [s]
WORKER_WAIT = 600.0  # how long a node that is added may take [s]


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
    with contextlib.suppress(ConfigError):  # which is one of the needs
        prompt = without_file(config.model.prompt)
        config = replace(config, model=replace(config.model, prompt=prompt))
    yield tried("settings", lambda: settings(config))
    for what, missing in needs(config):
        yield Finding(what, missing or "there", bool(missing))
    yield tried("local disk", lambda: local_disk(config))
    yield (data := tried("pictures read", lambda: decoded(config)))
    memory: Memory | None = None
    try:
        clip = load_clip(config.model.name, config.model.pretrained)
        memory = estimated_memory(config, clip)
        yield Finding("model read", f"takes pictures of {clip.image_size[1]} x {clip.image_size[0]} pixels")
    except ClippoError as error:
        yield Finding("model read", str(error), problem=True)
    with contextlib.ExitStack() as stack:
        try:
            reach_head()
            stack.enter_context(joined_ray(config))
        # Ray raises whatever went wrong: RuntimeError, ConnectionError, ValueError.
        except Exception as error:
            yield Finding("Ray", f"{last_line(error)}; check RAY_ADDRESS and `ray status`", problem=True)
            return
        yield (resources := tried("resources", lambda: check_resources(config)))
        added = list[Finding]()
        for finding in first_worker(config, worker_wait):
            yield finding
            added.append(finding)
        nodes = alive()
        alike: list[Mapping[str, Any]] = []
        for node, finding in versions_of(nodes):
            yield finding
            alike += [] if finding.problem else [node]
        if not data.problem:
            yield from seen_from(alike, config)
        if memory is not None:
            yield from memory_of(nodes, config, memory)
        in_order = not any(finding.problem for finding in (data, resources, *added))
        if probe_trial and memory is not None and in_order:
            yield from _estimate(config, prices, worker_wait)


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
            yield Finding("a short trial", last_line(error), problem=True)
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
