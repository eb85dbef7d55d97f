"""Repeats a request to a storage until it succeeds, fails for good, or a deadline is over."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 8.0
"""Seconds between attempts; doubled each time, then shortened by up to half at random to spread the ranks' retries."""


@dataclass(frozen=True)
class FailedAttempt:
    """The failure of one attempt."""

    text: str
    error: Callable[[str], StorageError]
    """Makes the error to raise of its message."""
    passing: bool
    """Another attempt may succeed."""


class Patience:
    """Decides after each failed attempt at a request whether there is another one."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: the deadline, from now on."""
        self._begin, self._seconds, self._failed = time.monotonic(), seconds, 0

    def wait_after(self, failure: FailedAttempt) -> None:
        """Wait for the next attempt. Raises the failure's error if it is not passing, or at the deadline.

        Call it outside of the `except` block: the exceptions of a library may contain secrets.
        """
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._failed) * random.uniform(0.5, 1)
        left = self._begin + self._seconds - time.monotonic()
        if not failure.passing or pause >= left:
            tried = f"; tried {self._failed + 1} times in {self._seconds - left:.0f} s" if self._failed else ""
            raise failure.error(f"{failure.text}{tried}")
        level = logging.DEBUG if self._failed else logging.WARNING
        logger.log(level, "%s; trying again for up to %.0f s", failure.text, left)
        self._failed += 1
        time.sleep(pause)
