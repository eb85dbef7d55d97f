"""How many faults are injected: a fixed sample in the test suite, all of them in `make faults` (FAULTS=all)."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
ALL = os.environ.get("FAULTS") == "all"


def some(every: Sequence[T], sample: int, seed: int = 4) -> list[T]:
    """`every`, or the same `sample` of them each time, in order."""
    if ALL or sample >= len(every):
        return list(every)
    chosen = random.Random(seed).sample(range(len(every)), sample)
    return [every[index] for index in sorted(chosen)]


def number(every: int, sample: int) -> int:
    """How often something random is done."""
    return every if ALL else sample
