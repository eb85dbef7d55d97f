"""report.html of a run, rewritten in place while it trains."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lite.apps.report.discover import run_name
from internlm_lite.apps.report.page import Assets, write_report
from internlm_lite.apps.report.payload import make_payload
from internlm_lite.apps.report.run import RunReader
from internlm_lite.errors import InternLMError
from internlm_lite.monitor.record import Sink

if TYPE_CHECKING:
    from internlm_lite.config.schema import Config

logger = logging.getLogger("internlm_lite")

MAX_SHARE = 0.003
"""Largest fraction of wall time that the thread may be busy, as it shares the interpreter with training."""
FIRST_SECONDS = 5.0
"""Delay of the first page."""
CLOSE_SECONDS = 60.0


def open_report(folder: Path, config: Config) -> Sink | None:
    """A sink that writes report.html from the files of the run folder (a `monitor.sinks.SinkFactory`)."""
    every_seconds = config.monitor.report_every_seconds
    return ReportWriter(folder, every_seconds) if every_seconds else None


class ReportWriter(Sink):
    """On rank 0: a thread that writes `folder`/report.html when the run's files grew, and once more at `close`.

    A report that cannot be written is logged once; nothing is raised.
    """

    def __init__(self, folder: Path, every_seconds: float = 60.0) -> None:
        self.path = folder / "report.html"
        self._run = RunReader(folder, run_name(folder))
        self._every_seconds = every_seconds
        self._written = -1
        self._failed = False
        self._assets: Assets | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last state and end the thread."""
        self._ended.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning(f"{self.path} is not written yet after {CLOSE_SECONDS:.0f} s; leaving it as it is")

    def _work(self) -> None:
        wait = min(FIRST_SECONDS, self._every_seconds)
        while not self._ended.wait(wait):
            begin = time.perf_counter()
            self._write()
            wait = max(self._every_seconds, (time.perf_counter() - begin) / MAX_SHARE)
        self._write()

    def _write(self) -> None:
        try:
            self._run.read_all()
            if self._run.version != self._written:
                self._assets = self._assets or Assets.read()
                write_report(make_payload([("r0", self._run)], live=False), self.path, self._assets)
                self._written = self._run.version
        except InternLMError as error:
            self._report(error)
        except Exception as error:  # noqa: BLE001  a page must not stop the run
            self._report(error)

    def _report(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            logger.warning(f"no new {self.path}, training goes on: {type(error).__name__}: {error}")
