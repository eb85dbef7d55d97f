"""Tokens per GPU and second (tgs) over several spans, as the step line prints them.

    tgs, last_tgs_1   the steps of this line        tgs_all   all tokens / all time
    tgs_avg           mean of last_tgs_1            tgs_SMA   the last 50 steps
    last_tgs_10, _50  the last full block of 10 or 50 steps, 0 before the first one is full

InternLM reads its clock separately for `tgs` and `last_tgs_1`, so its last digits differ; here both are equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from internlm_lite.monitor.record import SpeedFigures

WINDOW_STEPS = 50
BLOCKS = (10, 50)


class SpeedMeter:
    """Counts tokens and time, in intervals from one step line to the next.

    Between two lines the host may run ahead of the device, so only the whole interval has a meaningful duration: each
    of its steps counts as an equal share.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._steps = 0
        self._tokens = 0.0  # per GPU
        self._seconds = 0.0
        self._sum_last_1 = 0.0
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self._block = dict.fromkeys(BLOCKS, (0.0, 0.0))
        self._last = dict.fromkeys(BLOCKS, 0.0)

    def add(self, tokens: int, seconds: float, steps: int = 1) -> SpeedFigures:
        """The speeds after `steps` more steps in `seconds`, with `tokens` over all data-parallel ranks."""
        assert steps >= 1 and seconds > 0, (steps, seconds)
        share = tokens / self._world_size / steps
        time = seconds / steps
        last_1 = round(share / time, 2)
        for _ in range(steps):
            self._add_step(share, time, last_1)
        window_tokens, window_seconds = (sum(values) for values in zip(*self._window, strict=True))
        return SpeedFigures(
            tgs=last_1,
            last_tgs_1=last_1,
            tgs_all=round(self._tokens / self._seconds, 2),
            tgs_avg=round(self._sum_last_1 / self._steps, 2),
            tgs_sma=round(window_tokens / window_seconds, 2),
            last_tgs_10=self._last[10],
            last_tgs_50=self._last[50],
        )

    def _add_step(self, tokens: float, seconds: float, last_1: float) -> None:
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        self._sum_last_1 += last_1
        self._window.append((tokens, seconds))
        for size in BLOCKS:
            block_tokens, block_seconds = self._block[size]
            block_tokens, block_seconds = block_tokens + tokens, block_seconds + seconds
            if self._steps % size == 0:
                self._last[size] = round(block_tokens / block_seconds, 2)
                block_tokens, block_seconds = 0.0, 0.0
            self._block[size] = (block_tokens, block_seconds)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the last 50 steps, for the remaining time; None before the first step."""
        return sum(seconds for _, seconds in self._window) / len(self._window) if self._window else None

    def state_dict(self) -> dict[str, Any]:
        """All counters, as JSON-able values."""
        return {
            "steps": self._steps,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "sum_last_1": self._sum_last_1,
            "window": [list(step) for step in self._window],
            "block": {str(size): list(sums) for size, sums in self._block.items()},
            "last": {str(size): tgs for size, tgs in self._last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the world size may differ."""
        self._steps = int(state["steps"])
        self._tokens = float(state["tokens"])
        self._seconds = float(state["seconds"])
        self._sum_last_1 = float(state["sum_last_1"])
        self._window = deque(((tokens, seconds) for tokens, seconds in state["window"]), maxlen=WINDOW_STEPS)
        self._block = {size: (state["block"][str(size)][0], state["block"][str(size)][1]) for size in BLOCKS}
        self._last = {size: float(state["last"][str(size)]) for size in BLOCKS}
