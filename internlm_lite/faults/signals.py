"""Signals that ask a run to stop: noted when they come, obeyed after the step, so that what was trained can be saved.

SIGTERM   Slurm and torchrun before they kill        SIGUSR1   sbatch --signal=USR1@90, before the time limit
SIGINT    Ctrl-C; once more, a second later, interrupts at once

Those that come before the first step are obeyed after it, so that all ranks stop alike; after the last step they change
nothing. Nor do others that follow: launchers send several, to the job and again to each of its processes.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType

logger = logging.getLogger("internlm_lite")
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TWICE_SECONDS = 1.0
"""Nobody presses Ctrl-C twice as fast as a launcher that hands it on."""


class StopSignals:
    """In its `with` block, signals are noted in `received`; after it they are ignored, as the process ends with the
    code it has. For the main thread.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self._first_seconds = 0.0

    def __enter__(self) -> StopSignals:
        for number in WATCHED:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in WATCHED:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first_seconds = signal.Signals(number).name, time.monotonic()
            # By another thread: this one may be in the middle of a log record.
            threading.Thread(target=_tell, args=(self.received,), name="signal").start()
        elif number == signal.SIGINT and time.monotonic() - self._first_seconds > _TWICE_SECONDS:
            raise KeyboardInterrupt


def _tell(name: str) -> None:
    logger.warning("%s: the run stops within two steps; Ctrl-C (again) stops it at once", name)
