"""From the folder a user writes in a config to the storage behind it."""

from __future__ import annotations

import re
from pathlib import Path

from internlm_lite.checkpoint.local import LocalStorage
from internlm_lite.checkpoint.storage import Storage
from internlm_lite.errors import ConfigError


def open_storage(where: str) -> Storage:
    """Storage behind `local:PATH`, a plain path, or `boto3:s3://bucket.ENDPOINT/prefix` / `s3://bucket/prefix`."""
    if where.startswith(("boto3:", "s3:")):
        raise ConfigError(
            f"checkpoint folder {where!r}: S3 storage is not built into this version; "
            "use a folder all ranks share, `local:PATH` or a plain path"
        )
    path = where.removeprefix("local:")
    scheme = re.match(r"([A-Za-z0-9+]+)://|([A-Za-z0-9]{2,}):(?!/)", path)
    if not path or scheme:
        raise ConfigError(f"checkpoint folder {where!r}: expected `local:PATH` or a plain path")
    return LocalStorage(Path(path))
