"""A trace of a few steps for chrome://tracing or Perfetto (`--profiling`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

logger = logging.getLogger("internlm_lite")

WAIT_STEPS, WARM_STEPS, TRACED_STEPS = 3, 1, 3


@contextmanager
def traced_steps(folder: Path | None, rank: int) -> Iterator[Callable[[], object]]:
    """Gives a function to call after each step. `folder` None: it does nothing.

    Otherwise TRACED_STEPS steps after WAIT_STEPS + WARM_STEPS are written to folder/trace-rank-NNNNN.json.
    """
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
