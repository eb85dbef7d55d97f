"""A file that another process appends to, read on from where the last look ended."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from internlm_lite.apps.report.files import open_file

CHUNK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20
"""What is longer is no line; it is handed out in pieces."""
_MARK_BYTES = 64


@dataclass(frozen=True)
class Gain:
    """Whole lines without their breaks. `anew`: the file was replaced or cut, forget what came before."""

    lines: list[bytes]
    anew: bool

    def __bool__(self) -> bool:
        return self.anew or bool(self.lines)

    def then(self, later: Gain) -> Gain:
        """Both as one."""
        return Gain(later.lines if later.anew else self.lines + later.lines, self.anew or later.anew)


class Tail:
    """The whole lines a file gained since it was last asked. A half-written last line is kept until it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._file: tuple[int, int] | None = None
        self._mark = b""  # the bytes before the offset: a file cut and written again has others there

    def read(self) -> Gain:
        """At most about CHUNK_BYTES; nothing for a file that is not there. Raises OSError when it cannot be read."""
        try:
            with open_file(self.path) as file:
                return self._read(file)
        except FileNotFoundError:
            anew = self._offset > 0
            self._offset, self._file, self._mark = 0, None, b""
            return Gain([], anew)

    def _read(self, file: BinaryIO) -> Gain:
        status = os.fstat(file.fileno())
        if self._offset and status.st_size == self._offset and self._file == (status.st_dev, status.st_ino):
            return Gain([], False)
        anew = self._offset > 0 and not self._goes_on(file, status)
        if anew:
            self._offset, self._mark = 0, b""
        self._file = (status.st_dev, status.st_ino)
        file.seek(self._offset)
        data = file.read(CHUNK_BYTES)
        while b"\n" not in data and len(data) < LONGEST_LINE_BYTES and (more := file.read(CHUNK_BYTES)):
            data += more
        end = data.rfind(b"\n") + 1 or (len(data) if len(data) >= LONGEST_LINE_BYTES else 0)
        self._offset += end
        self._mark = (self._mark + data[max(0, end - _MARK_BYTES) : end])[-_MARK_BYTES:]
        return Gain(data[:end].removesuffix(b"\n").split(b"\n") if end else [], anew)

    def _goes_on(self, file: BinaryIO, status: os.stat_result) -> bool:
        if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark
