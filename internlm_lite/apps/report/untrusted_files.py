"""Reads files of a run folder such that no file can block the reader or exhaust its memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from internlm_lite.units import escaped

MAX_FILE_BYTES = 16 << 20
"""Largest file that is read at once."""


def open_file(path: Path) -> BinaryIO:
    """Open for reading. Raises OSError, also if it is no regular file: a pipe might block."""
    file = open(path, "rb", opener=_non_blocking)  # noqa: SIM115  the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_file(path: Path) -> str:
    """The whole text. Raises OSError, also for files larger than MAX_FILE_BYTES."""
    with open_file(path) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_FILE_BYTES >> 20} MiB", str(path))
    return data.decode("utf-8", "replace")


def printable(path: str | Path) -> str:
    """A path for pages and terminals: bytes that are not UTF-8 become replacement characters, control characters
    escapes."""
    return escaped(os.fsencode(path).decode("utf-8", "replace"))


def _non_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
