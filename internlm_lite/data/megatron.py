"""Native tokenised data: Megatron-LM's indexed format, `MMapIndexedDataset`.

    name.bin   the tokens of all sequences, back to back
    name.idx   magic 9s | version u64 | dtype code u8 | sequences u64 | document boundaries u64
               | sizes int32 [sequences] | byte pointers int64 [sequences] | document boundaries int64 [documents + 1]

A document is the range of sequences between two boundaries (megatron/core/datasets/indexed_dataset.py).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from internlm_lite.data.documents import EmptyFileError, read_metadata
from internlm_lite.data.files import TokenFile, file_digest, foreign, require_file
from internlm_lite.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
REPAIR = "tokenise the folder again, or copy both files again"


class MegatronDocuments:
    """`name.bin` + `name.idx`; implements documents.Documents.

    Raises DataError when the files are missing, damaged, or inconsistent.
    """

    def __init__(self, bin_path: Path) -> None:
        self.path = bin_path
        self.index_path = bin_path.with_suffix(".idx")
        self.metadata = read_metadata(bin_path)
        self._dtype, sizes, pointers, boundaries = _read_index(self.index_path)
        self._file = TokenFile(bin_path)
        _check_bin(self._file, self.index_path, self._dtype.itemsize, sizes, pointers)
        cumulated = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=cumulated[1:])
        self.lengths = np.diff(cumulated[boundaries])
        self._starts = cumulated[boundaries[:-1]]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        size = self._dtype.itemsize
        content = self._file.read((int(self._starts[document]) + start) * size, (stop - start) * size)
        return np.frombuffer(content, self._dtype)

    def digest(self) -> str:
        return file_digest(self.index_path)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype of a token, sizes int32 [sequences], byte pointers int64 [sequences], boundaries int64 [documents + 1]."""
    require_file(path)
    n_bytes = path.stat().st_size
    if n_bytes < HEADER.size:
        raise DataError(f"{path}: found {n_bytes} bytes, expected a header of {HEADER.size}; {REPAIR}")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    magic, version, code, sequences, n_boundaries = HEADER.unpack_from(content)
    if magic != MAGIC or version != 1:
        raise DataError(
            f"{path}: found magic {magic!r} version {version}{foreign(magic)}, expected {MAGIC!r} version 1: this is "
            f"no index of Megatron-LM's MMapIndexedDataset; {REPAIR}; in Megatron-LM: --dataset-impl mmap"
        )
    if code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
        raise DataError(f"{path}: found dtype code {code}, expected one of integers: 1, 2, 3, 4, 5, 8; {REPAIR}")
    expected = HEADER.size + 12 * sequences + 8 * n_boundaries
    if n_bytes != expected:
        why = "it is of a multimodal dataset" if n_bytes == expected + sequences else "the index is damaged"
        raise DataError(
            f"{path}: found {n_bytes} bytes, expected {expected} for {sequences} sequences and {n_boundaries} document "
            f"boundaries: {why}; {REPAIR}"
        )
    sizes = np.frombuffer(content, np.int32, sequences, HEADER.size)
    pointers = np.frombuffer(content, np.int64, sequences, HEADER.size + 4 * sequences)
    boundaries = np.frombuffer(content, np.int64, n_boundaries, HEADER.size + 12 * sequences)
    if n_boundaries < 1 or boundaries[0] != 0 or boundaries[-1] != sequences or np.any(np.diff(boundaries) < 0):
        raise DataError(f"{path}: document boundaries do not run from 0 to {sequences}: the index is damaged; {REPAIR}")
    return np.dtype(DTYPES[code]), sizes, pointers, boundaries


