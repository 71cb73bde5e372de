"""An autoscaling cluster at rest: what ``clippo doctor`` checks of it, and what a sweep there may ask for."""

import re

import pytest

from tests.conftest import S3Server
from tests.integration.nodes import RayCluster, ray_cluster
from tests.integration.test_elastic import awaited
from tests.test_doctor import findings

pytestmark = pytest.mark.timeout(600)

AT_REST = ["--autoscaling", "--no-probe-trial", "--concurrency"]


def rows(cluster: RayCluster, *flags: str) -> tuple[int, dict[str, tuple[str, str]], str]:
    """The doctor's status, its findings without the columns' padding, and all that was printed."""
    done = cluster.doctor(*flags)
    printed = done.stdout + done.stderr
    code = re.search(r"exit code (\d+)", printed)
    return int(code[1]) if code else done.returncode, findings(done.stdout), printed


def test_the_doctor_has_a_worker_come_and_checks_it(s3_env: S3Server) -> None:
    results = ("--results", f"s3://{s3_env.bucket}/rest")
    with ray_cluster(s3_env, autoscaled=True) as cluster:
        assert cluster.workers() == 0
        status, found, printed = rows(cluster, *results, "--autoscaling", "--concurrency", "3")
        assert status == 0, printed
        assert "a worker: none is up; waiting for one with 1 CPU, at most 600 s" in printed
        assert re.fullmatch(r"one with 1 CPU came up in \d+ s", found["a worker"][1])
        assert found["resources"] == ("ok", "3 trials at once x 1 CPU = 3 of 0 now, at most 3")
        for check in ("versions on", "seen from"):  # of the head and of the worker, which has its address
            assert len(re.findall(rf"^ *{check} \S+ +ok ", printed, re.MULTILINE)) == 2, printed
        assert [name for name in found if name.startswith("memory of")], (
            "of the worker; the head trains nothing"
        )
        assert "for 5 trials" in found["the sweep"][1]

        refused = cluster.submit_installed(*results, "--autoscaling", "--search.concurrency", "5")
        printed = refused.stdout + refused.stderr
        assert "error: 5 trials at once x 1 CPU are 5 CPU, the cluster may grow to 3; lower" in printed
        assert "exit code 2" in printed
        assert "Traceback" not in printed

        awaited(lambda: cluster.workers() == 0 or None, cluster, "")
        # None comes so soon; it is told before the one that was asked for is there.
        status, found, printed = rows(cluster, *results, *AT_REST, "3", "--worker-wait", "0.1")
        assert status == 2, printed
        state, detail = found["a worker"]
        assert state == "problem"
        assert (
            "no worker with 1 CPU came up in 0.1 s: nothing of workers was checked; see `ray status`"
            in detail
        )
        assert [name for name, (state, _) in found.items() if state == "problem"] == ["a worker"]


def test_no_worker_can_come(s3_env: S3Server) -> None:
    """Neither where the autoscaler may add none, which is told at once, nor where nobody adds one."""
    results = ("--results", f"s3://{s3_env.bucket}/none")
    with ray_cluster(s3_env, autoscaled=True, most=0) as cluster:
        status, found, printed = rows(cluster, *results, *AT_REST, "1")
        assert status == 2, printed
        problems = {name: detail for name, (state, detail) in found.items() if state == "problem"}
        assert problems.pop("a worker").startswith(
            "the cluster may add none with 1 CPU: nothing of workers was"
        )
        assert "1 CPU, the cluster may grow to 0; lower" in problems.pop("resources")
        assert not problems

        status, found, printed = rows(cluster, *results, "--no-probe-trial", "--concurrency", "1")
        assert status == 2, printed
        state, detail = found["resources"]
        assert state == "problem"
        assert "1 trials at once x 1 CPU are 1 CPU, the cluster has 0; " in detail
        assert "--autoscaling where the cluster does so itself" in detail
