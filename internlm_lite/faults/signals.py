"""Signals that ask a run to stop: noted when they come, obeyed after the step, so that what was trained can be saved.

SIGTERM   Slurm and torchrun before they kill        SIGUSR1   sbatch --signal=USR1@90, before the time limit
SIGINT    Ctrl-C; once more, a second later, interrupts at once

Others that follow change nothing: launchers send several, to the job and again to each of its processes.
"""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType, TracebackType

logger = logging.getLogger("internlm_lite")
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TWICE_SECONDS = 1.0
"""Nobody presses Ctrl-C twice as fast as a launcher that hands it on."""


class StopSignals:
    """In its `with` block, signals are noted in `received`. For the main thread."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self._first_seconds = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        if kind is not None:
            # Slurm and torchrun end the others when one rank fails; this one's record of what happened comes first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._first_seconds = name, time.monotonic()
            logger.warning("%s: the run stops within two steps; Ctrl-C (again) stops it at once", name)
        elif number == signal.SIGINT and time.monotonic() - self._first_seconds > _TWICE_SECONDS:
            raise KeyboardInterrupt
        else:
            logger.info("%s: the run is stopping already", name)
