"""Ranks tell each other small facts through the job's key-value store, also where process groups do not connect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from internlm_lite.errors import PeerLostError
from internlm_lite.runtime.place import Place


@dataclass(frozen=True)
class Exchange:
    """One store, and how long a rank waits in it for another."""

    store: Store
    place: Place
    timeout: timedelta

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, rank: int = 0) -> Any:
        """What `rank` told, or will tell. Raises PeerLostError after the time-out."""
        try:
            self.store.wait([key], self.timeout)
            return json.loads(self.store.get(key))
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            raise PeerLostError(
                f"rank {self.place.rank} on {self.place.hostname} heard nothing of rank {rank} for "
                f"{self.timeout.total_seconds():g} s; the log of rank {rank} says what happened"
            ) from error

    def gather(self, key: str, value: Any) -> list[Any]:
        """Every rank's `value` in rank order on rank 0, an empty list elsewhere. JSON-able values."""
        self.tell(f"{key}/{self.place.rank}", value)
        if not self.place.is_main:
            return []
        return [self.hear(f"{key}/{rank}", rank) for rank in range(self.place.world_size)]

    def from_main(self, key: str, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.place.is_main:
            self.tell(key, value)
        return self.hear(key)
