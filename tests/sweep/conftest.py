"""Ray in the test's own process."""

from collections.abc import Iterator

import pytest

from clippo.config import SweepConfig
from clippo.sweep.cluster import joined_ray


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A Ray for the tests of one file, started as a sweep starts it."""
    with joined_ray(SweepConfig(workers=2)):
        yield
