"""A file that another process appends to, read incrementally."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from internlm_lite.apps.report.untrusted_files import open_file

CHUNK_BYTES = 8 << 20
MAX_LINE_BYTES = 64 << 20
"""Longest line in bytes; longer data without a line break are returned in pieces."""
_MARK_BYTES = 64


@dataclass(frozen=True)
class LineDelta:
    """Complete lines without line breaks. `replaced`: the file was replaced or truncated; discard earlier lines."""

    lines: list[bytes]
    replaced: bool

    def __bool__(self) -> bool:
        return self.replaced or bool(self.lines)

    def merged(self, later: LineDelta) -> LineDelta:
        """This delta and a later one, merged."""
        return LineDelta(later.lines if later.replaced else self.lines + later.lines, self.replaced or later.replaced)


class Tail:
    """The complete lines added to a file since the last read. An incomplete last line is left for later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._file: tuple[int, int] | None = None
        self._mark = b""  # bytes before the offset; they change if the file is truncated and rewritten

    def read(self) -> LineDelta:
        """Read about CHUNK_BYTES at most; nothing if the file does not exist. Raises OSError when it cannot be read."""
        try:
            with open_file(self.path) as file:
                return self._read(file)
        except FileNotFoundError:
            replaced = self._offset > 0
            self._offset, self._file, self._mark = 0, None, b""
            return LineDelta([], replaced)

    def _read(self, file: BinaryIO) -> LineDelta:
        status = os.fstat(file.fileno())
        if self._offset and status.st_size == self._offset and self._file == (status.st_dev, status.st_ino):
            return LineDelta([], False)
        replaced = self._offset > 0 and not self._continues(file, status)
        if replaced:
            self._offset, self._mark = 0, b""
        self._file = (status.st_dev, status.st_ino)
        file.seek(self._offset)
        data = file.read(CHUNK_BYTES)
        while b"\n" not in data and len(data) < MAX_LINE_BYTES and (more := file.read(CHUNK_BYTES)):
            data += more
        end = data.rfind(b"\n") + 1 or (len(data) if len(data) >= MAX_LINE_BYTES else 0)
        self._offset += end
        self._mark = (self._mark + data[max(0, end - _MARK_BYTES) : end])[-_MARK_BYTES:]
        return LineDelta(data[:end].removesuffix(b"\n").split(b"\n") if end else [], replaced)

    def _continues(self, file: BinaryIO, status: os.stat_result) -> bool:
        if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark
