"""Repeats a request to a storage until it succeeds, fails for good, or a deadline is over."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")
T = TypeVar("T")

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


def keep_trying(
    request: Callable[[], T],
    failures: tuple[type[Exception], ...],
    judge: Callable[[Exception], FailedAttempt],
    seconds: float,
) -> T:
    """`request()`, repeated for `seconds` while `judge` calls its exceptions, of the types `failures`, passing.

    Raises the error of the last attempt, without its exception: that of a library may contain secrets.
    """
    begin = time.monotonic()
    for attempt in count():
        try:
            return request()
        except failures as error:
            failure = judge(error)
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1)
        left = begin + seconds - time.monotonic()
        if not failure.passing or pause >= left:
            tried = f"; tried {attempt + 1} times in {seconds - left:.0f} s" if attempt else ""
            raise failure.error(f"{failure.text}{tried}")
        level = logging.DEBUG if attempt else logging.WARNING
        logger.log(level, "%s; trying again for up to %.0f s", failure.text, left)
        time.sleep(pause)
    raise AssertionError("count() does not end")
