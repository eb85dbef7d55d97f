"""Damaged and hostile tokenised folders, drawn by a seed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from internlm_lite.data.megatron import HEADER
from tests.data.corpora import random_documents, write_internlm, write_native

METADATA = dict.fromkeys(("documents", "tokens", "text_bytes", "longest", "max_token"), 20) | {
    "vocab_size": 500,
    "tokenizer_sha256": "0" * 64,
}
NUMBERS = (-1, 0, 1, 7, 255, 2**15, 2**31 - 1, 2**31, 10**9, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
DTYPES = ("<i8", ">i8", "<i4", "<u8", "|u1", "<f8", "|b1", "<U4", "|O", "|V16", "<M8[s]", "<c16", "nonsense", "<i8,<i8")
SHAPES = ("({n}, 2)", "({n},)", "(2, {n})", "({n}, 2, 1)", "()", "({n}, -2)", "(1.5, 2)", "None", "(" * 50 + ")" * 50)
Draw = random.Random


def write_folder(root: Path) -> Path:
    """A data folder with a file of each format and its metadata; returns it."""
    folder = root / "docs"
    write_native(folder / "a.bin", random_documents(1, 20, 30, 500), np.uint16)
    write_internlm(folder / "b.bin", random_documents(2, 20, 30, 500))
    for name in ("a", "b"):
        (folder / f"{name}.meta.json").write_text(json.dumps(METADATA))
    return folder


def _bytes(draw: Draw, path: Path) -> None:
    """Flip, cut, extend, insert, repeat or blank a part."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice((1, 1, 2, 8, 100)))
    noise = draw.randbytes(stop - start)
    content = draw.choice(
        (
            content[:start] + noise + content[stop:],
            content[:start] + bytes([content[start] ^ 1 << draw.randrange(8)]) + content[start + 1 :],
            content[:start],
            content + noise,
            content[:start] + noise + content[start:],
            content[:stop] + content[start:],
            content[:start] + bytes(stop - start) + content[stop:],
            content.replace(b"\n", b"\r\n"),
        )
    )
    path.write_bytes(content)


def _other_kind(draw: Draw, path: Path) -> None:
    """A folder, FIFO, device, loop of links or nothing in place of the file."""
    path.unlink()
    draw.choice(
        (
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to(draw.choice(("/dev/zero", "/dev/null", "/dev/stdin"))),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("."),
            lambda: None,
        )
    )()


def _foreign_content(draw: Draw, path: Path) -> None:
    """A file of another program."""
    archive = io.BytesIO()
    np.savez(archive, meta=np.zeros((3, 2), np.int64))
    path.write_bytes(
        draw.choice(
            (
                archive.getvalue(),
                pickle.dumps({"tokens": [1, 2]}),
                pickle.dumps(_Unpickled(path.parent / "unpickled")),
                b"TNTIDX\0\0" + struct.pack("<5Q", 1, 4, 2, 20, 20),
                b"PAR1" + bytes(100),
                b"\x1f\x8b\x08" + bytes(50),
                b"<!DOCTYPE html><html>404</html>",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                b"",
            )
        )
    )


