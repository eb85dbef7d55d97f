"""Signals that ask a run to stop: recorded at once, handled after the step, so that a checkpoint can be saved.

SIGTERM   Slurm and torchrun before they kill        SIGUSR1   sbatch --signal=USR1@90, before the time limit
SIGINT    Ctrl-C; again, at least a second later, interrupts at once
SIGHUP    the terminal or the connection is gone; ignored, as before the start, under nohup

Signals before the first step are handled after it, so that all ranks stop together; after the last step they have no
effect. Further signals have no effect either: launchers send several, to the job and to each of its processes.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType

logger = logging.getLogger("internlm_lite")
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_TWICE_SECONDS = 1.0
"""A second SIGINT within this time comes from the launcher, not from the user."""


class StopSignals:
    """In its `with` block, signals are recorded in `received`; after it they are ignored: the exit code is decided.
    Main thread only.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self._first_seconds = 0.0

    def __enter__(self) -> StopSignals:
        for number in WATCHED:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number in WATCHED:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first_seconds = signal.Signals(number).name, time.monotonic()
            # Log in another thread: the interrupted main thread may hold the lock of a log handler.
            threading.Thread(target=_log, args=(self.received,), name="signal").start()
        elif number == signal.SIGINT and time.monotonic() - self._first_seconds > _TWICE_SECONDS:
            raise KeyboardInterrupt


def _log(name: str) -> None:
    logger.warning("%s: the run stops within two steps; Ctrl-C (again) stops it at once", name)