def _check_bin(file: TokenFile, index_path: Path, itemsize: int, sizes: np.ndarray, pointers: np.ndarray) -> None:
    """Check that the sequences of the index are adjacent and cover the whole .bin."""
    bin_path, n_bytes = file.path, file.n_bytes
    if n_bytes == 0 or len(sizes) == 0:
        kind = DataError if n_bytes or sizes.any() else EmptyFileError
        raise kind(f"{bin_path}: found {n_bytes} bytes and {len(sizes)} sequences, expected some; {REPAIR}")
    ends = np.cumsum(sizes, dtype=np.int64) * itemsize
    if np.any(sizes < 0) or pointers[0] != 0 or np.any(pointers < 0):
        raise DataError(f"{index_path}: negative sizes or pointers: the index is damaged; {REPAIR}")
    needed = max(int(ends[-1]), int(pointers[-1]) + int(sizes[-1]) * itemsize, int(pointers.max()))
    if needed > n_bytes:
        raise DataError(
            f"{bin_path}: found {n_bytes} bytes, but {index_path.name} points to byte {needed}: the .bin is truncated "
            f"or the index belongs to another file; {REPAIR}"
        )
    if np.any(pointers[1:] != ends[:-1]) or needed != n_bytes:
        raise DataError(
            f"{index_path}: its sequences do not fill {bin_path.name} from byte 0 to byte {n_bytes}: "
            f"the index is damaged or belongs to another file; {REPAIR}"
        )


def smallest_dtype(vocab_size: int, *, signed: bool) -> np.dtype:
    """The narrowest dtype for ids below `vocab_size`; `signed`: prompt tokens are stored negative."""
    if signed:
        return np.dtype(np.int16 if vocab_size <= 1 << 15 else np.int32)
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class MegatronWriter:
    """Writes documents one after another; `close` moves the two files into place. Use it through `writing`."""

    def __init__(self, bin_path: Path, dtype: np.dtype) -> None:
        self._bin_path, self._index_path = bin_path, bin_path.with_suffix(".idx")
        self._dtype = np.dtype(dtype)
        self._code = next(code for code, known in DTYPES.items() if np.dtype(known) == self._dtype)
        self._sizes: list[np.ndarray] = []
        self._file = _temporary(bin_path).open("wb")

    def add(self, tokens: np.ndarray) -> None:
        """Append one document of [n] ids. Raises DataError when an id does not fit the dtype."""
        self.add_many(tokens, np.array([len(tokens)]))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents given back to back, `lengths` [documents] summing to len(tokens)."""
        limits = np.iinfo(self._dtype)
        if len(tokens) and not limits.min <= int(tokens.min()) <= int(tokens.max()) <= limits.max:
            raise DataError(
                f"{self._bin_path}: found token ids from {tokens.min()} to {tokens.max()}, "
                f"expected {limits.min} to {limits.max} of {self._dtype}; use a wider dtype"
            )
        self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._sizes.append(lengths.astype(np.int32))

    def close(self) -> None:
        """Sync and rename both files. The index of an old pair is removed first, so it never describes other tokens."""
        sizes = np.concatenate([np.zeros(0, np.int32), *self._sizes])
        pointers = np.zeros(len(sizes), np.int64)
        np.cumsum(sizes[:-1], out=pointers[1:])
        with _temporary(self._index_path).open("wb") as index:
            index.write(HEADER.pack(MAGIC, 1, self._code, len(sizes), len(sizes) + 1))
            index.write(sizes.data)
            index.write((pointers * self._dtype.itemsize).data)
            index.write(np.arange(len(sizes) + 1, dtype=np.int64).data)
            _sync(index)
        _sync(self._file)
        self._file.close()
        self._index_path.unlink(missing_ok=True)
        _temporary(self._bin_path).replace(self._bin_path)
        _temporary(self._index_path).replace(self._index_path)

    def discard(self) -> None:
        """Remove the temporary files."""
        self._file.close()
        _temporary(self._bin_path).unlink(missing_ok=True)
        _temporary(self._index_path).unlink(missing_ok=True)


@contextmanager
def writing(bin_path: Path, dtype: np.dtype) -> Iterator[MegatronWriter]:
    """A writer whose files are synced and renamed into place when the block ends; nothing is left if it raises."""
    writer = MegatronWriter(bin_path, dtype)
    try:
        yield writer
        writer.close()
    finally:
        writer.discard()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
