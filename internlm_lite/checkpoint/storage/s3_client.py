"""One boto3 client for one checkpoint folder: where it connects, how it signs, and what it must not do by itself."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError

from internlm_lite.config.paths import S3Path
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import ConfigError, MissingPackageError

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
"""Longest silence of a server while it answers."""
_OLDEST = (1, 36)
_CONNECTIONS = 16


@dataclass(frozen=True)
class Connection:
    """A client, and what it signs with: never to be shown."""

    client: Any
    secrets: tuple[str, ...]

    def __repr__(self) -> str:
        return "Connection(...)"


def connect(path: S3Path, settings: S3Config) -> Connection:
    """A client for `path`; nothing is sent yet. Credentials come from boto3's default chain.

    Raises ConfigError where boto3 refuses the settings, MissingPackageError where it is too old.
    """
    if tuple(int(part) for part in boto3.__version__.split(".")[:2]) < _OLDEST:
        raise MissingPackageError(
            f"found boto3 {boto3.__version__}, expected {'.'.join(map(str, _OLDEST))} or newer: "
            "pip install --upgrade internlm_lite[s3]"
        )
    # At DEBUG botocore logs the requests it signs, session tokens included.
    logging.getLogger("botocore").setLevel(max(logging.INFO, logging.getLogger("botocore").level))
    config = ClientConfig(
        connect_timeout=min(CONNECT_SECONDS, settings.deadline_seconds),
        read_timeout=min(READ_SECONDS, settings.deadline_seconds),
        retries={"total_max_attempts": 1, "mode": "standard"},  # s3calls.py tries again, for longer
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        s3={"addressing_style": settings.addressing},
        request_checksum_calculation="when_supported" if settings.checksums == "crc32" else "when_required",
        response_checksum_validation="when_required",  # every block's crc32 is compared when it is used
    )
    scheme = "http" if settings.insecure else "https"
    try:
        session = boto3.session.Session()
        client = session.client(
            "s3",
            config=config,
            use_ssl=not settings.insecure,
            endpoint_url=None if path.endpoint is None else f"{scheme}://{path.endpoint}",
        )
        secrets = _secrets(session)
    except (BotoCoreError, ValueError) as error:
        failure = f"{path}: boto3 refuses its settings ({type(error).__name__}); check the AWS_* variables, ~/.aws"
    else:
        # Servers older than boto3's check sums ask for this header on a batch delete, and boto3 no longer sends it.
        client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
        return Connection(client, secrets)
    raise ConfigError(failure)


def _secrets(session: Any) -> tuple[str, ...]:
    found = session.get_credentials()
    if found is None:
        return ()
    frozen = found.get_frozen_credentials()
    return tuple(text for text in (frozen.access_key, frozen.secret_key, frozen.token) if text)


def md5_header(data: bytes | bytearray | memoryview) -> str:
    """Content-MD5 of a body."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _add_md5(params: Mapping[str, Any], **_: object) -> None:
    params["headers"]["Content-MD5"] = md5_header(params["body"])
