"""The save folders of a run, taken before it writes anything: a second run on them is refused with nothing touched."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.manager import CheckpointManager, hold
from internlm_lite.checkpoint.save.saver import Saver
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.config.masking import masked
from internlm_lite.config.paths import spelt_out
from internlm_lite.config.render_config import resolved
from internlm_lite.config.schema import CkptConfig, Config
from internlm_lite.errors import CheckpointError, ConfigError
from internlm_lite.mesh.consensus import on_main
from internlm_lite.mesh.mesh import Mesh

TIMEOUT_SECONDS = 600.0
_PLACES = ("save_ckpt_folder", "snapshot_ckpt_folder")


@dataclass(frozen=True)
class LastRun:
    """Where the newest checkpoint comes from."""

    folder: str
    """Name of the run folder."""
    step: int
    """Steps done."""
    batch_tokens: int
    """Of a step, over all ranks, as the run was begun."""
    data: Mapping[str, Any]
    """That section of its config."""


class SaveFolders:
    """Milestones and snapshots, and the thread that writes both. None: not saved in this run."""

    def __init__(self, config: Config, mesh: Mesh, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Collective. Raises StorageError when a folder cannot be written, or another run holds it.

        `timeout_seconds`: a checkpoint is given up when a rank has not written its part that long after rank 0; one
        that training waits for is given three times as long, less than a collective takes to fail.
        """
        self._ckpt, self._mesh = config.ckpt, mesh
        self.described = masked(resolved(config))
        """The config as it is stored and compared."""
        self.in_background = self._ckpt.async_upload and self._ckpt.enable_save_ckpt
        staging = self._ckpt.async_upload_tmp_folder if self.in_background else None
        self.saver = Saver(mesh, self.described, timeout_seconds, Path(spelt_out(staging)) if staging else None)
        self.milestones: CheckpointManager | None = None
        self.snapshots: CheckpointManager | None = None
        if not self._ckpt.enable_save_ckpt:
            return
        try:
            self.milestones = self._open(self._ckpt.save_ckpt_folder, saves=True)
            self.snapshots = self._open(self._ckpt.snapshot_ckpt_folder, saves=True)
            hold(mesh, [manager for manager in (self.milestones, self.snapshots) if manager is not None])
            self._join(self.milestones, self.snapshots)
        except BaseException:
            self.close(wait=False)
            raise

    def _open(self, folder: str | None, saves: bool) -> CheckpointManager | None:
        if folder is None:
            return None
        return CheckpointManager(
            folder,
            self._mesh,
            config=self.described,
            writable=saves,
            saver=self.saver,
            s3=self._ckpt.s3,
        )

    def _join(self, milestones: CheckpointManager | None, snapshots: CheckpointManager | None) -> None:
        """Either resumes from the newest of both. Raises ConfigError for snapshots of a run with other milestones: they
        would be gone on from, and deleted. Collective.
        """
        if milestones and snapshots:
            storage = snapshots.storage
            on_main(self._mesh, lambda: self._check_whose(storage))
            milestones.resume_beside(snapshots)
            snapshots.resume_beside(milestones)

    def _check_whose(self, snapshots: Storage) -> None:
        """Not collective. Where their own folder is another one as well, they were moved here together."""
        for name in catalog.committed(snapshots):
            with suppress(CheckpointError):  # told when it is loaded
                theirs = catalog.inspect(snapshots, name).manifest.config.get("ckpt", {})
                if _same(theirs, self._ckpt, _PLACES[1]) and not _same(theirs, self._ckpt, _PLACES[0]):
                    raise ConfigError(
                        f"ckpt.snapshot_ckpt_folder={self._ckpt.snapshot_ckpt_folder} holds snapshots of the run that "
                        f"saves to {theirs.get(_PLACES[0])}, this one saves to "
                        f"ckpt.save_ckpt_folder={self._ckpt.save_ckpt_folder}: set both folders, or the variable of "
                        "the config that both are made of"
                    )
                return

    def origin(self) -> CheckpointManager | None:
        """Resumes from the newest of both folders, also in a run that saves nothing: which only reads there, and does
        not keep out another run. Collective.
        """
        if self._ckpt.enable_save_ckpt:
            return self.milestones or self.snapshots
        milestones = self._open(self._ckpt.save_ckpt_folder, saves=False)
        snapshots = self._open(self._ckpt.snapshot_ckpt_folder, saves=False)
        self._join(milestones, snapshots)
        return milestones or snapshots

    def last_run(self) -> LastRun | None:
        """The run that wrote the newest checkpoint that looks whole. Not collective.

        None without one, or where it does not say, or when it was saved to other folders: then this is a copy, and the
        run that wrote it may be alive.
        """
        storages = [manager.storage for manager in (self.milestones, self.snapshots) if manager is not None]
        named = [(name, storage) for storage in storages for name in catalog.committed(storage)]
        for name, storage in sorted(named, key=lambda one: one[0], reverse=True):
            try:
                manifest = catalog.inspect(storage, name).manifest
            except CheckpointError:  # told when it is loaded
                continue
            theirs = manifest.config.get("ckpt", {})
            folder, tokens = manifest.state.get("run_folder"), manifest.state.get("batch_tokens")
            if not (isinstance(folder, str) and isinstance(tokens, int)):
                return None
            if not all(_same(theirs, self._ckpt, place) for place in _PLACES):
                return None
            return LastRun(folder, manifest.step, tokens, manifest.config["data"])
        return None

    def close(self, wait: bool) -> None:
        """End the thread, once it is idle or, without `wait`, as soon as it can, and give the folders free.

        Without `wait` a storage that was silent is not asked again: the next run finds that this one is dead. Not
        collective; a second time does nothing.
        """
        self.saver.close(wait)
        for manager in (self.milestones, self.snapshots):
            if manager is not None and (wait or manager.answers):
                manager.release()


def _same(theirs: Mapping[str, Any], ours: CkptConfig, place: str) -> bool:
    """Whether both configs mean the same folder."""
    here, there = getattr(ours, place), theirs.get(place)
    return here == there or (here is not None and there is not None and spelt_out(here) == spelt_out(there))
