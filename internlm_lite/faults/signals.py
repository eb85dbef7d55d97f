"""Signals that ask a run to stop: noted when they come, obeyed after the step, so that what was trained can be saved.

SIGTERM   Slurm and torchrun before they kill        SIGUSR1   sbatch --signal=USR1@90, before the time limit
SIGINT    Ctrl-C; after any of them, it interrupts at once

A SIGTERM after the first signal changes nothing: Slurm sends one at the time limit, while the run that SIGUSR1 warned
may still be saving, and torchrun passes on what its ranks were sent already. What has to end at once is killed.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType

logger = logging.getLogger("internlm_lite")
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """In its `with` block, signals are noted in `received`. For the main thread."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
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
        if self.received is None:
            self.received = signal.Signals(number).name
            logger.warning("%s: the run saves after this step and stops; Ctrl-C stops it at once", self.received)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
