"""Plans the manual removal of old checkpoints. A run removes its old snapshots itself: `catalog.rotate`."""

from __future__ import annotations

from dataclasses import dataclass

from internlm_lite.checkpoint.admin.listing import quick_problems
from internlm_lite.checkpoint.admin.verify import damages_of
from internlm_lite.checkpoint.format.catalog import committed, newest_of
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.storage.base import Storage


@dataclass(frozen=True)
class Prune:
    """A partition of the committed checkpoints, each part newest first."""

    kept: tuple[Name, ...]
    """Undamaged ones."""
    damaged: tuple[Name, ...]
    """Damaged ones that are newer than the oldest of `kept`: not removed, for inspection."""
    removed: tuple[Name, ...]


def plan_prune(storage: Storage, keep: int) -> Prune:
    """Keep the newest `keep` undamaged checkpoints, whatever their kind, and the best; remove all older ones. Deletes
    nothing.

    Verifies every byte of the newest; `quick_problems` checks the others. Fewer than `keep`: nothing to remove.
    """
    names = committed(storage)
    kept: list[Name] = []
    damaged: list[Name] = []
    for name in names:
        if len(kept) == keep:
            break
        problems = quick_problems(storage, name) or (not kept and any(damages_of(storage, name)))
        (damaged if problems else kept).append(name)
    removed = names[len(kept) + len(damaged) :] if len(kept) == keep else []
    best = newest_of(storage, "best", {}) if removed else None
    kept += [name for name in removed if best and str(name) == best.name]
    return Prune(tuple(kept), tuple(damaged), tuple(name for name in removed if name not in kept))
