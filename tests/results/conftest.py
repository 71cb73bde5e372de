"""Fixtures of the tests that stop their S3 server."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.results.server import OwnS3Server


@pytest.fixture(scope="module")
def _own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnS3Server]:
    server = OwnS3Server(tmp_path_factory.mktemp("own-seaweedfs"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(_own_server: OwnS3Server, monkeypatch: pytest.MonkeyPatch) -> OwnS3Server:
    """A running S3 server that the test may stop, and the environment in which ``s3://`` means it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _own_server.environment().items():
        monkeypatch.setenv(name, value)
    _own_server.wait()  # the test before may have started it anew
    return _own_server


@pytest.fixture
def uri(server: OwnS3Server) -> str:
    """An empty place for results on that server."""
    return f"s3://{server.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which holds the spool."""
    monkeypatch.setenv("CLIPPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
