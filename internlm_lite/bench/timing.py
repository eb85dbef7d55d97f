"""Alternating measurement: A B A B ..., medians, so that a noisy machine disturbs both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def alternate(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of one call of each side, after one warm-up call each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
