"""What a sweep takes of a cluster, and why a trial failed."""

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import yaml
from ray import tune
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.train import ControllerError, WorkerGroupError

from clippo.config import SearchConfig, SweepConfig, TrainConfig
from clippo.errors import DivergedError, ResourceError, StoreError
from clippo.sweep import autoscaler, cluster
from clippo.sweep.autoscaler import most_of_workers
from clippo.sweep.cluster import check_resources, joined_ray
from clippo.sweep.trial import ending
from clippo.train.loop import FAILURE, UNFINISHED
from tests.conftest import ROOT


def environment(config: dict[str, Any]) -> None:
    tune.report({"environment": dict(ray.get_runtime_context().runtime_env)})


def test_a_trial_has_no_environment_of_its_own(own_ray: None, tmp_path: Path) -> None:
    """With one, such as Tune's default, it would never get a process that Ray has ready."""
    state = tune.RunConfig(storage_path=str(tmp_path), verbose=0)
    (result,) = tune.Tuner(tune.with_resources(environment, {"cpu": 1}), run_config=state).fit()
    assert result.metrics is not None
    assert not any(result.metrics["environment"].values())


def asking(at_once: int, workers: int, gpus: float = 0.0, autoscaling: bool = False) -> SweepConfig:
    return SweepConfig(
        workers=workers, gpus_per_worker=gpus, autoscaling=autoscaling,
        search=SearchConfig(concurrency=at_once),
    )  # fmt: skip


def test_more_than_there_is_is_refused_with_the_arithmetic(
    own_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture's Ray has the machine's CPUs, no GPU, and room for two drivers."""
    cpus = os.cpu_count() or 1
    assert ray.cluster_resources()["CPU"] == cpus
    check_resources(asking(cpus, workers=0))
    check_resources(asking(1, workers=cpus))
    one_more, twice = cpus + 1, 2 * cpus
    refusals = {
        f"{one_more} trials at once x 1 CPU are {one_more} CPU, the cluster has {cpus};":
            asking(one_more, workers=0),
        f"2 trials at once x {cpus} CPU are {twice} CPU, the cluster has {cpus};": asking(2, workers=cpus),
        "1 trials at once x 0.5 GPU are 0.5 GPU, the cluster has 0;": asking(1, workers=1, gpus=0.5),
        "3 trials at once x 1 trial_driver are 3 trial_driver, the cluster has 2;":
            asking(3, workers=9, gpus=1.0, autoscaling=True),
    }  # fmt: skip
    for arithmetic, config in refusals.items():
        with pytest.raises(ResourceError) as refused:
            check_resources(config)
        assert str(refused.value).startswith(arithmetic)
        on_head = "start its head with --resources='{\"trial_driver\": 3}'"
        remedy = on_head if "trial_driver" in arithmetic else "add nodes"
        assert f"lower search.concurrency or workers, or {remedy}" in str(refused.value)
    check_resources(asking(2, workers=9, gpus=1.0, autoscaling=True))
    # What is known of an autoscaler.
    monkeypatch.setattr(cluster, "most_resources", lambda: {"CPU": 64, "GPU": 4})
    check_resources(asking(2, workers=2, gpus=1.0, autoscaling=True))
    with pytest.raises(
        ResourceError, match="2 trials at once x 9 GPU are 18 GPU, the cluster may grow to 4;"
    ):
        check_resources(asking(2, workers=9, gpus=1.0, autoscaling=True))
    with pytest.raises(ResourceError, match=r"the cluster has 2; .* or start its head with"):
        check_resources(asking(3, workers=1, autoscaling=True))


def configured(max_workers: int, **types: tuple[int, dict[str, float]]) -> AutoscalingConfig:
    """Of a head and other types of nodes: how many there may be, and what one has."""
    file = yaml.safe_load((ROOT / "tests/integration/autoscaling.yaml").read_text())
    head = {"head": {"resources": {"CPU": 64}, "node_config": {}}}
    others = {n: {"max_workers": m, "resources": r, "node_config": {}} for n, (m, r) in types.items()}
    file |= {"max_workers": max_workers, "available_node_types": head | others, "head_node_type": "head"}
    return AutoscalingConfig(file, skip_content_hash=True)


def test_what_workers_may_be_added() -> None:
    small, large = (4, {"CPU": 2}), (2, {"CPU": 16, "GPU": 1})
    assert most_of_workers(configured(6, small=small, large=large)) == {"CPU": 40, "GPU": 2}
    # Of three of any kind, two are large and one is small; and the head's CPUs are not of workers.
    assert most_of_workers(configured(3, small=small, large=large)) == {"CPU": 34, "GPU": 2}
    assert most_of_workers(configured(1, small=small, large=large)) == {"CPU": 16, "GPU": 1}
    assert most_of_workers(configured(0, small=small, large=large)) == {}
    assert most_of_workers(configured(2, own=(2, {}))) is None, "it does not say what these have"


def test_workers_of_the_type_of_the_head() -> None:
    file = yaml.safe_load((ROOT / "tests/integration/autoscaling.yaml").read_text())
    node = {"max_workers": 3, "resources": {"CPU": 8}, "node_config": {}}
    file |= {"max_workers": 3, "available_node_types": {"node": node}, "head_node_type": "node"}
    assert most_of_workers(AutoscalingConfig(file, skip_content_hash=True)) == {"CPU": 24}


@pytest.mark.parametrize("file", ["aws.yaml", "gcp.yaml"])
def test_what_the_launchers_files_may_add(file: str) -> None:
    config = yaml.safe_load((ROOT / "cluster" / file).read_text())
    assert most_of_workers(AutoscalingConfig(config, skip_content_hash=True)) == {"CPU": 64, "GPU": 8}


def test_what_kuberay_may_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest's own numbers, through what Ray makes of the answer of a Kubernetes API."""
    documents = yaml.safe_load_all((ROOT / "cluster/kuberay/rayjob.yaml").read_text())
    (job,) = (document for document in documents if document["kind"] == "RayJob")
    asked = []

    def get(client: KubernetesHttpApiClient, path: str) -> dict[str, Any]:
        asked.append((client._namespace, path))
        return {"metadata": {"name": "made-up", "namespace": "a"}, "spec": job["spec"]["rayClusterSpec"]}

    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    monkeypatch.setattr(autoscaler, "IN_CLUSTER_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_CLUSTER_NAME", "made-up")
    assert autoscaler._of_configured_workers("nobody:1") is None, "no pod"
    (tmp_path / "token").write_text("")
    (tmp_path / "namespace").write_text("a\n")
    most = autoscaler._of_configured_workers("nobody:1")
    assert most is not None
    assert asked == [("a", "rayclusters/made-up")]
    assert (most["CPU"], most["GPU"]) == (8 * 7, 8)


def too_large(kind: str) -> None:
    """Asks for memory that no machine has."""
    if kind == "torch":
        torch.empty(2**60)
    elif kind == "numpy":
        np.empty(2**55)
    elif kind == "python":
        bytearray(2**62)
    else:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


REMEDY = {FAILURE: "out of memory with train.batch_size=48; set train.micro_batch, or use more workers"}


@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "cuda"])
def test_out_of_memory_has_a_remedy_wherever_it_comes_from(kind: str) -> None:
    config = SweepConfig(train=TrainConfig(batch_size=48))
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        too_large(kind)
    assert ending(caught.value, config) == REMEDY
    with pytest.raises(RuntimeError) as wrapped:
        raise RuntimeError("a worker failed") from caught.value
    assert ending(wrapped.value, config) == REMEDY


