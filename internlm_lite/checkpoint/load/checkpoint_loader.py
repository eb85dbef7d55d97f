"""Loads a checkpoint, saved with any mesh, into the tensors of all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Manifest, dump_with_crc, layout_of, load_with_crc
from internlm_lite.checkpoint.format.shards import describe
from internlm_lite.checkpoint.format.weight_roles import Weights, with_weights
from internlm_lite.checkpoint.load.compare import Wanted, load_plan, mismatch, other_function
from internlm_lite.checkpoint.load.locate import is_save_folder, locate, open_at
from internlm_lite.checkpoint.load.reader import Reader
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError, DamagedError
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.layout import LocalShard, first_problem
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.units import human_bytes, human_seconds

logger = logging.getLogger("internlm_lite")
Left = frozenset[tuple[str, str]]
"""(role, name) of tensors."""
Check = Callable[[Found, Wanted], Left]


@dataclass(frozen=True)
class Restored:
    """Result of a load, besides the filled tensors."""

    found: Found
    state: dict[str, Any]
    """The `state` that rank 0 passed to `save`."""
    rank_state: dict[str, torch.Tensor] | None
    """The `rank_state` that this rank passed to `save`; None if fewer ranks saved."""
    absent: frozenset[str] = frozenset()
    """Roles of optional pieces that the checkpoint has not."""
    left: Left = frozenset()
    """Not loaded, because `check` said so: zero now."""


class Loader:
    """The loading half of `CheckpointManager`; remembers checkpoints it found damaged. Every method is collective."""

    def __init__(self, mesh: Mesh, *, config: Mapping[str, Any] | None = None, s3: S3Config | None = None) -> None:
        """`config`: this run's, to compare with the checkpoint's; `s3`: settings for object stores."""
        self.mesh = mesh
        self._config, self._s3 = dict(config or {}), s3
        self._bad: dict[str, str] = {}
        """Name -> reason, for checkpoints found damaged."""

    def open(self, path: str) -> Found:
        """The checkpoint at `path`: a save folder (its newest undamaged one), `.../commits/NAME.json`, `.../data/NAME`,
        or a copy of such a data folder. Raises CheckpointError if there is none, DamagedError if it is damaged."""
        root, name = on_main(self.mesh, lambda: locate(path, self._s3))
        storage = open_storage(root, self._s3)
        found = self._agree_on([storage], lambda: open_at(storage, name, self._bad))
        assert found is not None
        return found

    def load_at(
        self, path: str, pieces: Sequence[LocalShard], check: Check | None = None, *, weights: Weights = "model"
    ) -> Restored:
        """`open`, then `load`. In a save folder, a checkpoint found damaged is skipped for the one before. `weights`:
        what is loaded as masters."""
        while True:
            found = with_weights(self.open(path), weights)
            try:
                return self.load(found, pieces, check=check)
            except DamagedError as error:
                if not on_main(self.mesh, lambda: is_save_folder(path, self._s3)):
                    raise
                self._bad[found.name] = str(error)

    def load(self, found: Found, pieces: Sequence[LocalShard], check: Check | None = None) -> Restored:
        """Fill the pieces' tensors in place, cast to their dtype, except optional ones of a role that the checkpoint
        has not. Roles that no rank requests are not read.

        `check` is called before reading, with what all ranks request; it may raise CheckpointError, and names tensors
        to set to zero instead, the same on all ranks. Raises the same error on all ranks: CheckpointError listing the
        differing tensors and config keys if the checkpoint is of another model, DamagedError naming file and tensor
        (the tensors may then be partly overwritten), also if a number is not finite: such a checkpoint is of a run that
        had diverged.
        """
        reader = Reader(found)
        manifest = found.manifest
        absent = frozenset(one.role for one in pieces if one.optional and one.role not in manifest.tensors)
        pieces = [piece for piece in pieces if piece.role not in absent]
        wanted = self._wanted(pieces)
        left: Left = frozenset() if check is None else check(found, wanted)
        if left:
            zeros = [piece for piece in pieces if (piece.role, piece.name) in left]
            pieces = [piece for piece in pieces if (piece.role, piece.name) not in left]
            wanted = self._wanted(pieces)
            for piece in zeros:
                piece.tensor.zero_()
        problem = mismatch(found, wanted, self._config)
        if problem:
            raise CheckpointError(problem)
        rank, size = self.mesh.world.rank, self.mesh.world.size

        def read() -> dict[str, torch.Tensor] | None:
            for file in list(manifest.files)[rank::size]:
                reader.check_file(file)
            for piece in pieces:
                describe(piece)
                reader.fill(piece)
            if problem := first_problem(pieces):
                raise DamagedError(f"checkpoint {found.name} in {found.storage.name}: {problem}: the run had diverged")
            return reader.rank_state(rank)

        if self.mesh.is_main:
            states = min(size, len(manifest.rank_state))
            for difference in other_function(found, self._config):
                logger.warning("another function of the same weights: %s", difference)
            logger.info("%s", load_plan(found, wanted, layout_of(self.mesh), states, self._config))
        begin = time.monotonic()
        private = on_all(self.mesh, read)
        if self.mesh.is_main:
            took = human_seconds(time.monotonic() - begin)
            logger.info("loaded checkpoint %s: %s read by rank 0, %s", found.name, human_bytes(reader.bytes_read), took)
        return Restored(found, manifest.state, private, absent, left)

    def _agree_on(self, storages: Sequence[Storage], look: Callable[[], Found | None]) -> Found | None:
        """The result of `look` on rank 0, on all ranks; the manifest is broadcast in its stored form."""

        def pack() -> tuple[int, str, bytes, tuple[str, ...]] | None:
            found = look()
            if found is None:
                return None
            return storages.index(found.storage), found.folder, dump_with_crc(found.manifest), found.rejected

        packed = on_main(self.mesh, pack)
        if packed is None:
            return None
        index, folder, data, rejected = packed
        return Found(storages[index], folder, load_with_crc(Manifest, data, storages[index].name), rejected)

    def _wanted(self, pieces: Sequence[LocalShard]) -> Wanted:
        """The tensors that all ranks together request. Collective."""
        mine = {(piece.role, piece.name): tuple(piece.shape) for piece in pieces}
        wanted: dict[str, dict[str, tuple[int, ...]]] = {}
        every: list[Any] = comm.gather_objects(mine, self.mesh.world)
        for theirs in every:
            for (role, name), shape in theirs.items():
                wanted.setdefault(role, {})[name] = shape
        return wanted
