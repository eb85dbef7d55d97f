"""Saves and loads the training state of all ranks: the public interface of this package.

save     save/: each rank copies its part, writes it and votes -> rank 0 commits -> old snapshots are removed
resume   load/: newest commit -> check -> fill the pieces, from any mesh to any mesh; if damaged, the one before
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.load.checkpoint_loader import Check, Loader, Restored
from internlm_lite.checkpoint.save.save_folder import SaveFolder
from internlm_lite.checkpoint.save.saver import SaveOptions, Saver
from internlm_lite.checkpoint.storage.base import Storage, UnreadableError
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.checkpoint.storage.run_lock import Lease, acquire
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError, ConfigError, DamagedError, StorageError
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Mesh

logger = logging.getLogger("internlm_lite")
Accept = Callable[[Found], bool]


class CheckpointManager(Saver, Loader):
    """The checkpoints of a run, in one folder or two. Methods are collective unless stated otherwise."""

    def __init__(
        self,
        folder: str | None,
        mesh: Mesh,
        *,
        snapshot_folder: str | None = None,
        config: Mapping[str, Any] | None = None,
        saving: SaveOptions | None = SaveOptions(),
        s3: S3Config | None = None,
    ) -> None:
        """`snapshot_folder`: folder of the snapshots, None: `folder`; `config`: resolved, without secrets, stored by
        saves and compared by loads; `saving`: None for a read-only manager.

        Unless read-only, raises StorageError if a rank cannot write to a folder or sees another one than rank 0.
        """
        options = saving or SaveOptions()
        if options.keep_snapshots < 2:
            raise ConfigError(f"keep_snapshots={options.keep_snapshots}: expected at least 2, one to fall back to")
        Loader.__init__(self, mesh, config=config, s3=s3)
        storages = [open_storage(where, s3) for where in (folder, snapshot_folder) if where is not None]
        if saving is not None:
            for storage in storages:
                _probe(storage, mesh)
        folders = [
            SaveFolder(storage, options.keep_snapshots, self._bad, keep_milestones=options.keep_milestones)
            for storage in storages
        ]
        Saver.__init__(self, mesh, self._config, folders, options)

    @property
    def storage(self) -> Storage:
        """The storage of the first folder."""
        return self.folders[0].storage

    def lock(self) -> None:
        """Acquire the leases of all folders. Raises StorageError if another run holds one."""
        leases = [Lease(folder.storage) for folder in self.folders]
        for folder, lease in zip(self.folders, leases, strict=True):
            folder.lease = lease  # set before acquiring, so that `release` frees it if a rank is lost meanwhile

        def take() -> None:
            acquire(leases)
            for folder in self.folders:
                folder.clear_abandoned()

        on_main(self.mesh, take)

    def latest(self, accept: Accept = lambda found: True) -> Found | None:
        """The newest undamaged checkpoint of the folders for which `accept` is true on rank 0; None if there is none.

        Raises CheckpointError if there are only damaged ones: the run must not start from scratch by mistake.
        """

        def look() -> Found | None:
            candidates: list[Found] = []
            unusable: CheckpointError | None = None
            for folder in self.folders:
                try:
                    found = catalog.newest(folder.storage, self._bad, accept=accept)
                except CheckpointError as error:  # the other folder may hold a good one
                    unusable = error
                else:
                    candidates += [found] if found is not None else []
            if unusable is not None and not candidates:
                raise unusable
            if unusable is not None:
                logger.warning("%s", unusable)
            return max(candidates, key=lambda found: found.order, default=None)

        return self._agree_on([folder.storage for folder in self.folders], look)

    def resume(
        self,
        pieces: Sequence[LocalShard],
        check: Check | None = None,
        accept: Accept = lambda found: True,
    ) -> Restored | None:
        """Load the newest undamaged checkpoint for which `accept` is true on rank 0; None if there is none.

        `check`: see `load`. If damage is found while loading, the one before is tried. Raises CheckpointError if only
        damaged ones are left, or if the newest is of another model.
        """
        while (found := self.latest(accept)) is not None:
            try:
                return self.load(found, pieces, check)
            except DamagedError as error:
                self._bad[found.name] = str(error)
        return None


def _probe(storage: Storage, mesh: Mesh) -> None:
    """Every rank writes a small object and reads rank 0's; StorageError on all ranks if one fails. Collective."""
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
