"""The largest data.micro_bsz that fits a memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LargestBatch:
    memory: int
    """Bytes of a rank that the plan may fill."""
    micro_bsz: int
    """0: not even 1 fits."""
    peak: int
    """Bytes of the fullest rank at that micro_bsz, or at 1 if that does not fit."""
    per_row: float
    """Bytes that one more adds there. The rest of `peak` stays whatever micro_bsz is."""


def largest_batch(peak: Callable[[int], int], memory: int, most: int = 2**20) -> LargestBatch:
    """`peak`: bytes of the fullest rank by micro_bsz, rising. `most`: the largest micro_bsz that is tried."""
    fits, too_large = 0, 1
    while too_large <= most and peak(too_large) <= memory:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        fits, too_large = (middle, too_large) if peak(middle) <= memory else (fits, middle)
    at = max(fits, 1)
    return LargestBatch(memory, fits, peak(at), (peak(2 * at) - peak(at)) / at)
