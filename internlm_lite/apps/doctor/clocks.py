"""How far the clocks of hosts are apart: round trips through the store, the shortest of which bounds the error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from internlm_lite.apps.doctor.exchange import Exchange

ROUNDS = 8


@dataclass(frozen=True)
class Offset:
    """Of one rank's clock against rank 0's."""

    seconds: float
    """> 0: ahead of rank 0."""
    error: float
    """Half of the shortest round trip."""


def clock_offsets(exchange: Exchange, ranks: Sequence[int]) -> dict[int, Offset]:
    """Rank 0 asks `ranks`, one after the other; every rank calls this, and rank 0 alone gets an answer."""
    me = exchange.place.rank
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
