"""Both tokenised formats: what is written is read, foreign files load, every damage is named."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from internlm_lite.data import internlm, megatron
from internlm_lite.data.folders import open_documents
from internlm_lite.errors import DataError
from tests.data.corpora import random_documents, write_internlm, write_native

DOCUMENTS = random_documents(seed=0, count=20, longest=30, vocab_size=100)
LONGEST = max(range(20), key=lambda i: len(DOCUMENTS[i]))


def _all(documents) -> list[list[int]]:
    return [documents.tokens(i, 0, int(n)).tolist() for i, n in enumerate(documents.lengths)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_native_round_trip(tmp_path, dtype):
    documents = open_documents(write_native(tmp_path / "a.bin", DOCUMENTS, dtype))
    assert _all(documents) == DOCUMENTS
    assert documents.tokens(LONGEST, 2, 5).tolist() == DOCUMENTS[LONGEST][2:5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_internlm_round_trip(tmp_path):
    negative = [[-token for token in tokens[:2]] + tokens[2:] for tokens in DOCUMENTS]
    documents = open_documents(write_internlm(tmp_path / "a.bin", negative))
    assert _all(documents) == negative
    assert documents.tokens(LONGEST, 2, 5).tolist() == negative[LONGEST][2:5]


def test_native_documents_of_several_sequences(tmp_path):
    """Written byte by byte from the format's description: 3 sequences, the first two are one document."""
    tokens = np.arange(10, dtype="<u2")
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    sizes, pointers, boundaries = struct.pack("<3i", 4, 3, 3), struct.pack("<3q", 0, 8, 14), struct.pack("<3q", 0, 2, 3)
    (tmp_path / "a.idx").write_bytes(header + sizes + pointers + boundaries)
    assert _all(open_documents(tmp_path / "a.bin")) == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]]


def test_writer_refuses_ids_outside_dtype(tmp_path):
    with pytest.raises(DataError, match="from 1 to 70000, expected 0 to 65535"):
        write_native(tmp_path / "a.bin", [[1, 70000]], np.uint16)
    assert list(tmp_path.iterdir()) == []


def test_writer_replaces_a_pair(tmp_path):
    write_native(tmp_path / "a.bin", DOCUMENTS)
    assert _all(open_documents(write_native(tmp_path / "a.bin", [[1, 2]]))) == [[1, 2]]


def test_smallest_dtype():
    cases = {(100, True): np.int16, (40_000, False): np.uint16, (40_000, True): np.int32, (103_168, False): np.int32}
    for (vocab_size, signed), dtype in cases.items():
        assert megatron.smallest_dtype(vocab_size, signed=signed) == dtype


def _cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


