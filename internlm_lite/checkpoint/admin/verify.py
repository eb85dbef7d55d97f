"""Verifies a checkpoint: reads every byte once and compares every checksum, of commit, manifest, votes, headers, each
block of each tensor, each whole file. Reports all damage, by file and tensor, and numbers that are not finite.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from internlm_lite.checkpoint.format.catalog import Found, inspect
from internlm_lite.checkpoint.format.manifest import Manifest, Name, load_with_crc, read_bytes
from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, DTYPES, StoredTensor, read_blocks, read_header
from internlm_lite.checkpoint.load.reader import Reader
from internlm_lite.checkpoint.storage.base import Storage, UnreadableError
from internlm_lite.errors import CheckpointError, DamagedError
from internlm_lite.mesh.layout import is_sound

_READ_BYTES = 16 * BLOCK_BYTES


@dataclass(frozen=True)
class Damage:
    """Something that differs from what was written."""

    file: str
    """`<storage name>/<key>`."""
    tensor: str | None
    """Key of the tensor in the file; None: the file as a whole."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.tensor is None else f"{self.file}: tensor {self.tensor}: {self.what}"


_Expected = tuple[tuple[int, ...], torch.dtype, int | None]
"""A file's tensor as the manifest describes it: (crc32 of each block, dtype, number of elements or None if unknown)."""


def damages_of(storage: Storage, name: Name) -> Iterator[Damage]:
    """All damage of a committed checkpoint. Raises StorageError when the storage fails."""
    reported: str | None = None
    try:
        found = inspect(storage, name)
    except DamagedError as error:
        # Continue if the manifest is readable: it names the tensors that are lost.
        damage = _as_damage(storage, name.folder, error)
        reported = damage.file
        yield damage
        try:
            where = f"{storage.name}/{name.manifest}"
            found = Found(storage, name.folder, load_with_crc(Manifest, read_bytes(storage, name.manifest), where))
        except CheckpointError:
            return
    except CheckpointError as error:
        yield Damage(f"{storage.name}/{name.manifest}", None, str(error))
        return
    yield from (damage for damage in damages_in(found) if damage.file != reported or damage.tensor is not None)


def damages_in(found: Found) -> Iterator[Damage]:
    """All damage of the files in the manifest. Raises StorageError when the storage fails."""
    reader = Reader(found)
    for file in found.manifest.files:
        try:
            reader.check_vote(file)
        except DamagedError as error:
            yield _as_damage(found.storage, found.folder, error)
        yield from _file(found, file)


def _as_damage(storage: Storage, folder: str, error: DamagedError) -> Damage:
    """Extracts the file from the message of `error`."""
    found = re.search(re.escape(storage.name) + r"/[A-Za-z0-9._/-]+", str(error))
    where = found[0].rstrip(".") if found else f"{storage.name}/{folder}"
    return Damage(where, None, _without(str(error), where))


def _file(found: Found, file: str) -> Iterator[Damage]:
    facts, key = found.manifest.files[file], found.key(file)
    where, expected = f"{found.storage.name}/{key}", _expected(found, file)
    try:
        header, raw = read_header(found.storage, key, facts)
    except DamagedError as error:
        # Without the header no tensor of the file can be located.
        yield Damage(where, None, _without(str(error), where))
        yield from (Damage(where, tensor, "lost with its file's header") for tensor in expected)
        return
    yield from (Damage(where, tensor, "is not in the file's header") for tensor in expected.keys() - header.keys())
    sha, good = hashlib.sha256(raw), True
    for tensor, stored in sorted(header.items(), key=lambda item: item[1].start):
        problem = _tensor(found, key, stored, expected.get(tensor), sha)
        if problem is not None:
            good = False
            yield Damage(where, tensor, problem)
    if good and sha.hexdigest() != facts.sha256:
        yield Damage(where, None, f"its sha256 is {sha.hexdigest()[:12]}..., the manifest says {facts.sha256[:12]}...")


def _expected(found: Found, file: str) -> dict[str, _Expected]:
    wanted: dict[str, _Expected] = {
        piece.key: (piece.crc32, DTYPES[entry.dtype], piece.region.count)
        for named in found.manifest.tensors.values()
        for entry in named.values()
        for piece in entry.pieces
        if piece.file == file
    }
    states = (state for private in found.manifest.rank_state for state in private.values() if state.file == file)
    return wanted | {state.key: (state.crc32, torch.uint8, None) for state in states}


def _tensor(found: Found, key: str, stored: StoredTensor, expected: _Expected | None, sha: hashlib._Hash) -> str | None:
    """A description of the damage of a tensor, or None. Adds its bytes to `sha`."""
    if expected is None:
        return "is not in the manifest"
    crc32, dtype, count = expected
    if problem := stored.problem(dtype, count, crc32):
        return problem
    bad: list[int] = []
    sound = True
    buffer = memoryview(bytearray(min(stored.size, _READ_BYTES)))
    for start in range(0, stored.size, _READ_BYTES):
        view, first = buffer[: min(_READ_BYTES, stored.size - start)], start // BLOCK_BYTES
        try:
            now = read_blocks(found.storage, key, stored.start + start, view, crc32[first:])
        except UnreadableError as error:
            return _without(str(error), f"{found.storage.name}/{key}")
        sha.update(view)
        bad += [first + block for block in now]
        if dtype.is_floating_point:
            sound &= bool(is_sound(torch.frombuffer(view, dtype=dtype), non_negative=False))
    if not bad:
        return None if sound else "holds NaN or infinity: the run had diverged when it was saved"
    begin = bad[0] * BLOCK_BYTES
    rest = f" and {len(bad) - 1} more blocks" if len(bad) > 1 else ""
    return f"bytes {begin}..{min(begin + BLOCK_BYTES, stored.size)}{rest} differ from their crc32"


def _without(text: str, where: str) -> str:
    """`text` without the leading file name `where`, which `Damage` contains in a field."""
    return text.removeprefix(where).lstrip(": ") or text
