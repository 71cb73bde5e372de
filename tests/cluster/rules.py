"""What the cluster files must keep to beyond their schemas: each rule yields one line for what breaks it."""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any
from unittest import mock

from clippo.cli import _sweep_config
from clippo.config import SweepConfig
from sweeps.typo_sweep import typo_sweep
from tests.conftest import ROOT

CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "cluster/constraints.txt").read_text().split() if "==" in line
)
RAY = CONSTRAINTS["ray"]
IMAGE = f"REGISTRY/clippo:{metadata.version('clippo')}-ray{RAY}"
KEYS = re.compile(r"aws_?(secret_?)?access_?key|gcp_credentials|private_key|secretKeyRef", re.IGNORECASE)
MAX_IDLE_MINUTES = 15
DASHBOARD = 8265


def launcher_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Of a file for Ray's cluster launcher, after ``prepare_config``."""
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    workers = {name: t for name, t in types.items() if name != config["head_node_type"]}
    yield from _head_problems(head["resources"])
    if _is_spot(head):
        yield "the head is on spot; a lost head costs the whole cluster"
    for name, worker in workers.items():
        yield from _size_problems(name, worker["min_workers"], worker["min_workers"], worker["max_workers"])
        if worker["min_workers"]:
            yield f"{name} keeps {worker['min_workers']} workers that cost while idle"
        if not _is_spot(worker):
            yield f"{name} is not on spot"
        if not worker["resources"].get("GPU"):
            yield f"{name} has no GPU"
    if sum(w["max_workers"] for w in workers.values()) > config["max_workers"]:
        yield "max_workers of the file is below those of its types"
    if not 0 < config["idle_timeout_minutes"] <= MAX_IDLE_MINUTES:
        yield f"idle workers stay for {config['idle_timeout_minutes']} minutes"
    if config["provider"].get("cache_stopped_nodes", True):
        yield "stopped machines are kept, and their disks paid for"
    for name in (
        types if config["provider"]["type"] == "aws" else workers
    ):  # on GCP the launcher sets the head's
        if not types[name]["node_config"].keys() & {"IamInstanceProfile", "serviceAccounts"}:
            yield f"{name} has no role or service account"
    yield from _key_problems(config)
    yield from _image_problems([v for k, v in config["docker"].items() if k.endswith("image")])
    if "--env RAY_AUTH_MODE=token" not in config["docker"]["run_options"]:
        yield "no token authentication"
    if "~/.ray/auth_token" not in config["file_mounts"]:
        yield "the nodes get no token"
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        if rule.get("IpProtocol") == "-1" or rule["FromPort"] <= DASHBOARD <= rule["ToPort"]:
            yield "the security group opens the dashboard"
    start = " ".join(config["head_start_ray_commands"])
    if "--dashboard-host=127.0.0.1" not in start:
        yield "the dashboard does not listen on loopback alone"
    if "--autoscaling-config" not in start:
        yield "the head does not scale"
    if any(
        "install" in command for key in config if key.endswith("setup_commands") for command in config[key]
    ):
        yield "something is installed at start instead of in the image"


def launcher_resources(config: Mapping[str, Any]) -> dict[str, float]:
    """What the cluster has when all its nodes are there."""
    have: dict[str, float] = {}
    for name, node in config["available_node_types"].items():
        count = 1 if name == config["head_node_type"] else node["max_workers"]
        for kind, number in node["resources"].items():
            have[kind] = have.get(kind, 0) + count * number
    return have


