"""Reads a checkpoint into pieces of any mesh. Reads only the blocks that contain wanted elements, and verifies each
block's crc32 before it uses any of its bytes.
"""

from __future__ import annotations

import hashlib
from math import prod

import torch

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import StoredShard, StoredState, read_bytes, vote_of
from internlm_lite.checkpoint.format.read_twice import read_twice
from internlm_lite.checkpoint.format.regions import Region, overlaps
from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, DTYPES, StoredTensor, read_blocks, read_header
from internlm_lite.checkpoint.storage.base import UnreadableError
from internlm_lite.errors import DamagedError
from internlm_lite.mesh.layout import LocalShard


class Reader:
    """Reads one checkpoint. All methods raise DamagedError naming the file and, if one is affected, the tensor."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.bytes_read = 0
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fill(self, piece: LocalShard) -> None:
        """Copy the stored elements to `piece.tensor`, cast to its dtype and moved to its device."""
        entry = self.found.manifest.tensors[piece.role][piece.name]
        wanted = Region(piece.box, piece.flat_range)
        filled = 0
        for stored in entry.pieces:
            views = overlaps(stored.region, wanted)
            if not views:
                continue
            first = min(source.extent[0] for source, _ in views)
            stop = max(source.extent[1] for source, _ in views)
            tensor = self._checked(stored, DTYPES[entry.dtype], stored.region.count)
            memory, first = self._elements(stored, tensor, first, stop)
            for source, target in views:
                target.of(piece.tensor.detach()).copy_(source.of(memory, first))
                filled += prod(source.size)
        if filled != wanted.count:
            raise DamagedError(
                f"{self.found.manifest_path}: {piece.role} of {piece.name}: "
                f"{filled} of the {wanted.count} elements of {wanted} are stored"
            )

    def rank_state(self, rank: int) -> dict[str, torch.Tensor] | None:
        """The uint8 tensors that this rank saved; None if the checkpoint was saved by fewer ranks."""
        saved = self.found.manifest.rank_state
        if rank >= len(saved):
            return None
        return {key: self._whole(state) for key, state in saved[rank].items()}

    def check_file(self, file: str) -> None:
        """Compare a file's header and its vote with the manifest."""
        self._header(file)
        self.check_vote(file)

    @read_twice
    def check_vote(self, file: str) -> None:
        """Compare the vote on a file with the manifest."""
        vote = self.found.key(vote_of(file))
        sha256 = hashlib.sha256(read_bytes(self.found.storage, vote)).hexdigest()
        if sha256 != self.found.manifest.files[file].vote_sha256:
            raise DamagedError(f"{self.found.storage.name}/{vote}: its sha256 is not the one in the manifest")

    def _whole(self, state: StoredState) -> torch.Tensor:
        tensor = self._checked(state, torch.uint8, None)
        count = prod(tensor.shape)
        return self._elements(state, tensor, 0, count)[0].clone() if count else torch.empty(0, dtype=torch.uint8)

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            facts = self.found.manifest.files.get(file)
            if facts is None:
                raise DamagedError(f"{self.found.manifest_path}: no facts about {file}")
            self._headers[file], _ = read_header(self.found.storage, self.found.key(file), facts)
        return self._headers[file]

    def _where(self, piece: StoredShard | StoredState) -> str:
        return f"{self.found.storage.name}/{self.found.key(piece.file)}: tensor {piece.key}"

    def _checked(self, piece: StoredShard | StoredState, dtype: torch.dtype, count: int | None) -> StoredTensor:
        """The header's entry for a tensor, after comparing dtype, size and number of checksums with the manifest."""
        stored = self._header(piece.file).get(piece.key)
        if stored is None:
            raise DamagedError(f"{self._where(piece)} is not in the file's header")
        problem = stored.problem(dtype, count, piece.crc32)
        if problem:
            raise DamagedError(f"{self._where(piece)}: {problem}")
        return stored

    def _elements(
        self, piece: StoredShard | StoredState, stored: StoredTensor, first: int, stop: int
    ) -> tuple[torch.Tensor, int]:
        """Read and verify the blocks with elements first..stop-1 of a stored tensor: (1-D memory, its first element).

        The memory is overwritten by the next call.
        """
        itemsize = stored.dtype.itemsize
        low = first * itemsize // BLOCK_BYTES * BLOCK_BYTES
        high = min(stored.size, -(-stop * itemsize // BLOCK_BYTES) * BLOCK_BYTES)
        if self._buffer.numel() < high - low:
            self._buffer = torch.empty(high - low, dtype=torch.uint8)
        memory = self._buffer[: high - low]
        view, key, crc32 = memory.numpy().data, self.found.key(piece.file), piece.crc32[low // BLOCK_BYTES :]
        try:
            bad = read_blocks(self.found.storage, key, stored.start + low, view, crc32)
        except UnreadableError as error:
            raise DamagedError(f"{self._where(piece)}: {error}") from error
        self.bytes_read += high - low
        for block in bad:
            start = low + block * BLOCK_BYTES
            raise DamagedError(
                f"{self._where(piece)}: damaged in bytes {start}..{min(start + BLOCK_BYTES, stored.size)}: "
                "their crc32 is not the one in the manifest"
            )
        return memory.view(stored.dtype), low // itemsize
