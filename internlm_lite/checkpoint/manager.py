"""Save and load the training state of all ranks: the face of this package. Every method is collective.

save     saver.py: each rank copies its share, writes it and votes -> rank 0 commits -> old snapshots go
resume   newest commit -> check -> fill the pieces, any layout from any layout; if damaged, the one before
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.checkpoint import find
from internlm_lite.checkpoint.agree import on_all, on_main
from internlm_lite.checkpoint.backends import open_storage
from internlm_lite.checkpoint.find import Found
from internlm_lite.checkpoint.format import Kind, Manifest, seal, unseal
from internlm_lite.checkpoint.lease import Lease
from internlm_lite.checkpoint.load import Reader
from internlm_lite.checkpoint.report import Wanted, load_plan, mismatch
from internlm_lite.checkpoint.saver import Saver
from internlm_lite.checkpoint.share import describe
from internlm_lite.checkpoint.storage import Storage, UnreadableError
from internlm_lite.checkpoint.target import Target
from internlm_lite.checkpoint.tensorfile import DamagedError
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError, ConfigError, StorageError
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Piece
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.units import human_bytes, human_seconds

logger = logging.getLogger("internlm_lite")
Check = Callable[[Found], None]
Accept = Callable[[Found], bool]


@dataclass(frozen=True)
class Restored:
    """What a load gives back besides the filled tensors."""

    found: Found
    state: dict[str, Any]
    """As it was given to `save` on rank 0."""
    rank_state: dict[str, torch.Tensor] | None
    """What this rank gave to `save`; None if fewer ranks saved."""
    missing_roles: tuple[str, ...]
    """Roles the checkpoint does not have: their tensors are untouched."""


class CheckpointManager:
    """Checkpoints of one save folder.

    Construction probes a writable folder on all ranks and raises StorageError before any training is done. `config` is
    the resolved config without secrets; it is stored, and compared on load. `exclusive`: take the folder's lease, and
    raise StorageError when another run has it.
    """

    def __init__(
        self,
        folder: str,
        mesh: Mesh,
        *,
        config: Mapping[str, Any] | None = None,
        keep_snapshots: int = 2,
        vote_timeout_seconds: float = 600.0,
        writable: bool = True,
        exclusive: bool = False,
        saver: Saver | None = None,
        s3: S3Config | None = None,
    ) -> None:
        """`saver`: shared with the managers of other folders, instead of one of its own."""
        if keep_snapshots < 2:
            raise ConfigError(f"keep_snapshots={keep_snapshots}: expected at least 2, one to fall back to")
        self.mesh = mesh
        self._s3 = s3
        self.storage = open_storage(folder, s3)
        self._config = dict(config or {})
        self._beside: list[CheckpointManager] = []
        if writable:
            _probe(self.storage, mesh)
        lease = Lease(self.storage) if exclusive else None
        if lease is not None:
            on_main(mesh, lease.acquire)
        self._target = Target(self.storage, keep_snapshots, lease, bad={})
        self._saver = saver or Saver(mesh, self._config, vote_timeout_seconds)
        self._saver.add(self._target)

    @property
    def layout(self) -> dict[str, int]:
        return self._saver.layout

    def save(
        self,
        step: int,
        kind: Kind,
        pieces: Sequence[Piece],
        state: dict[str, Any],
        rank_state: Mapping[str, torch.Tensor] | None = None,
        *,
        wait: bool = True,
    ) -> str | None:
        """Write a checkpoint and return its name. `state` counts on rank 0; `rank_state`: uint8 tensors, 1-D.

        `wait`: return when it exists, or raise the same StorageError or CheckpointError on all ranks; older ones are
        safe. Else return as soon as the tensors are copied, None if the save before is still under way.
        """
        name = self._saver.save(self._target, step, kind, pieces, state, rank_state or {}, wait)
        return None if name is None else str(name)

    def release(self) -> None:
        """Give the folder free for another run. Not collective."""
        if self._target.lease is not None:
            self._target.lease.release()

    @property
    def answers(self) -> bool:
        """False: the last save met a storage that stayed silent. Not collective."""
        return self._target.answers

    def latest(self, accept: Accept = lambda found: True) -> Found | None:
        """The newest checkpoint that looks whole, None if nothing was ever committed here that rank 0 accepts.

        Raises CheckpointError when there are only damaged ones: a folder with checkpoints is never taken for empty.
        """
        return self._agree_on(self.storage, lambda: find.newest(self.storage, self._target.bad, accept=accept))

    def open(self, path: str) -> Found:
        """The checkpoint at `path`: a save folder (its newest good one), `.../commits/NAME.json`, `.../data/NAME`, or a
        copy of such a data folder. Raises CheckpointError if there is none, or it is damaged.
        """
        root, name = on_main(self.mesh, lambda: find.locate(path, self._s3))
        storage = open_storage(root, self._s3)
        found = self._agree_on(storage, lambda: find.open_at(storage, name, self._target.bad))
        assert found is not None
        return found

    def load_at(self, path: str, pieces: Sequence[Piece], check: Check | None = None) -> Restored:
        """`open`, then `load`; from a save folder the newest checkpoint that proves good, as `resume` does."""
        while True:
            found = self.open(path)
            try:
                return self.load(found, pieces, check=check)
            except DamagedError as error:
                if not on_main(self.mesh, lambda: find.is_save_folder(path, self._s3)):
                    raise
                self._target.bad[found.name] = str(error)

    def load(
        self,
        found: Found,
        pieces: Sequence[Piece],
        allow_missing_roles: Collection[str] = (),
        check: Check | None = None,
    ) -> Restored:
        """Fill the pieces' tensors in place, cast to their dtype; roles that no rank asks for are not read.

        `check` may refuse what was found before anything is read, on all ranks alike, by raising CheckpointError.
        Raises the same error on all ranks: CheckpointError with the differing tensors and config keys if the checkpoint
        belongs to another model, DamagedError with file and tensor (the tensors are then partly overwritten).
        """
        if check is not None:
            check(found)
        reader = Reader(found)
        manifest = found.manifest
        wanted = self._wanted(pieces)
        problem = mismatch(found, wanted, allow_missing_roles, self._config)
        if problem:
            raise CheckpointError(problem)
        rank, size = self.mesh.world.rank, self.mesh.world.size

        def read() -> dict[str, torch.Tensor] | None:
            for file in list(manifest.files)[rank::size]:
                reader.check_file(file)
            for piece in pieces:
                describe(piece)
                if piece.role in manifest.tensors:
                    reader.fill(piece)
            return reader.rank_state(rank)

        if self.mesh.is_main:
            states = min(size, len(manifest.rank_state))
            logger.info("%s", load_plan(found, wanted, self.layout, states, self._config))
        begin = time.monotonic()
        private = on_all(self.mesh, read)
        if self.mesh.is_main:
            took = human_seconds(time.monotonic() - begin)
            logger.info("loaded checkpoint %s: %s read by rank 0, %s", found.name, human_bytes(reader.bytes_read), took)
        missing = tuple(role for role in wanted if role not in manifest.tensors)
        return Restored(found, manifest.state, private, missing)

    def resume_beside(self, other: CheckpointManager) -> None:
        """`resume` takes the newest of both folders, which share their `saver`."""
        self._beside.append(other)

    def resume(
        self,
        pieces: Sequence[Piece],
        allow_missing_roles: Collection[str] = (),
        check: Check | None = None,
        accept: Accept = lambda found: True,
    ) -> Restored | None:
        """Load the newest checkpoint that proves good, of this folder and those beside it; None if none was ever
        committed.

        `check` as for `load`; `accept` is asked on rank 0, and others are passed over. A damaged one is reported and
        the one before is tried. Raises CheckpointError if only damaged ones are left, or if the newest belongs to
        another model.
        """
        while (newest := self._newest(accept)) is not None:
            manager, found = newest
            try:
                return manager.load(found, pieces, allow_missing_roles, check)
            except DamagedError as error:
                manager._target.bad[found.name] = str(error)
        return None

    def _newest(self, accept: Accept) -> tuple[CheckpointManager, Found] | None:
        candidates: list[tuple[CheckpointManager, Found]] = []
        unusable: CheckpointError | None = None
        for manager in (self, *self._beside):
            try:
                found = manager.latest(accept)
            except CheckpointError as error:  # the other folder may hold a good one
                unusable = error
                continue
            if found is not None:
                candidates.append((manager, found))
        if unusable is not None and not candidates:
            raise unusable
        if unusable is not None and self.mesh.is_main:
            logger.warning("%s", unusable)
        return max(candidates, key=lambda candidate: candidate[1].order, default=None)

    def _agree_on(self, storage: Storage, look: Any) -> Found | None:
        """What rank 0 finds, on all ranks; manifests travel as they are stored."""

        def pack() -> tuple[str, bytes, tuple[str, ...]] | None:
            found = look()
            return found and (found.folder, seal(found.manifest), found.rejected)

        packed = on_main(self.mesh, pack)
        if packed is None:
            return None
        folder, data, rejected = packed
        return Found(storage, folder, unseal(Manifest, data, storage.name), rejected)

    def _wanted(self, pieces: Sequence[Piece]) -> Wanted:
        """What all ranks together want."""
        mine = {(piece.role, piece.name): tuple(piece.shape) for piece in pieces}
        wanted: dict[str, dict[str, tuple[int, ...]]] = {}
        every: list[Any] = comm.gather_objects(mine, self.mesh.world)
        for theirs in every:
            for (role, name), shape in theirs.items():
                wanted.setdefault(role, {})[name] = shape
        return wanted


def _probe(storage: Storage, mesh: Mesh) -> None:
    """Every rank writes a small object and reads rank 0's: the folder is writable, and the same one for all."""
    word = uuid.uuid4().bytes

    def put(key: str) -> None:
        try:
            storage.put(key, [word])
        except StorageError as error:
            raise StorageError(
                f"{error}; expected a folder that every rank can write: change ckpt.save_ckpt_folder or "
                "ckpt.snapshot_ckpt_folder, or the rights"
            ) from error

    def begin() -> str:
        folder = f"probe-{word.hex()}"
        put(f"{folder}/rank-00000")
        return folder

    folder = on_main(mesh, begin)

    def check() -> None:
        if not mesh.is_main:
            put(f"{folder}/rank-{mesh.rank:05d}")
        try:
            storage.read(f"{folder}/rank-00000", limit_bytes=len(word))
        except UnreadableError as error:
            raise StorageError(
                f"{storage.name} is not one folder for all ranks: what rank 0 wrote there is not seen ({error}); "
                "use a folder on storage that all nodes share"
            ) from error

    try:
        on_all(mesh, check)
    finally:
        if mesh.is_main:
            with suppress(StorageError):
                storage.delete_folder(folder)