def test_another_release_of_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    with (
        pytest.raises(ResourceError, match=r"Ray is 2\.61\.0; .* pip install 'ray==2\.60\.\*'"),
        joined_ray(SweepConfig()),
    ):
        pass


def test_out_of_memory_in_another_process(own_ray: None) -> None:
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(ray.remote(too_large).remote("torch"))
    assert ending(caught.value, SweepConfig(train=TrainConfig(batch_size=48))) == REMEDY


def test_other_failures_are_one_line() -> None:
    own = DivergedError("the loss became nan at step 3 of 20; lower the learning rate (1) or beta")
    assert ending(own, SweepConfig()) == {FAILURE: str(own)}
    assert ending(ValueError("first line\nthe last says why"), SweepConfig()) == {
        FAILURE: "ValueError: the last says why"
    }


def test_a_store_is_no_fault_of_the_settings_unless_something_else_is() -> None:
    away, lost = StoreError("cannot write to s3://bucket: no connection"), ControllerError(ValueError())
    lost.controller_failure = away  # as it comes from the controller's process, without a cause
    assert ending(lost, SweepConfig(workers=2)) == {UNFINISHED: str(away)}
    (said,) = ending(away, SweepConfig()).values()
    assert said == f"{away} (the trial ran on {socket.gethostname()})"
    for other in (DivergedError("the loss became nan"), MemoryError()):
        both = WorkerGroupError("two workers failed", {0: away, 1: other})
        assert ending(both, SweepConfig(workers=2)).keys() == {FAILURE}
