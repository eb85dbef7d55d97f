"""One spelling for a folder that a user names."""

from __future__ import annotations

import os

from internlm_lite.config.s3path import is_s3, parse_s3


def spelt_out(folder: str) -> str:
    """Equal for two ways to write the same one: `local:`, `..`, `~`, links, and slashes at the end."""
    if is_s3(folder):
        return str(parse_s3(folder) or folder)
    return os.path.realpath(os.path.expanduser(folder.removeprefix("local:")))
