"""A thread that does something now and then until it is closed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger("internlm_lite")

JOIN_SECONDS = 2.0
"""A call that hangs, such as one on a dead file system, is left behind after so long."""


class Ticker:
    """Calls `call` every `seconds`, first at once. A call that raises is told in one line, and ends it."""

    def __init__(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        self._name, self._seconds, self._call = name, seconds, call
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            self._call()
            while not self._closed.wait(self._seconds):
                self._call()
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on without it
            logger.warning(f"{self._name} failed and is switched off: {type(error).__name__}: {error}")
