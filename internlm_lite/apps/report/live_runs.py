"""The runs of a dashboard; one thread reads their files, other threads answer requests."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from internlm_lite.apps.report.discover import find_runs, require_runs, run_name
from internlm_lite.apps.report.payload import UNREADABLE, curves, make_payload
from internlm_lite.apps.report.prometheus import render_metrics
from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.run_state import run_state
from internlm_lite.errors import InternLMError

logger = logging.getLogger("internlm_lite")

PATIENCE_SECONDS = 0.3
"""Longest wait of a request for the files; then it is answered with the data read so far."""
PAUSE_SECONDS = 0.1
"""Shortest time between two reads of all files, for any number of requests."""
JOIN_SECONDS = 10.0


class LiveRuns:
    """Reads in the background. Methods are thread-safe."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises ConfigError when a path cannot be read or contains no run."""
        self._paths = paths
        self._runs: list[tuple[str, RunReader]] = []
        self._known: dict[Path, tuple[str, RunReader]] = {}
        self._reported: set[str] = set()
        self._salt = secrets.token_hex(8)  # tokens of an earlier server must not match
        self._lock = threading.Lock()  # held while data are added or read
        self._asked, self._read, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._set_runs(require_runs(paths))
        self._asked.set()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._asked.set()
        self._thread.join(JOIN_SECONDS)

    def refresh(self) -> None:
        """Request a read of the files and wait for it, at most PATIENCE_SECONDS; does not wait for the first read."""
        self._read.clear()
        self._asked.set()
        if all(run.parsed or run.error for _, run in self._runs):
            self._read.wait(PATIENCE_SECONDS)

    def payload(self) -> dict[str, Any]:
        """The page's data, with a "token" that identifies its state."""
        with self._lock:
            return {"token": self._token(), **make_payload(self._runs, live=True)}

    def token(self) -> str:
        """Changes whenever `payload` changes."""
        with self._lock:
            return self._token()

    def series(self, identity: str, begin: float, end: float, points: int) -> dict[str, Any] | None:
        """The curves of a run; None for an unknown id."""
        with self._lock:
            run = next((run for known, run in self._runs if known == identity), None)
            return None if run is None else curves(run, begin, end, points)

    def metrics(self) -> str:
        """The newest figures of all runs, for Prometheus."""
        with self._lock:
            return render_metrics([run for _, run in self._runs], datetime.now(timezone.utc))

    def _token(self) -> str:
        now = datetime.now(timezone.utc)
        facts = [(name, run.version, run.parsed, run.error, _phase(run, now)) for name, run in self._runs]
        return hashlib.sha256(f"{self._salt} {facts}".encode()).hexdigest()[:24]

    def _work(self) -> None:
        while not self._ended.is_set():
            if self._asked.wait(1.0):
                self._asked.clear()
                self._round()
                self._read.set()
                self._ended.wait(PAUSE_SECONDS)

    def _round(self) -> None:
        """Read all files to their end. A problem is logged once; data read before are kept."""
        try:
            self._set_runs(find_runs(self._paths))
        except InternLMError as error:
            self._report(error)
        for _, run in list(self._runs):
            try:
                while self._advance(run) and not self._ended.wait(0.001):  # lets requests take the lock
                    pass
                run.error = None
            except Exception as error:  # noqa: BLE001  one run must not break the page of the others
                run.error = self._report(error)

    def _advance(self, run: RunReader) -> bool:
        delta = run.poll()  # without holding the lock: a disk may be slow
        with self._lock:
            return run.ingest(delta)

    def _set_runs(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            if folder not in self._known:
                self._known[folder] = f"r{len(self._known)}", RunReader(folder, run_name(folder))
        with self._lock:
            self._runs = [self._known[folder] for folder in folders]

    def _report(self, error: Exception) -> str:
        text = str(error) if isinstance(error, InternLMError) else repr(error)
        if text not in self._reported:
            self._reported.add(text)
            logger.warning(text)
        return text


def _phase(run: RunReader, now: datetime) -> str:
    try:
        return str(run_state(run, now)["phase"])
    except Exception:  # noqa: BLE001  the page shows the reason
        return UNREADABLE