def rayjob_problems(documents: list[dict[str, Any]]) -> Iterator[str]:
    """Of a RayJob and what stands in its file."""
    job = next(d for d in documents if d["kind"] == "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    if cluster["rayVersion"] != RAY:
        yield f"rayVersion is {cluster['rayVersion']}, the project's is {RAY}"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token authentication"
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "the dashboard can be reached from outside"
    if any(group.keys() >= {"resources"} for group in (head, *workers)):
        yield "KubeRay refuses resources beside rayStartParams"
    start = head["rayStartParams"]
    own = json.loads(json.loads(start.get("resources", '"{}"')))
    yield from _head_problems({"CPU": int(start.get("num-cpus", -1)), **own})
    yield from _key_problems(documents)
    for group in (head, *workers):
        yield from _pod_problems(group.get("groupName", "head"), group["template"]["spec"], accounts)
    queued = "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})
    scales = cluster.get("enableInTreeAutoscaling", False)
    if queued == scales:
        yield "Kueue admits a fixed size, so either a queue or the autoscaler"
    if scales and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "not the autoscaler v2"
    if queued and not spec.get("suspend"):
        yield "Kueue wants a suspended job"
    for group in workers:
        name, least, most = group["groupName"], group["minReplicas"], group["maxReplicas"]
        yield from _size_problems(name, least, group["replicas"], most)
        if least != (0 if scales else most):
            yield f"{name} has minReplicas {least}"
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        if "nvidia.com/gpu" not in limits:
            yield f"{name} has no GPU"
        if "nvidia.com/gpu" not in {t.get("key") for t in pod.get("tolerations", [])}:
            yield f"{name} does not tolerate the taint of GPU nodes"
    if not 1 <= spec.get("backoffLimit", 0) <= 10:
        yield f"backoffLimit is {spec.get('backoffLimit', 0)}; a lost head wants another try"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "the cluster is not deleted after the job"
    if not 0 <= spec.get("ttlSecondsAfterFinished", 0) <= 60 * MAX_IDLE_MINUTES:
        yield "the finished cluster stays too long"
    sweep = sweep_of(spec["entrypoint"])
    if not sweep.name:
        yield "without a fixed --name a second try begins anew"
    if not sweep.results.startswith("s3://"):
        yield "results are lost with the head"
    if scales and not sweep.autoscaling:
        yield "without --autoscaling a cluster that has no workers yet is refused"
    yield from arithmetic_problems(sweep, rayjob_resources(job))


def rayjob_resources(job: Mapping[str, Any]) -> dict[str, float]:
    """What the cluster has when all its nodes are there."""
    cluster = job["spec"]["rayClusterSpec"]
    have = {"CPU": 0.0, "GPU": 0.0}
    have |= json.loads(json.loads(cluster["headGroupSpec"]["rayStartParams"].get("resources", '"{}"')))
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        have["CPU"] += group["maxReplicas"] * int(limits["cpu"])
        have["GPU"] += group["maxReplicas"] * int(limits.get("nvidia.com/gpu", 0))
    return have


def sweep_of(entry_point: str) -> SweepConfig:
    """What the flags of an entry point say, by the project's own parser."""
    words = shlex.split(entry_point.replace("\\\n", " "))
    program = next(i for i, word in enumerate(words) if word.endswith("typo_sweep.py"))
    with mock.patch.object(sys, "argv", words[program:]):
        return _sweep_config({"demo": typo_sweep}, None)


def arithmetic_problems(sweep: SweepConfig, have: Mapping[str, float]) -> Iterator[str]:
    """More trials at once than the whole cluster can run."""
    processes = max(1, sweep.min_workers)
    each = {
        "CPU": processes,
        "GPU": processes * sweep.gpus_per_worker,
        "trial_driver": min(1, sweep.min_workers),
    }
    if not sweep.gpus_per_worker:
        yield "the trials use no GPU"
    for kind, number in each.items():
        wanted = sweep.search.concurrency * number
        if wanted > have.get(kind, 0):
            yield f"{sweep.search.concurrency} trials want {wanted:g} {kind}, there are {have.get(kind, 0):g}"


def dockerfile_problems(text: str) -> Iterator[str]:
    """Of the image: a linter sees a root user that is named, and not one that comes of naming none."""
    stage = re.split(r"^FROM\b", text, flags=re.MULTILINE)[-1]
    users = re.findall(r"^USER\s+([^\s:]+)", stage, flags=re.MULTILINE)
    if not users or users[-1] in ("0", "root"):
        yield f"the image runs as {users[-1] if users else 'the user of its base, root'}"


def _head_problems(resources: Mapping[str, float]) -> Iterator[str]:
    if resources.get("CPU") != 0:
        yield "the head has CPUs, on which trials would run"
    if not resources.get("trial_driver"):
        yield "the head has no trial_driver"


def _size_problems(name: str, least: int, now: int, most: int) -> Iterator[str]:
    if not 0 <= least <= now <= most:
        yield f"{name}: {least} to {most} workers, now {now}"
    if not 1 <= most <= 64:
        yield f"{name}: at most {most} workers"


def _is_spot(node: Mapping[str, Any]) -> bool:
    config = node["node_config"]
    market = config.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or config.get("scheduling", {}).get("provisioningModel") == "SPOT"


def _image_problems(images: list[str]) -> Iterator[str]:
    for image in images:
        if image != IMAGE:
            yield f"the image is {image}, not {IMAGE}"


def _key_problems(document: Any) -> Iterator[str]:
    if found := KEYS.search(json.dumps(document)):
        yield f"a key instead of a role: {found.group()}"


def _pod_problems(name: str, pod: Mapping[str, Any], accounts: set[str]) -> Iterator[str]:
    (container,) = pod["containers"]
    yield from _image_problems([container["image"]])
    if pod.get("restartPolicy") != "Never":
        yield f"{name}: restartPolicy is not Never; a restarted pod would be another Ray node"
    if pod.get("serviceAccountName") not in accounts:
        yield f"{name}: the file has no service account {pod.get('serviceAccountName')}"
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield f"{name} may run as root"
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounted = {m["mountPath"]: volumes.get(m["name"], {}) for m in container["volumeMounts"]}
    if mounted.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
        yield f"{name} has no shared memory"
    token = next((e["value"] for e in container["env"] if e["name"] == "AWS_WEB_IDENTITY_TOKEN_FILE"), "")
    if "projected" not in mounted.get(token.rpartition("/")[0], {}):
        yield f"{name} has no workload identity"
    if container["resources"]["requests"] != container["resources"]["limits"]:
        yield f"{name} asks for less than it may take, and is evicted first"
