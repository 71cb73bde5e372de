"""A Ray cluster that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.conftest import S3Server
from tests.integration.nodes import RayCluster, ray_cluster


@pytest.fixture(scope="session")
def cluster(s3_server: S3Server) -> Iterator[RayCluster]:
    """A head and one worker node of two CPUs."""
    with ray_cluster(s3_server) as started:
        started.add_node()
        yield started
