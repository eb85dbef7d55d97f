"""Opens the storage of a checkpoint folder from the config."""

from __future__ import annotations

import re
from pathlib import Path

from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.config.paths import S3_FORM, S3Path, is_s3, parse_s3, without_password
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import ConfigError, MissingPackageError


def open_storage(where: str, s3: S3Config | None = None) -> Storage:
    """The storage at `local:PATH`, a plain path, or an S3 path, with the settings `s3`. Does not access it.

    Raises ConfigError for other forms, MissingPackageError if boto3 is needed but not installed.
    """
    if is_s3(where):
        path = parse_s3(where)
        if path is None:
            raise ConfigError(f"checkpoint folder {without_password(where)!r}: expected {S3_FORM}")
        return _open_s3(path, s3 or S3Config())
    path_text = where.removeprefix("local:")
    scheme = re.match(r"([A-Za-z0-9+]+)://|([A-Za-z0-9]{2,}):(?!/)", path_text)
    if not path_text or scheme:
        raise ConfigError(
            f"checkpoint folder {without_password(where)!r}: expected `local:PATH`, a plain path, or {S3_FORM}"
        )
    return LocalStorage(Path(path_text))


def _open_s3(path: S3Path, settings: S3Config) -> Storage:
    try:
        from internlm_lite.checkpoint.storage.s3 import S3Storage
    except ModuleNotFoundError as error:
        if error.name not in ("boto3", "botocore", "urllib3"):
            raise
        raise MissingPackageError(
            f"checkpoint folder {path} needs boto3, which is not installed: pip install internlm_lite[s3]"
        ) from error
    return S3Storage(path, settings)
