"""Machines in trouble: the sweep goes on, or says in one line what is wrong."""

import os
import signal
import time
from pathlib import Path

import pytest

from clippo.results import ResultStore
from tests.conftest import SMALL_SWEEP, S3Server
from tests.integration.nodes import RayCluster
from tests.integration.test_elastic import awaited, state_of
from tests.integration.test_node_loss import followed

pytestmark = pytest.mark.timeout(1200)

FILLER = """
import time
import numpy as np, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=0, resources={"small": 1e-3})
def fill(): return [ray.put(np.ones(4_000_000, np.uint8)) for _ in range(40)]
kept = ray.get(fill.remote())
print("full", flush=True)
time.sleep(600)
"""


def prepare(cluster: RayCluster, results: str) -> None:
    """Builds the set on the machines that there are, if no sweep has."""
    command = ("python", "-m", "clippo", "prepare", "--results", results, *SMALL_SWEEP[:4])
    done = cluster.ray("job", "submit", "--working-dir", ".", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_a_worker_that_is_slow_is_waited_for_and_one_that_stands_still_is_replaced(
    cluster: RayCluster, s3_env: S3Server
) -> None:
    results, job = f"s3://{s3_env.bucket}/jobs", "clippo-still"
    flags = ["--results", results, "--name", "still", "--workers", "2", "--worker-timeout", "12"]
    flags += ["--search.epochs", "20", "20"]
    assert cluster.submit(*flags, options=("--submission-id", job, "--no-wait")).returncode == 0

    def epochs() -> int:
        return len((state_of(s3_env, "still") or {"reports": []})["reports"])

    awaited(lambda: epochs() or None, cluster, job)
    (first, second) = (actor["pid"] for actor in cluster.actors("RayTrainWorker"))
    os.kill(first, signal.SIGSTOP)
    time.sleep(4)
    os.kill(first, signal.SIGCONT)
    before = epochs()
    awaited(lambda: epochs() > before or None, cluster, job)
    assert {a["pid"] for a in cluster.actors("RayTrainWorker")} == {first, second}, "it was waited for"
    os.kill(second, signal.SIGSTOP)
    ended = followed(cluster, job)
    assert "succeeded" in ended.stdout + ended.stderr, ended.stdout
    (trial,) = (t for t in ResultStore(results).trials("still").to_pylist() if t["trial_id"] == "00000")
    assert (trial["status"], trial["preemptions"]) == ("completed", 1)
    assert not Path(f"/proc/{second}").exists(), "what stood still does not stay"


@pytest.mark.soak
def test_a_machine_without_the_prepared_set_and_with_a_full_object_store(
    cluster: RayCluster, s3_env: S3Server, tmp_path: Path
) -> None:
    results, cache = f"s3://{s3_env.bucket}/jobs", tmp_path / "cache"
    prepare(cluster, results)
    store = "--object-store-memory=80000000"  # of which Ray wants 75 MB at the least
    cluster.add_node(2, store, '--resources={"small": 1}', CLIPPO_CACHE=str(cache))
    awaited(lambda: len(cluster.nodes()) == 2 or None, cluster, "")
    cluster.lose_node(oldest=True)
    filling = ("--submission-id", "filler", "--no-wait")
    cluster.ray("job", "submit", *filling, "--", "python", "-c", f"exec({FILLER!r})")
    try:
        awaited(lambda: "full" in cluster.ray("job", "logs", "filler").stdout or None, cluster, "filler")
        done = cluster.submit("--results", results, "--name", "full")
    finally:
        cluster.ray("job", "stop", "filler")
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = {t["trial_id"]: t["status"] for t in ResultStore(results).trials("full").to_pylist()}
    assert statuses == {"reference": "completed", "00000": "completed"}
    assert list(cache.glob("prepared/*/manifest.json")), "the trial had it"
    assert not list(cache.glob("prepared/*/shards")), "it was fetched: whoever builds it notes each shard"


def test_a_machine_that_cannot_keep_the_prepared_set_says_so(
    cluster: RayCluster, s3_env: S3Server, tmp_path: Path
) -> None:
    results, name = f"s3://{s3_env.bucket}/jobs", "no-cache"
    prepare(cluster, results)
    (tmp_path / "file").touch()
    cluster.add_node(2, CLIPPO_CACHE=str(tmp_path / "file"))
    awaited(lambda: len(cluster.nodes()) == 2 or None, cluster, "")
    cluster.lose_node(oldest=True)
    try:
        done = cluster.submit("--results", results, "--name", name)
    finally:
        cluster.add_node()
        awaited(lambda: len(cluster.nodes()) == 2 or None, cluster, "")
        cluster.lose_node(oldest=True)
    assert done.returncode == 1, done.stdout + done.stderr
    said = f"error: trial 00000 could not go on: cannot write to {tmp_path}/file/prepared of "
    assert said in done.stdout, done.stdout
    rows = ResultStore(results).trials(name).to_pylist()
    assert [t["trial_id"] for t in rows] == ["reference"], "the trial can go on where there is room"
