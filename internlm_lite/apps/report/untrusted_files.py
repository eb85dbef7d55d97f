"""The files of a run, opened so that nothing in its folder can hold up or swamp a reader."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_FILE_BYTES = 16 << 20
"""Of a file that is read whole."""


def open_file(path: Path) -> BinaryIO:
    """For reading. Raises OSError: not there, not to be read, or no regular file (a pipe may never say anything)."""
    file = open(path, "rb", opener=_non_blocking)  # noqa: SIM115  the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_file(path: Path) -> str:
    """A whole text. Raises OSError, also for one of more than MAX_FILE_BYTES."""
    with open_file(path) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_FILE_BYTES >> 20} MiB", str(path))
    return data.decode("utf-8", "replace")


def printable(path: str | Path) -> str:
    """A path as people and UTF-8 can take it: bytes that are no text become question marks."""
    return os.fsencode(path).decode("utf-8", "replace")


def _non_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
