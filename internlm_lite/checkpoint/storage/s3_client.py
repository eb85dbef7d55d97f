"""The boto3 client of one checkpoint folder: endpoint, credentials, timeouts, checksums; without boto3's retries."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import boto3
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError
from botocore.session import get_session
from botocore.utils import parse_timestamp

from internlm_lite.config.paths import S3Path
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import ConfigError, MissingPackageError

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
"""Longest time without data within an answer."""
_OLDEST = (1, 36)
_CONNECTIONS = 16


def connect(path: S3Path, settings: S3Config) -> tuple[Any, tuple[str, ...]]:
    """(client for `path`; secrets that messages must not show). Credentials come from boto3's default chain.

    Sends nothing to the server. Raises ConfigError if boto3 refuses the settings, MissingPackageError if it is too old.
    """
    if tuple(int(part) for part in boto3.__version__.split(".")[:2]) < _OLDEST:
        raise MissingPackageError(
            f"found boto3 {boto3.__version__}, expected {'.'.join(map(str, _OLDEST))} or newer: "
            "pip install --upgrade internlm_lite[s3]"
        )
    # At DEBUG botocore logs signed requests, including session tokens.
    logging.getLogger("botocore").setLevel(max(logging.INFO, logging.getLogger("botocore").level))
    config = ClientConfig(
        connect_timeout=min(CONNECT_SECONDS, settings.deadline_seconds),
        read_timeout=min(READ_SECONDS, settings.deadline_seconds),
        retries={"total_max_attempts": 1, "mode": "standard"},  # s3_retry.py retries until a deadline
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        s3={"addressing_style": settings.addressing},
        request_checksum_calculation="when_supported" if settings.checksums == "crc32" else "when_required",
        response_checksum_validation="when_required",  # the reader verifies every block's crc32
    )
    scheme = "http" if settings.insecure else "https"
    try:
        core = get_session()
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_date)
        session = boto3.session.Session(botocore_session=core)
        client = session.client(
            "s3",
            config=config,
            use_ssl=not settings.insecure,
            endpoint_url=None if path.endpoint is None else f"{scheme}://{path.endpoint}",
        )
        secrets = _secrets(session)
    except (BotoCoreError, ValueError) as error:
        failure = (
            f"{path}: boto3 refuses its settings ({type(error).__name__}); check the AWS_* variables, ~/.aws; "
            "AWS_ENDPOINT_URL is http(s)://HOST[:PORT]"
        )
    else:
        # Older servers require this header on a batch delete, but newer boto3 does not send it.
        client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
        client.meta.events.register("before-call.s3.HeadBucket", _no_region)
        return client, secrets
    raise ConfigError(failure)


def _secrets(session: Any) -> tuple[str, ...]:
    found = session.get_credentials()
    if found is None:
        return ()
    frozen = found.get_frozen_credentials()
    return tuple(text for text in (frozen.access_key, frozen.secret_key, frozen.token) if text)


def md5_header(data: bytes | bytearray | memoryview) -> str:
    """Value of the header Content-MD5 for a body."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _add_md5(params: Mapping[str, Any], **_: object) -> None:
    params["headers"]["Content-MD5"] = md5_header(params["body"])


def _no_region(**_: object) -> tuple[Any, dict[str, Any]]:
    """In place of an answer: boto3 asks for the bucket's region when it is redirected, and again when this is, too."""
    return SimpleNamespace(status_code=200), {"ResponseMetadata": {"HTTPHeaders": {}}}


def _date(text: Any) -> datetime:
    """A date of an answer; now, if it is none: then nothing is removed for its age."""
    with suppress(ValueError, TypeError, OverflowError, RuntimeError):
        date = parse_timestamp(text)
        date.timestamp()
        return date
    return datetime.now(timezone.utc)
