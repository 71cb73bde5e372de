"""What a cluster may grow to, and asking it for a node.

Ray's open-source autoscaler keeps its limits to itself (Ray 2.60); its configuration, on the head, has them.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from ray._private.state import state as ray_state
from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer
from ray.autoscaler._private.kuberay.node_provider import IN_CLUSTER_TOKEN_PATH
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, FileConfigReader, KubeRayConfigReader
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

HEAD = "node:__internal_head__"  # the resource by which Ray marks it
ANSWER = 60.0  # how long the head may take to read the configuration [s]


def most_resources() -> dict[str, float]:
    """What the cluster that this process has joined may grow to; empty where nothing tells."""
    # Filled by autoscalers that are not open source; Ray Train looks at it, too.
    if told := ray_state.get_max_resources_from_cluster_config():
        return dict(told)
    head = next((node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    if head is None:
        return {}
    there = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    task = ray.remote(_of_configured_workers).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        workers = ray.get(task.remote(ray.get_runtime_context().gcs_address), timeout=ANSWER)
    except ray.exceptions.RayError:  # also when no answer came in time
        logger.warning("the head does not tell what the cluster may grow to", exc_info=True)
        return {}
    if workers is None:
        return {}
    own = head["Resources"]
    return {kind: own.get(kind, 0.0) + workers.get(kind, 0.0) for kind in own.keys() | workers.keys()}


def _of_configured_workers(gcs_address: str) -> dict[str, float] | None:
    """``most_of_workers`` of the autoscaler of the head that this runs on, where there is one."""
    config = _from_file(gcs_address) or _from_kubernetes()
    return most_of_workers(config) if config else None


def _from_file(gcs_address: str) -> AutoscalingConfig | None:
    """What the monitor, a process on the head, was started with: by the cluster launcher, or by hand."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if flags.get("--gcs-address") != gcs_address or "--autoscaling-config" not in flags:
            continue
        with contextlib.suppress(psutil.Error):  # it has just ended
            file = Path(process.cwd(), os.path.expanduser(flags["--autoscaling-config"]))
            return FileConfigReader(str(file)).get_cached_autoscaling_config()
    return None


def _from_kubernetes() -> AutoscalingConfig | None:
    """What KubeRay's operator keeps, asked for as by the autoscaler, another container of the head's pod."""
    token, name = Path(IN_CLUSTER_TOKEN_PATH), os.environ.get("RAY_CLUSTER_NAME")
    if not name or not token.exists():
        return None
    namespace = token.with_name("namespace").read_text().strip()
    return KubeRayConfigReader(AutoscalingConfigProducer(name, namespace)).get_cached_autoscaling_config()


def most_of_workers(config: AutoscalingConfig) -> dict[str, float] | None:
    """What workers have together, of each resource as much as their numbers allow; None: it does not say.

    Where machines are one's own, Ray learns what they have when they come.
    """
    types = config.get_node_type_configs()
    if not types:
        return None
    head, limit = config.get_head_node_type(), config.get_config("max_workers", 0)
    workers = [
        node.resources
        for name, node in types.items()
        for _ in range(min(node.max_worker_nodes - (name == head), limit))  # of its type, one is the head
    ]
    if not all(workers):
        return None
    kinds = {kind for each in workers for kind in each}
    return {kind: sum(heapq.nlargest(limit, (each.get(kind, 0.0) for each in workers))) for kind in kinds}


def one_worker(resources: dict[str, float], seconds: float) -> bool:
    """Has a node added with room for these CPUs and GPUs; whether one came in time.

    By a task, which goes when its driver does: what ``request_resources`` asks for would stay after a driver
    that was killed, and takes the place of what others have asked for.
    """
    task = ray.remote(lambda: None).options(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0.0), max_retries=0
    )
    running: Any = task.remote()
    try:
        ray.get(running, timeout=seconds)
    except ray.exceptions.RayError:  # also when none came in time
        ray.cancel(running, force=True)
        return False
    return True
