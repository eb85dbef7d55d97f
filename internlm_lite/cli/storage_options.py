"""Settings of S3 on the command line of a tool, which has no config file: `insecure=True addressing=path`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from internlm_lite.config.overrides import parse_overrides
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import ConfigError


def s3_settings(texts: Sequence[str]) -> S3Config:
    """The keys of ckpt.s3. Raises ConfigError."""
    values = parse_overrides([f"ckpt.s3.{text}" for text in texts]).layer.values
    try:
        return S3Config.model_validate(values.get("ckpt", {}).get("s3", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--s3 {key}: {first['msg']}; expected keys: {', '.join(S3Config.model_fields)}") from None