class _Unpickled:
    """Makes a file when it is unpickled, which nothing may do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def _index_header(draw: Draw, path: Path) -> None:
    values = list(HEADER.unpack_from(content := bytearray(path.read_bytes())))
    field = draw.randrange(1, 5)
    values[field] = draw.choice(NUMBERS) % (256 if field == 2 else 2**64)
    HEADER.pack_into(content, 0, *values)
    path.write_bytes(content)


def _index_entry(draw: Draw, path: Path) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, draw.randrange(HEADER.size, len(content) - 8), draw.choice(NUMBERS) % 2**64)
    path.write_bytes(content)


def _array_header(draw: Draw, path: Path) -> None:
    """An array header that promises more rows, or other types, than there are."""
    shape = draw.choice(SHAPES).format(n=draw.choice(NUMBERS))
    descr = draw.choice(DTYPES)
    header = f"{{'descr': {descr!r}, 'fortran_order': {draw.choice((True, False))}, 'shape': {shape}, }}"
    version = draw.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    length = struct.pack("<H" if version[0] == 1 else "<I", draw.choice((len(header) + 1, len(header) // 2, 9999)))
    path.write_bytes(
        b"\x93NUMPY" + version + length + header.encode() + b"\n" + draw.randbytes(draw.choice((0, 64, 640)))
    )


def _array_values(draw: Draw, path: Path) -> None:
    meta = np.load(path).astype(draw.choice(("<i8", "<u8", ">i4", "<f4", "<f8", "?", "<U9", "<M8[s]")))
    if meta.dtype.kind in "iu":
        row, column = draw.randrange(len(meta)), draw.randrange(2)
        meta[row, column] = draw.choice(NUMBERS) % 2 ** (8 * meta.itemsize - 1)
    meta = draw.choice((meta, meta.T, meta[::-1], meta[:0], meta.reshape(-1), np.repeat(meta, 2, 0), meta[:, :1]))
    with path.open("wb") as file:
        np.save(file, meta)


def _line(draw: Draw, path: Path) -> None:
    """Another JSON value on one of the lines, of the same length where it is short enough."""
    lines = path.read_bytes().splitlines(keepends=True)
    row = draw.randrange(len(lines))
    value = draw.choice(
        (
            '{"tokens": null}',
            '{"tokens": [1, "2"]}',
            '{"tokens": [1, [2, 3]]}',
            '{"tokens": {"a": 1}}',
            '{"tokens": [1e400, NaN]}',
            '{"tokens": [' + "9" * draw.choice((30, 5000)) + "]}",
            '{"other": [1]}',
            "[" * draw.choice((20, 200_000)),
            '{"tokens": ' * 50_000,
            "null",
            "12",
            '"tokens"',
            '{"tokens": [1],"tokens": [-1]}',
        )
    ).encode()
    lines[row] = value[: len(lines[row]) - 1].ljust(len(lines[row]) - 1) + b"\n" if len(value) < 90 else value + b"\n"
    path.write_bytes(b"".join(lines))
    offsets = np.cumsum([0, *map(len, lines[:-1])])
    if draw.random() < 0.7:  # an index that leads to the line
        lengths = np.load(f"{path}.meta")[:, 1]
        with open(f"{path}.meta", "wb") as file:
            np.save(file, np.stack([offsets, lengths], 1))


def _metadata(draw: Draw, path: Path) -> None:
    value = draw.choice((None, "x", -1, 1.5, True, [], {}, 10**30, 2**63, 499, 501))
    content = json.dumps({**METADATA, draw.choice((*METADATA, "surplus")): value})
    path.write_text(
        draw.choice((content, content, "[" * 100_000, "[]", "null", '"x"', "\ufeff" + content, content[:-1]))
    )


DAMAGES: dict[str, tuple[Callable[[Draw, Path], None], ...]] = {
    "a.bin": (_bytes, _other_kind, _foreign_content),
    "a.idx": (_bytes, _bytes, _index_header, _index_header, _index_entry, _index_entry, _other_kind, _foreign_content),
    "b.bin": (_bytes, _bytes, _line, _line, _line, _other_kind, _foreign_content),
    "b.bin.meta": (_bytes, _array_header, _array_header, _array_values, _array_values, _other_kind, _foreign_content),
    "a.meta.json": (_metadata, _metadata, _other_kind, _foreign_content),
}


LINES = b"".join(b'{"text": "sentence %d, caf\xc3\xa9"}\n' % number for number in range(20))
TEXTS = {
    "a.jsonl": LINES,
    "a.json": b"[" + LINES.strip().replace(b"\n", b",\n") + b"]",
    "a.csv": b'text,n\n"quoted, text",1\nplain,2\n',
    "wide.jsonl": LINES.decode().encode("utf-16"),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.bz2": bz2.compress(LINES),
    "a.txt.xz": lzma.compress(LINES),
}


def write_texts(root: Path) -> Path:
    """A folder of text in several forms; returns it."""
    folder = root / "docs"
    folder.mkdir(parents=True)
    for name, content in TEXTS.items():
        (folder / name).write_bytes(content)
    return folder


def damage(folder: Path, draw: Draw) -> str:
    """Damage one file of what `write_folder` or `write_texts` made; returns what was done."""
    name = draw.choice([path.name for path in sorted(folder.iterdir()) if path.name != "b.meta.json"])
    how = draw.choice(DAMAGES.get(name, (_bytes, _bytes, _bytes, _other_kind, _foreign_content)))
    how(draw, folder / name)
    return f"{how.__name__} {name}"
