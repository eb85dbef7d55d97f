"""Save and load the training state of all ranks: the face of this package. Every method is collective.

save     saver.py: each rank copies its share, writes it and votes -> rank 0 commits -> old snapshots go
resume   newest commit -> check -> fill the pieces, any layout from any layout; if damaged, the one before
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Kind
from internlm_lite.checkpoint.load.loader import Check, Loader, Restored
from internlm_lite.checkpoint.save.saver import Saver
from internlm_lite.checkpoint.save.target import Target
from internlm_lite.checkpoint.storage.base import Storage, UnreadableError
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.checkpoint.storage.run_lock import Lease, acquire
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError, ConfigError, DamagedError, StorageError
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.layout import Piece
from internlm_lite.mesh.mesh import Mesh

logger = logging.getLogger("internlm_lite")
Accept = Callable[[Found], bool]


class CheckpointManager(Loader):
    """Checkpoints of one save folder.

    Construction probes a writable folder on all ranks and raises StorageError before any training is done. `config` is
    the resolved config without secrets; it is stored, and compared on load.
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
        saver: Saver | None = None,
        s3: S3Config | None = None,
    ) -> None:
        """`saver`: shared with the managers of other folders, instead of one of its own."""
        if keep_snapshots < 2:
            raise ConfigError(f"keep_snapshots={keep_snapshots}: expected at least 2, one to fall back to")
        super().__init__(mesh, config=config, s3=s3)
        self.storage = open_storage(folder, s3)
        self._beside: list[CheckpointManager] = []
        if writable:
            _probe(self.storage, mesh)
        self._target = Target(self.storage, keep_snapshots, lease=None, bad=self._bad)
        self._saver = saver or Saver(mesh, self._config, vote_timeout_seconds)
        self._saver.add(self._target)

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
        return self._agree_on(self.storage, lambda: catalog.newest(self.storage, self._bad, accept=accept))

    def resume_beside(self, other: CheckpointManager) -> None:
        """`resume` takes the newest of both folders, which share their `saver`."""
        self._beside.append(other)

    def resume(
        self,
        pieces: Sequence[Piece],
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
                return manager.load(found, pieces, check)
            except DamagedError as error:
                manager._bad[found.name] = str(error)
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


def hold(mesh: Mesh, managers: Sequence[CheckpointManager]) -> None:
    """Take the leases of their folders. Raises StorageError when another run has one of them."""
    leases = [Lease(manager.storage) for manager in managers]
    for manager, lease in zip(managers, leases, strict=True):
        manager._target.lease = lease  # before they are taken: `release` gives them back if the others are lost then
    on_main(mesh, lambda: acquire(leases))


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
