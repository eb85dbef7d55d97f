"""Profiling of steps: a stopwatch that does not wait for the device, and a trace of a few steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import profiler

logger = logging.getLogger("internlm_lite")

WAIT_STEPS, WARM_STEPS, TRACED_STEPS = 3, 1, 3


class Stopwatch:
    """Sums the intervals between `start` and `stop`: on CUDA those of the device, which may be behind the host."""

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

    def take(self) -> Callable[[], float]:
        """What was measured since the last call: a function for its seconds, to be called when the device is done."""
        seconds, events = self._seconds, self._events
        self._events, self._seconds = [], 0.0
        return lambda: seconds + sum(begin.elapsed_time(end) for begin, end in events) / 1000


@contextmanager
def traced_steps(folder: Path | None, rank: int) -> Iterator[Callable[[], object]]:
    """`--profiling`: writes a trace for chrome://tracing or Perfetto. Yields a function to call after each step.

    folder/trace-rank-NNNNN.json has the TRACED_STEPS steps after the first WAIT_STEPS + WARM_STEPS; `folder` None: no
    trace."""
    if folder is None:
        yield lambda: None
        return

    def write(profile: profiler.profile) -> None:
        path = folder / f"trace-rank-{rank:05d}.json"
        profile.export_chrome_trace(str(path))
        logger.info(f"trace of {TRACED_STEPS} steps: {path}")

    schedule = profiler.schedule(wait=WAIT_STEPS, warmup=WARM_STEPS, active=TRACED_STEPS, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
