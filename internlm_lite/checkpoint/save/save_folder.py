"""A save folder that a run writes to: its state, and the removal of old and unfinished checkpoints.

Errors here are logged and do not fail a save, because the new checkpoint is already committed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.manifest import Kind, Manifest, Name
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.run_lock import Lease

logger = logging.getLogger("internlm_lite")


@dataclass
class SaveFolder:
    """One of the folders that a manager saves to. Its state is maintained on rank 0."""

    storage: Storage
    keep_snapshots: int
    bad: dict[str, str]
    """Name -> reason, for checkpoints found damaged; rotation does not count them as kept."""
    lease: Lease | None = None
    """Set by `lock`; acquired on rank 0."""
    keep_milestones: int | None = None
    """None: all."""
    resumed_from: str | None = None
    """Name of the checkpoint that the run went on from; as a milestone it stays."""
    unfinished: list[Name] = field(default_factory=list)
    """Failed saves whose files may still exist."""
    kinds: dict[Name, Kind] = field(default_factory=dict)
    """Cache of the kinds of commits."""
    reachable: bool = True
    """False: the last save timed out; then the storage is used only to save again."""
    _sweep_at: float = 0.0
    """Time of the next sweep, by time.monotonic()."""

    def clear_unfinished(self, *, newer: bool = False) -> None:
        """Remove the files of failed saves. Call it only while no rank writes to them.

        A failed save that was committed nevertheless is removed only if there is a `newer` checkpoint.
        """
        if not (self.reachable or newer):
            return
        try:
            for name in list(self.unfinished):
                if newer or self.storage.size(name.commit) is None:
                    catalog.remove(self.storage, name)
                    self.unfinished.remove(name)
        except Exception as error:  # noqa: BLE001  tried again with the next save
            logger.warning("%s: what failed saves left stays for now: %s", self.storage.name, error)

    def clear_abandoned(self) -> None:
        """Remove what the dead run whose lease was taken over has not committed, whatever its age."""
        try:
            if self.lease is not None and self.lease.dead_digits:
                catalog.sweep(self.storage, random=self.lease.dead_digits)
        except Exception as error:  # noqa: BLE001  removed later, as what others left
            logger.warning("%s: what the run before left stays for now: %s", self.storage.name, error)

    def newest(self, kind: Kind) -> Manifest | None:
        """The newest undamaged checkpoint of this kind. Raises StorageError."""
        return catalog.newest_of(self.storage, kind, self.kinds)

    def tidy(self, name: Name, kind: Kind) -> None:
        """After the commit of `name`: remove old checkpoints, and old files that interrupted saves left."""
        self.clear_unfinished(newer=True)
        try:
            if kind == "best":
                self._rotate(("best",), 1)
            self._rotate(("snapshot", "rescue"), self.keep_snapshots)
            if self.keep_milestones is not None:
                self._rotate(("milestone",), self.keep_milestones, self.resumed_from)
            if time.monotonic() >= self._sweep_at:
                catalog.sweep(self.storage, name)
                self._sweep_at = time.monotonic() + catalog.ORPHAN_SECONDS
        except Exception as error:  # noqa: BLE001  the new checkpoint exists
            logger.warning("removing old checkpoints failed: %s", error)

    def _rotate(self, of: tuple[Kind, ...], keep: int, pinned: str | None = None) -> None:
        if gone := catalog.rotate(self.storage, of, keep, self.bad, self.kinds, pinned):
            logger.info("removed old %ss: %s", "s and ".join(of), ", ".join(map(str, gone)))
