"""Reading every byte of a checkpoint once and comparing every check sum: commit, manifest, votes, headers, each block
of each tensor, each whole file. Damage is named by file and tensor; one damage does not hide another.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from internlm_lite.checkpoint.format.catalog import Found, inspect
from internlm_lite.checkpoint.format.manifest import Manifest, Name, load_with_crc, read_bytes, vote_of
from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, DTYPES, StoredTensor, read_header
from internlm_lite.checkpoint.storage.base import Storage, UnreadableError
from internlm_lite.errors import CheckpointError, DamagedError

_READ_BYTES = 16 * BLOCK_BYTES


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written."""

    file: str
    """Whole name, with the storage's."""
    tensor: str | None
    """Its key in the file; None: the file as a whole."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.tensor is None else f"{self.file}: tensor {self.tensor}: {self.what}"


@dataclass(frozen=True)
class _Expected:
    """What the manifest says about a tensor of a file; count None: any number of elements."""

    crc32: tuple[int, ...]
    dtype: torch.dtype
    count: int | None


def damages_of(storage: Storage, name: Name) -> Iterator[Damage]:
    """Everything that is wrong with a committed checkpoint. Raises StorageError when the storage fails."""
    told: str | None = None
    try:
        found = inspect(storage, name)
    except DamagedError as error:
        # The index may still tell which tensors are gone.
        damage = _as_damage(storage, name.folder, error)
        told = damage.file
        yield damage
        try:
            key = f"{storage.name}/{name.manifest}"
            found = Found(storage, name.folder, load_with_crc(Manifest, read_bytes(storage, name.manifest), key))
        except CheckpointError:
            return
    except CheckpointError as error:
        yield Damage(f"{storage.name}/{name.manifest}", None, str(error))
        return
    yield from (damage for damage in damages_in(found) if damage.file != told or damage.tensor is not None)


def damages_in(found: Found) -> Iterator[Damage]:
    """Everything that is wrong with the files that a manifest names."""
    for file in found.manifest.files:
        yield from _vote(found, file)
        yield from _file(found, file)


def _as_damage(storage: Storage, folder: str, error: DamagedError) -> Damage:
    """`error` names its file itself."""
    found = re.search(re.escape(storage.name) + r"/[A-Za-z0-9._/-]+", str(error))
    where = found[0] if found else f"{storage.name}/{folder}"
    return Damage(where, None, _without(str(error), where))


def _vote(found: Found, file: str) -> Iterator[Damage]:
    key = found.key(vote_of(file))
    where = f"{found.storage.name}/{key}"
    try:
        sha256 = hashlib.sha256(read_bytes(found.storage, key)).hexdigest()
    except DamagedError as error:
        yield Damage(where, None, _without(str(error), where))
        return
    if sha256 != found.manifest.files[file].vote_sha256:
        yield Damage(where, None, "its sha256 is not the one in the manifest")


def _file(found: Found, file: str) -> Iterator[Damage]:
    facts, key = found.manifest.files[file], found.key(file)
    where = f"{found.storage.name}/{key}"
    expected = _expected(found, file)
    try:
        header, raw = read_header(found.storage, key, facts.header_bytes, facts.header_crc32, facts.size)
    except DamagedError as error:
        # Without its header nothing in the file can be found.
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
    wanted = {
        piece.key: _Expected(piece.crc32, DTYPES[entry.dtype], piece.region.count)
        for named in found.manifest.tensors.values()
        for entry in named.values()
        for piece in entry.pieces
        if piece.file == file
    }
    states = (state for private in found.manifest.rank_state for state in private.values() if state.file == file)
    return wanted | {state.key: _Expected(state.crc32, torch.uint8, None) for state in states}


def _tensor(found: Found, key: str, stored: StoredTensor, expected: _Expected | None, sha: hashlib._Hash) -> str | None:
    """What is wrong with a tensor's bytes; they are added to `sha`."""
    size = stored.stop - stored.start
    if expected is None:
        return "is not in the manifest"
    count = size // stored.dtype.itemsize if expected.count is None else expected.count
    if stored.dtype != expected.dtype or size != count * stored.dtype.itemsize:
        return f"{stored.dtype} of {size} bytes, the manifest says {expected.dtype} of {count} elements"
    if len(expected.crc32) != -(-size // BLOCK_BYTES):
        return f"the manifest has {len(expected.crc32)} check sums for {size} bytes"
    bad: list[int] = []
    buffer = memoryview(bytearray(min(size, _READ_BYTES)))
    for start in range(0, size, _READ_BYTES):
        view = buffer[: min(_READ_BYTES, size - start)]
        try:
            found.storage.read_into(key, stored.start + start, view)
        except UnreadableError as error:
            return _without(str(error), f"{found.storage.name}/{key}")
        sha.update(view)
        for begin in range(0, len(view), BLOCK_BYTES):
            block = (start + begin) // BLOCK_BYTES
            if zlib.crc32(view[begin : begin + BLOCK_BYTES]) != expected.crc32[block]:
                bad.append(block)
    if not bad:
        return None
    first = bad[0] * BLOCK_BYTES
    rest = f" and {len(bad) - 1} more blocks" if len(bad) > 1 else ""
    return f"bytes {first}..{min(first + BLOCK_BYTES, size)}{rest} differ from their crc32"


def _without(text: str, where: str) -> str:
    """A message without the name that `Damage` shows already."""
    return text.removeprefix(where).lstrip(": ") or text
