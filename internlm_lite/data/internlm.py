"""InternLM's tokenised data: one JSON object a line, and the offset of each line.

    name.bin        {"tokens": [5, -7, 12]}\\n ...     other keys are ignored
    name.bin.meta   numpy array int [documents, 2]: (byte offset of the line, number of tokens)

Lines are decoded when they are read; the native format is the fast one.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from internlm_lite.data.documents import EmptyFileError, read_metadata
from internlm_lite.data.files import TokenFile, file_digest, foreign, require_file
from internlm_lite.errors import DataError

USUAL_TOKEN_BYTES = 8
CACHED_DOCUMENTS = 64
"""Decoded documents kept in the cache: a document longer than a row is read again for each of its rows."""
ARRAY_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\0..|[\x02\x03]\0....)\{'descr': '([<>|][iu][1248]|<f8)', 'fortran_order': (True|False), "
    rb"'shape': \((?:(\d{1,15}), 2|0,)\), \} *\n",
    re.DOTALL,
)
"""What numpy writes before [documents, 2] integers, or before an empty list. numpy's own reader takes whatever Python
expression stands there, and memory for as many rows as it says."""
LONGEST_HEADER = 1 << 12
REPAIR = "tokenise the folder again, or copy both files again"


class InternLMDocuments:
    """`name.bin` + `name.bin.meta`; implements documents.Documents.

    Raises DataError when the files are missing, damaged, or inconsistent; a damaged line inside the file raises it
    only when it is read.
    """

    def __init__(self, bin_path: Path) -> None:
        self.path = bin_path
        self.index_path = bin_path.with_name(bin_path.name + ".meta")
        self.metadata = read_metadata(bin_path)
        self._offsets, self.lengths = _read_meta(self.index_path)
        self._file = TokenFile(bin_path)
        n_bytes = self._file.n_bytes
        if len(self.lengths) == 0 or n_bytes == 0:
            kind = EmptyFileError if len(self.lengths) == n_bytes else DataError
            raise kind(f"{bin_path}: found {n_bytes} bytes and {len(self.lengths)} documents, expected some; {REPAIR}")
        last, n_tokens = int(self._offsets[-1]), self.lengths.sum(dtype=np.float64)  # damaged ones overflow integers
        if last >= n_bytes or n_tokens > n_bytes:
            raise DataError(
                f"{bin_path}: found {n_bytes} bytes, but {self.index_path.name} points to byte {last} and promises "
                f"{n_tokens:.0f} tokens: the .bin is truncated or the .meta belongs to another file; {REPAIR}"
            )
        self._decode = lru_cache(CACHED_DOCUMENTS)(self._read)
        self._decode(len(self.lengths) - 1)  # a truncated file ends in the middle of its last line

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._decode(document)[start:stop]

    def digest(self) -> str:
        return file_digest(self.index_path)

    def _read(self, document: int) -> np.ndarray:
        """[length] int64"""
        start, length = int(self._offsets[document]), int(self.lengths[document])
        line = self._line(start, USUAL_TOKEN_BYTES * (length + 8))
        where = f"{self.path}: document {document} at byte {start}"
        try:
            tokens = np.array(json.loads(line)["tokens"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(
                f'{where}: expected {{"tokens": [...]}} on one line, found damage ({error}); {REPAIR}'
            ) from None
        if tokens.shape != (length,) or (length and tokens.dtype.kind != "i"):
            raise DataError(
                f"{where}: found tokens of shape {list(tokens.shape)} and dtype {tokens.dtype}, "
                f"expected {length} integers as {self.index_path.name} says; {REPAIR}"
            )
        return tokens.astype(np.int64)

    def _line(self, start: int, n_bytes: int) -> bytes:
        """The line at `start`, which usually has not more than `n_bytes`."""
        left = self._file.n_bytes - start
        content = self._file.read(start, min(n_bytes, left))
        line, end, _ = content.partition(b"\n")
        return line if end or n_bytes >= left else self._line(start, 8 * n_bytes)


def _read_meta(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets and lengths, both int64 [documents]."""
    require_file(path)
    with path.open("rb") as file:
        head = file.read(LONGEST_HEADER)
        header = ARRAY_HEADER.match(head)
        if header is None or (header[3] and header[1] == b"<f8"):
            raise DataError(
                f"{path}: expected a numpy array of integers [documents, 2]: (byte offset, number of tokens), "
                f"found {head.partition(chr(10).encode())[0][:120]!r}{foreign(head)}; {REPAIR}"
            )
        dtype, columns_first, rows = np.dtype(header[1].decode()), header[2] == b"True", int(header[3] or 0)
        n_bytes, expected = os.fstat(file.fileno()).st_size, header.end() + rows * 2 * dtype.itemsize
        if n_bytes != expected:
            raise DataError(f"{path}: found {n_bytes} bytes, expected {expected} for {rows} documents; {REPAIR}")
        file.seek(header.end())
        meta = np.fromfile(file, dtype, rows * 2).astype(np.int64)
    offsets, lengths = meta.reshape(2, -1) if columns_first else meta.reshape(-1, 2).T
    if np.any(lengths < 0) or np.any(offsets[:1] < 0) or np.any(np.diff(offsets) <= 0):
        raise DataError(f"{path}: offsets do not rise or a length is negative: the .meta is damaged; {REPAIR}")
    return np.ascontiguousarray(offsets), np.ascontiguousarray(lengths)