def _patch(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


SIZES = megatron.HEADER.size
POINTERS = SIZES + 4 * len(DOCUMENTS)
BORDERS = POINTERS + 8 * len(DOCUMENTS)
NATIVE_DAMAGE = {
    "truncated bin": (lambda p: _cut(p / "a.bin", 50), r"a\.bin: found 50 bytes, but a\.idx points to byte"),
    "empty bin": (lambda p: _cut(p / "a.bin", 0), r"a\.bin: found 0 bytes"),
    "longer bin": (lambda p: (p / "a.bin").open("ab").write(b"1234"), r"a\.idx: its sequences do not fill a\.bin"),
    "index past the end": (
        lambda p: _patch(p / "a.idx", BORDERS - 8, struct.pack("<q", 10**9)),
        "points to byte 1000000",
    ),
    "size past the end": (lambda p: _patch(p / "a.idx", POINTERS - 4, struct.pack("<i", 10**6)), "points to byte"),
    "pointer moved": (lambda p: _patch(p / "a.idx", POINTERS + 8, struct.pack("<q", 4)), "do not fill"),
    "negative size": (lambda p: _patch(p / "a.idx", SIZES, struct.pack("<i", -3)), "negative"),
    "boundary past the end": (
        lambda p: _patch(p / "a.idx", BORDERS + 16, struct.pack("<q", 99)),
        "boundaries do not run",
    ),
    "bad magic": (lambda p: _patch(p / "a.idx", 0, b"XXXX"), "found magic"),
    "bad version": (lambda p: _patch(p / "a.idx", 9, struct.pack("<Q", 2)), "version 2"),
    "float tokens": (lambda p: _patch(p / "a.idx", 17, b"\x06"), "found dtype code 6"),
    "unknown dtype": (lambda p: _patch(p / "a.idx", 17, b"\x63"), "found dtype code 99"),
    "wider dtype": (lambda p: _patch(p / "a.idx", 17, b"\x05"), "points to byte"),
    "truncated index": (lambda p: _cut(p / "a.idx", 60), r"a\.idx: found 60 bytes, expected"),
    "empty index": (lambda p: _cut(p / "a.idx", 0), r"a\.idx: found 0 bytes, expected a header"),
    "no index": (lambda p: (p / "a.idx").unlink(), r"a\.bin: found no index, expected a\.idx"),
    "no bin": (lambda p: (p / "a.bin").unlink(), r"a\.bin: missing, although its index is there"),
    "damaged metadata": (lambda p: (p / "a.meta.json").write_text("{"), r"a\.meta\.json: found damaged metadata"),
}


@pytest.mark.parametrize("name", NATIVE_DAMAGE)
def test_native_damage_is_named(tmp_path, name):
    write_native(tmp_path / "a.bin", DOCUMENTS)
    damage, message = NATIVE_DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_documents(tmp_path / "a.bin")


def _save_meta(folder: Path, array: np.ndarray) -> None:
    with open(folder / "a.bin.meta", "wb") as file:
        np.save(file, array)


INTERNLM_DAMAGE = {
    "truncated bin": (lambda p: _cut(p / "a.bin", (p / "a.bin").stat().st_size - 4), r"a\.bin: document 19 .* damage"),
    "bin cut at a line": (lambda p: _cut(p / "a.bin", 40), r"a\.bin\.meta points to byte"),
    "empty bin": (lambda p: _cut(p / "a.bin", 0), r"a\.bin: found 0 bytes"),
    "truncated meta": (
        lambda p: _cut(p / "a.bin.meta", 200),
        r"a\.bin\.meta: found 200 bytes, expected 448 for 20 doc",
    ),
    "no numpy": (lambda p: (p / "a.bin.meta").write_bytes(b"hello"), r"a\.bin\.meta: expected a numpy array"),
    "pickle": (lambda p: _save_meta(p, np.array([{}], dtype=object)), r"a\.bin\.meta: expected a numpy array"),
    "other shape": (
        lambda p: _save_meta(p, np.zeros((3, 3), int)),
        r"expected a numpy array of integers \[documents, 2\]",
    ),
    "falling offsets": (lambda p: _save_meta(p, np.array([[9, 1], [0, 1]])), "offsets do not rise"),
    "another file's meta": (lambda p: _save_meta(p, np.array([[0, 3]])), "expected 3 integers"),
    "floats": (
        lambda p: (p / "a.bin").write_text('{"tokens": [1.5]}') and _save_meta(p, np.array([[0, 1]])),
        "expected 1 integers",
    ),
    "no meta": (lambda p: (p / "a.bin.meta").unlink(), r"a\.bin: found no index"),
}


@pytest.mark.parametrize("name", INTERNLM_DAMAGE)
def test_internlm_damage_is_named(tmp_path, name):
    write_internlm(tmp_path / "a.bin", DOCUMENTS)
    damage, message = INTERNLM_DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_documents(tmp_path / "a.bin")


def test_internlm_index_of_some_lines(tmp_path, monkeypatch):
    """Of the first ones, and with gaps; lines are read to their ends, however long, and not much further."""
    path = write_internlm(tmp_path / "a.bin", [[100_000_000 + token for token in tokens] for tokens in DOCUMENTS])
    meta = np.load(f"{path}.meta")
    _save_meta(tmp_path, meta[1:12:5])
    monkeypatch.setattr(internlm, "USUAL_TOKEN_BYTES", 1)
    documents = open_documents(path)
    assert _all(documents) == [[100_000_000 + token for token in DOCUMENTS[i]] for i in (1, 6, 11)]


def test_internlm_damaged_line(tmp_path):
    path = write_internlm(tmp_path / "a.bin", DOCUMENTS)
    offset = len(json.dumps({"tokens": DOCUMENTS[0]})) + 1
    _patch(path, offset, b"#")
    documents = internlm.InternLMDocuments(path)
    assert documents.tokens(0, 0, 1).tolist() == DOCUMENTS[0][:1]
    with pytest.raises(DataError, match=f"document 1 at byte {offset}"):
        documents.tokens(1, 0, 1)
