"""Removing old checkpoints by hand. Old snapshots are removed by the run itself: `catalog.rotate`."""

from __future__ import annotations

from dataclasses import dataclass

from internlm_lite.checkpoint.admin.listing import quick_problems
from internlm_lite.checkpoint.admin.verify import damages_of
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.storage.base import Storage


@dataclass(frozen=True)
class Prune:
    """What stays and what goes, newest first."""

    kept: tuple[Name, ...]
    """Good ones."""
    damaged: tuple[Name, ...]
    """Newer than the oldest that is kept, but not good: kept for inspection."""
    removed: tuple[Name, ...]


def plan_prune(storage: Storage, keep: int) -> Prune:
    """Keep the newest `keep` good checkpoints of every kind, remove all that are older than those.

    The newest of them is read whole and must be good to the last byte; nothing goes while there are fewer than `keep`.
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
    return Prune(tuple(kept), tuple(damaged), tuple(removed))
