"""S3 over https: a certificate is believed only if its authority is known, and names the host that was asked for."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from internlm_lite.checkpoint.storage.s3 import S3Storage
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import StorageError
from tests.checkpoint.test_s3 import PART, open_s3
from tests.s3faults import FaultProxy
from tests.s3server import BUCKET, S3Server

PATIENT = S3Config(deadline_seconds=60)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(s3_server: S3Server, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine knows the authority, as boto3's users tell it."""
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(file))


@pytest.fixture
def https(s3_server: S3Server, authority: trustme.CA) -> Iterator[FaultProxy]:
    """The real server behind TLS, for the name 127.0.0.1."""
    with FaultProxy(s3_server.port, _certified(authority, "127.0.0.1")) as proxy:
        yield proxy


def _certified(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def _storage(proxy: FaultProxy, folder: str) -> S3Storage:
    return open_s3(f"boto3:s3://{BUCKET}.{proxy.endpoint}/{folder.rpartition('/')[2]}", PATIENT)


@pytest.mark.usefixtures("trusted")
def test_parts_and_ranges_travel_encrypted(https: FaultProxy, s3_folder: str) -> None:
    storage = _storage(https, s3_folder)
    data = bytes(range(256)) * (PART // 128)
    storage.put("data/big", [data])
    read = bytearray(1000)
    storage.read_into("data/big", PART - 500, memoryview(read))
    assert bytes(read) == data[PART - 500 : PART + 500]
    assert storage.put_if_absent("commits/one", b"1") and not storage.put_if_absent("commits/one", b"2")
    assert any("partNumber=2" in request for request in https.seen)


def test_an_unknown_authority_is_refused_at_once(https: FaultProxy, s3_folder: str) -> None:
    with pytest.raises(StorageError, match=r"its certificate is not trusted here \(set AWS_CA_BUNDLE"):
        _storage(https, s3_folder).put("x", [b"1"])
    assert not https.seen


@pytest.mark.usefixtures("trusted")
def test_a_certificate_for_another_host_is_refused(s3_server: S3Server, authority: trustme.CA, s3_folder: str) -> None:
    with FaultProxy(s3_server.port, _certified(authority, "elsewhere.example")) as proxy:
        with pytest.raises(StorageError, match="its certificate is for another host"):
            _storage(proxy, s3_folder).put("x", [b"1"])
        assert not proxy.seen
