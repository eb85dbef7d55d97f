"""Clock offsets between hosts, from round trips through the store; the shortest round trip bounds the error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from internlm_lite.apps.doctor.exchange import Exchange

ROUNDS = 8


@dataclass(frozen=True)
class Offset:
    """The offset of one rank's clock from rank 0's."""

    seconds: float
    """Seconds; positive if its clock is ahead of rank 0."""
    error: float
    """Bound of the error: half of the shortest round trip."""


def clock_offsets(exchange: Exchange, ranks: Sequence[int]) -> dict[int, Offset]:
    """Collective; rank 0 measures `ranks` one after the other. The result is empty on all other ranks."""
    me = exchange.dist_env.rank
    if me == 0:
        return {rank: min((_ask(exchange, rank, n) for n in range(ROUNDS)), key=lambda o: o.error) for rank in ranks}
    if me in ranks:
        for n in range(ROUNDS):
            exchange.receive(f"clock/{me}/{n}/asked")
            exchange.send(f"clock/{me}/{n}/answer", time.time())
    return {}


def _ask(exchange: Exchange, rank: int, n: int) -> Offset:
    before, begin = time.time(), time.monotonic()
    exchange.send(f"clock/{rank}/{n}/asked", True)
    theirs = exchange.receive(f"clock/{rank}/{n}/answer", rank)
    half = (time.monotonic() - begin) / 2
    return Offset(theirs - (before + half), half)
