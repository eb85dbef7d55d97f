"""Alternating measurement: A B A B ..., medians, so that noise of the machine affects both sides equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

STEPS_A_TURN = 2
"""Steps per turn; with one, work that overlaps the next step would be counted for the other side."""


def nothing() -> None:
    """For sides that leave no asynchronous work."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    step: Callable[[], object]
    """One full optimizer step."""
    finish: Callable[[], None] = nothing
    """Wait for asynchronous work of the last step."""


def turns(side: Side) -> Callable[[], None]:
    """A function that runs one turn of a side on all ranks and returns when the last rank is done. Collective."""

    def turn() -> None:
        for _ in range(STEPS_A_TURN):
            side.step()
        side.finish()
        dist.barrier()

    return turn


def alternate_ranks(sides: dict[str, Side], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of one step of each side. Collective."""
    seconds = alternate({name: turns(side) for name, side in sides.items()}, rounds, device)
    return {name: value / STEPS_A_TURN for name, value in seconds.items()}


def alternate(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of one call of each side, after one warm-up call each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
