"""A save folder while a run writes to it: what is known of it, and what is removed from it besides a save.

Nothing here fails a save: a checkpoint that is committed stays, whatever happens to older ones.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.manifest import Kind, Name
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.run_lock import Lease

logger = logging.getLogger("internlm_lite")


@dataclass
class SaveFolder:
    """One of the folders that a manager saves to. What is known of it is up to date on rank 0."""

    storage: Storage
    keep_snapshots: int
    bad: dict[str, str]
    """Checkpoints found damaged, and why; they do not count when old ones are removed."""
    lease: Lease | None = None
    """On rank 0, once it is taken."""
    unfinished: list[Name] = field(default_factory=list)
    """Failed saves whose files may still be there."""
    kinds: dict[Name, Kind] = field(default_factory=dict)
    """Of the commits that were read."""
    reachable: bool = True
    """False: the last save timed out; nothing less important than a checkpoint is tried then."""
    _sweep_at: float = 0.0
    """By time.monotonic()."""

    def clear_unfinished(self, *, newer: bool = False) -> None:
        """Remove what failed saves left, while no rank writes to them.

        One that was committed nevertheless stays until there is a `newer` checkpoint.
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

    def tidy(self, name: Name) -> None:
        """After the commit of `name`: remove old snapshots, and what dead runs left once it is old enough."""
        self.clear_unfinished(newer=True)
        try:
            gone = catalog.rotate(self.storage, self.keep_snapshots, self.bad, self.kinds)
            if gone:
                logger.info("removed old snapshots and rescues: %s", ", ".join(map(str, gone)))
            if time.monotonic() >= self._sweep_at:
                catalog.sweep(self.storage, name)
                self._sweep_at = time.monotonic() + catalog.ORPHAN_SECONDS
        except Exception as error:  # noqa: BLE001  the new checkpoint exists
            logger.warning("removing old checkpoints failed: %s", error)
