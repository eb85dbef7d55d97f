"""One safetensors file (https://github.com/huggingface/safetensors), written as a stream and read by ranges.

    8 bytes: header length | JSON header: key -> {dtype, shape, data_offsets} | tensor bytes, no gaps

Checksums are computed while the bytes are written: crc32 of the header, crc32 of every BLOCK_BYTES of every tensor (so
that a partial read can verify all bytes it uses), sha256 of the whole file. sha256, the slowest, runs in a separate
thread, one block behind.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from internlm_lite.checkpoint.format.read_twice import read_twice
from internlm_lite.checkpoint.storage.base import Storage, UnreadableError
from internlm_lite.errors import CheckpointError, DamagedError

BLOCK_BYTES = 4 * 1024 * 1024
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class JsonDocument(BaseModel):
    """Base of documents stored as JSON; validation rejects unknown or missing fields and wrong types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileFacts(JsonDocument):
    """Size and checksums of a written file."""

    size: int
    sha256: str
    header_bytes: int
    header_crc32: int


class TensorFile:
    """The file's bytes as an iterable of chunks. A complete iteration sets `facts` and `crc32`; it may be repeated.

    Tensors are copied to the host one at a time; those with wider elements come first, so that all are aligned.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        order = sorted(tensors, key=lambda key: -tensors[key].element_size())
        self._tensors = {key: tensors[key].detach() for key in order}
        self._header = _header(self._tensors)
        self.facts: FileFacts | None = None
        """None before a complete iteration."""
        self.crc32: dict[str, tuple[int, ...]] = {}
        """Key -> crc32 of each BLOCK_BYTES of the tensor."""

    def __iter__(self) -> Iterator[bytes | memoryview]:
        self.facts, self.crc32 = None, {}
        sha = hashlib.sha256()
        yield self._header
        size, header_bytes = len(self._header), len(self._header)
        with ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher:
            hashed: Future[None] = hasher.submit(sha.update, self._header)
            for key, tensor in self._tensors.items():
                checks = []
                for block in self.blocks_of(key, tensor):
                    hashed.result()
                    hashed = hasher.submit(sha.update, block)
                    checks.append(zlib.crc32(block))
                    yield block
                    size += len(block)
                self.crc32[key] = tuple(checks)
            hashed.result()
        header_crc32 = zlib.crc32(self._header)
        self.facts = FileFacts(size=size, sha256=sha.hexdigest(), header_bytes=header_bytes, header_crc32=header_crc32)

    def blocks_of(self, key: str, tensor: torch.Tensor) -> Iterator[bytes | memoryview]:
        """A tensor's bytes in blocks of BLOCK_BYTES. A subclass may compute them on demand."""
        data = _host_bytes(tensor)
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Header length and JSON header, padded with spaces so that the data start at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "writer": "internlm_lite"}}
    offset = 0
    for key, tensor in tensors.items():
        stop = offset + tensor.numel() * tensor.element_size()
        name = DTYPE_NAMES.get(tensor.dtype)
        if name is None:
            raise CheckpointError(f"{key}: tensors of {tensor.dtype} cannot be stored; use one of {[*DTYPE_NAMES]}")
        entries[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `start` and `stop` are byte offsets from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def problem(self, dtype: torch.dtype, count: int | None, crc32: Sequence[int]) -> str | None:
        """A description of a difference from the manifest's values, or None; `count` None: any number of elements."""
        size = self.size if count is None else count * dtype.itemsize
        if self.dtype != dtype or self.size != size:
            return f"{self.dtype} of {self.size} bytes, the manifest says otherwise: {dtype} of {size} bytes"
        if len(crc32) != -(-size // BLOCK_BYTES):
            return f"the manifest says otherwise: {len(crc32)} check sums for {size} bytes"
        return None


def read_blocks(storage: Storage, key: str, start: int, view: memoryview, crc32: Sequence[int]) -> list[int]:
    """Fill `view` with the file's bytes from `start` on; the indices of its blocks whose crc32 differs."""
    bad: list[int] = []

    @read_twice
    def read() -> None:
        storage.read_into(key, start, view)
        blocks = (view[at : at + BLOCK_BYTES] for at in range(0, len(view), BLOCK_BYTES))
        bad[:] = [index for index, block in enumerate(blocks) if zlib.crc32(block) != crc32[index]]
        if bad:
            raise DamagedError(f"{storage.name}/{key}: damaged behind byte {start + bad[0] * BLOCK_BYTES}")

    with suppress(DamagedError):
        read()
    return bad


@read_twice
def read_header(storage: Storage, key: str, facts: FileFacts) -> tuple[dict[str, StoredTensor], bytes]:
    """The verified header of file `key`, and its bytes. Raises DamagedError naming the file; sizes are checked before
    they are used."""
    where, header_bytes, size = f"{storage.name}/{key}", facts.header_bytes, facts.size
    if not 8 < header_bytes <= min(size, _HEADER_LIMIT_BYTES + 8):
        raise DamagedError(f"{where}: a header of {header_bytes} bytes in a file of {size}")
    buffer = bytearray(header_bytes)
    try:
        storage.read_into(key, 0, memoryview(buffer))
    except UnreadableError as error:
        raise DamagedError(str(error)) from error
    raw = bytes(buffer)
    if zlib.crc32(raw) != facts.header_crc32:
        raise DamagedError(f"{where}: header: crc32 is {zlib.crc32(raw):08x}, expected {facts.header_crc32:08x}")
    try:
        return parse_header(raw, size), raw
    except ValueError as error:
        raise DamagedError(f"{where}: header: {error}") from error


def parse_header(raw: bytes, size: int) -> dict[str, StoredTensor]:
    """Key -> tensor, from length field and JSON header of a file of `size` bytes. Raises ValueError if malformed."""
    if int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise ValueError(f"its length field says {int.from_bytes(raw[:8], 'little')}, expected {len(raw) - 8}")
    try:
        entries = json.loads(raw[8:], object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("expected a JSON object")
    entries.pop("__metadata__", None)
    found = {key: _stored_tensor(key, entry, len(raw)) for key, entry in entries.items()}
    end = len(raw)
    for key, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"tensor {key!r} starts at byte {tensor.start}, expected {end}")
        end = tensor.stop
    if end != size:
        raise ValueError(f"the tensors end at byte {end}, expected the file's size {size}")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _stored_tensor(key: str, entry: Any, data_start: int) -> StoredTensor:
    """A validated header entry. Raises ValueError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {key!r}: expected dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if len(numbers) != len(shape) + 2 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"tensor {key!r}: shape and data_offsets must be natural numbers")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {key!r}: dtype {entry['dtype']!r} is none of {[*DTYPES]}")
    if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {key!r}: {offsets[1] - offsets[0]} bytes do not fit shape {shape}")
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
