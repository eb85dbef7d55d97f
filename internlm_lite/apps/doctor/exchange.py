"""Exchange of small values through the job's key-value store; works without process groups."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from internlm_lite.errors import PeerLostError
from internlm_lite.runtime.dist_env import DistEnv


@dataclass(frozen=True)
class Exchange:
    """Collectives over a store, with a time-out for values of other ranks."""

    store: Store
    dist_env: DistEnv
    timeout: timedelta

    def send(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def receive(self, key: str, rank: int = 0) -> Any:
        """Wait for the value that `rank` sends under `key`. Raises PeerLostError after the time-out."""
        try:
            self.store.wait([key], self.timeout)
            return json.loads(self.store.get(key))
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            raise PeerLostError(
                f"rank {self.dist_env.rank} on {self.dist_env.hostname} received nothing from rank {rank} for "
                f"{self.timeout.total_seconds():g} s; the log of rank {rank} says what happened"
            ) from error

    def gather(self, key: str, value: Any) -> list[Any]:
        """On rank 0 the values of all ranks in rank order, else an empty list. Collective; values are JSON-able."""
        self.send(f"{key}/{self.dist_env.rank}", value)
        if not self.dist_env.is_main:
            return []
        return [self.receive(f"{key}/{rank}", rank) for rank in range(self.dist_env.world_size)]

    def broadcast(self, key: str, value: Any) -> Any:
        """Rank 0's `value` on every rank. Collective."""
        if self.dist_env.is_main:
            self.send(key, value)
        return self.receive(key)
