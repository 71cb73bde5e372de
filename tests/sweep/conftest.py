"""Ray in the test's own process."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from clippo.config import SweepConfig
from clippo.sweep.cluster import joined_ray


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A Ray for the tests of one file, started as a sweep starts it."""
    with joined_ray(SweepConfig(workers=2)):
        yield


@pytest.fixture
def other_ray() -> Iterator[None]:
    """Another Ray on this machine, as somebody else's sweep has one."""
    program = (
        "import ray; ray.init('local', num_cpus=0, include_dashboard=False); print('up', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        yield
        other.communicate(b"\n")
