"""The sink that watches a run: it feeds the rules of alerts.py and reports what they raise.

An alert goes to the log, to every sink as an event (`alert`, `alert_over`), and to the webhook if there is one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm_lite.config.masking import masked
from internlm_lite.config.paths import webhook_format
from internlm_lite.config.schema import AlertsConfig
from internlm_lite.monitor.alerts import Alert, Rules
from internlm_lite.monitor.disk_usage import disks
from internlm_lite.monitor.record import Sink, StepRecord
from internlm_lite.monitor.webhook import Webhook

logger = logging.getLogger("internlm_lite")

DISK_SECONDS = 60.0
"""Interval between checks of free space."""
JOIN_SECONDS = 2.0
"""Longest wait for a timer thread at the end; a thread that is blocked, e.g. by a dead file system, is abandoned."""
_CHECKS = 20
"""Checks of the clock within the time after which silence is an alert."""


class SendEvent(Protocol):
    """Hands an event to all sinks: `FanOut.event`."""

    def __call__(self, kind: str, /, **facts: Any) -> None: ...


class AlertMonitor(Sink):
    """Rules, two timer threads, and the webhook. Disks have a timer of their own, as reading them may block."""

    def __init__(
        self,
        config: AlertsConfig,
        total_steps: int,
        folders: Sequence[Path],
        title: str,
        send_event: SendEvent,
        disk_seconds: float = DISK_SECONDS,
    ) -> None:
        """`folders` are checked for free space; `title` names the run in messages."""
        self._rules = Rules(config, total_steps)
        self._lock = threading.Lock()
        self._send_event, self._title, self._folders = send_event, title, list(folders)
        self._webhook: Webhook | None = None
        if config.webhook is not None:
            self._webhook = Webhook(config.webhook, config.format or webhook_format(config.webhook) or "slack")
        self._tickers = [
            Ticker("the watch for silence", config.silent_seconds / _CHECKS, lambda: self._apply(self._rules.time)),
            Ticker("the watch for full disks", disk_seconds, self._check_disks),
        ]

    def step(self, record: StepRecord) -> None:
        self._apply(lambda now: self._rules.step(record, now))

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._apply(lambda now: self._rules.event(kind, facts, now))

    def close(self) -> None:
        for ticker in self._tickers:
            ticker.close()
        if self._webhook is not None:
            self._webhook.close()

    def _check_disks(self) -> None:
        for figures in disks(self._folders):
            self._apply(lambda now, figures=figures: self._rules.disk(figures, now))  # type: ignore[misc]

    def _apply(self, rules: Callable[[float], list[Alert]]) -> None:
        with self._lock:
            alerts = rules(time.monotonic())
        for alert in alerts:  # without holding the lock: the event also reaches this sink
            self._report(alert)

    def _report(self, alert: Alert) -> None:
        text = str(masked(alert.text))
        if alert.over:
            logger.info("alert over: %s %s", alert.rule, text)
            self._send_event("alert_over", rule=alert.rule, step=alert.step)
        else:
            logger.warning("ALERT %s: %s", alert.rule, text)
            self._send_event("alert", rule=alert.rule, step=alert.step, text=text)
        if self._webhook is not None:
            self._webhook.send(f"[{self._title}] {'over: ' if alert.over else ''}{alert.rule}: {text}")


class Ticker:
    """Calls `call` at once and then every `seconds`, in a thread. An error is logged in one line and ends it."""

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
        except Exception as error:  # noqa: BLE001  no error here may stop training
            logger.warning("%s failed and is switched off: %s: %s", self._name, type(error).__name__, error)
