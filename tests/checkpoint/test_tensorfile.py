"""Our safetensors files against the safetensors library, and against hostile headers."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, DTYPES, TensorFile, parse_header, read_header
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.errors import CheckpointError, DamagedError


def _tensors() -> dict[str, torch.Tensor]:
    tensors = {f"kind/{name}": torch.arange(11).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "strided": torch.randn(6, 4).t(),
        "large": torch.randn(BLOCK_BYTES // 4 + 5),
    }


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    tensors = _tensors()
    stream = TensorFile(tensors)
    LocalStorage(tmp_path).put("a.safetensors", stream)
    path = tmp_path / "a.safetensors"
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor) and loaded[key].dtype == tensor.dtype, key
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "writer": "internlm_lite"}


def test_facts_are_those_of_the_file_on_every_pass(tmp_path: Path) -> None:
    tensors = _tensors()
    stream = TensorFile(tensors)
    first = b"".join(stream)
    before = stream.facts
    assert b"".join(stream) == first and stream.facts == before is not None
    assert before.size == len(first) and before.sha256 == hashlib.sha256(first).hexdigest()
    assert before.header_crc32 == zlib.crc32(first[: before.header_bytes])
    large = tensors["large"].numpy().tobytes()
    assert stream.crc32["large"] == (zlib.crc32(large[:BLOCK_BYTES]), zlib.crc32(large[BLOCK_BYTES:]))
    for key, stored in parse_header(first[: before.header_bytes], len(first)).items():
        assert stored.start % stored.dtype.itemsize == 0, key


def test_read_header_gives_back_shapes_and_places(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    stream = TensorFile(_tensors())
    storage.put("a.safetensors", stream)
    facts = stream.facts
    assert facts is not None
    found, raw = read_header(storage, "a.safetensors", facts)
    assert found["strided"].shape == (4, 6) and found["kind/BF16"].dtype == torch.bfloat16
    assert storage.read("a.safetensors", facts.size).startswith(raw) and len(raw) == facts.header_bytes
    with pytest.raises(DamagedError, match=r"a\.safetensors: header: crc32"):
        read_header(storage, "a.safetensors", facts.model_copy(update={"header_crc32": facts.header_crc32 ^ 1}))
    with pytest.raises(DamagedError, match="a header of"):
        read_header(storage, "a.safetensors", facts.model_copy(update={"header_bytes": 1 << 40}))


def _raw(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"[]",
        b'{"a":1}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        _entry(dtype="F3"),
        _entry(dtype=["F32"]),
        _entry(shape=[-2]),
        _entry(shape=[True, 2]),
        _entry(shape=[2.0]),
        _entry(shape="2"),
        _entry(shape=[3]),
        _entry(shape=[2**62, 4]),
        _entry(data_offsets=[0, 8, 16]),
        _entry(data_offsets=[4, 12]),
        _entry(data_offsets=[8, 0]),
        _entry(data_offsets=None),
        _entry(more=1),
        _entry() | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        _entry() | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}},
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_hostile_headers_are_refused(header: Any) -> None:
    raw = _raw(header)
    with pytest.raises(ValueError):
        parse_header(raw, len(raw) + 8)


def test_wrong_length_field_and_size_are_refused() -> None:
    raw = _raw(_entry())
    assert parse_header(raw, len(raw) + 8)["a"].stop == len(raw) + 8
    with pytest.raises(ValueError, match="length field"):
        parse_header((2**63).to_bytes(8, "little") + raw[8:], len(raw) + 8)
    with pytest.raises(ValueError, match="expected the file's size"):
        parse_header(raw, len(raw) + 9)


def test_dtypes_the_format_does_not_know_are_refused() -> None:
    with pytest.raises(CheckpointError, match="complex64"):
        TensorFile({"a": torch.zeros(1, dtype=torch.complex64)})
