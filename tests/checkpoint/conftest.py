"""Checkpoint tests flush files thousands of times: they run in memory where there is a memory file system."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3faults import FaultProxy
from tests.s3server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, missing_parts

_MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of this test's own."""
    if not os.access(_MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("checkpoint")
        return
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests, each in folders of its own."""
    reason = missing_parts()
    if reason:
        pytest.skip(reason)
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        server.make_bucket()
        yield server
    finally:
        server.kill()


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its credentials in the environment and nothing else of AWS."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "S3_", "BOTO"))]:
        monkeypatch.delenv(name)
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    return s3_process


def s3_environment() -> dict[str, str]:
    """What boto3 finds in the environment of a test."""
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/dev/null")
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    return {**nowhere, **keys, "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def s3_folder(s3_server: S3Server) -> str:
    """A path on the server that no other test uses."""
    return f"boto3:s3://{BUCKET}.{s3_server.endpoint}/{uuid.uuid4().hex}"


@pytest.fixture
def s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port) as proxy:
        yield proxy
