"""Time spent in a stretch of work that a GPU may do later than the host asks for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Sums stretches between `start` and `stop`. On CUDA by events, so that nothing waits before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._begin = 0.0

    def start(self) -> None:
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._begin = time.perf_counter()

    def stop(self) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._begin

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        seconds = self._seconds
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._events, self._seconds = [], 0.0
        return seconds
