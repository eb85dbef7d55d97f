"""The sink that watches a run: it feeds the rules of alerts.py, and tells what they raise.

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
from internlm_lite.monitor.ticker import Ticker
from internlm_lite.monitor.webhook import Webhook

logger = logging.getLogger("internlm_lite")

DISK_SECONDS = 60.0
"""Between looks at the space left."""
_LOOKS = 20
"""At the clock, in the time after which silence is an alert."""


class Tell(Protocol):
    """Hands an event to all sinks: `FanOut.event`."""

    def __call__(self, kind: str, /, **facts: Any) -> None: ...


class AlertMonitor(Sink):
    """Rules, two timers, and the webhook. Timers: one for silence, one for disks, which may hang with their disk."""

    def __init__(
        self,
        config: AlertsConfig,
        total_steps: int,
        folders: Sequence[Path],
        title: str,
        tell: Tell,
        disk_seconds: float = DISK_SECONDS,
    ) -> None:
        """`folders` are watched for space; `title` names the run in messages."""
        self._rules = Rules(config, total_steps)
        self._lock = threading.Lock()
        self._tell, self._title, self._folders = tell, title, list(folders)
        self._webhook: Webhook | None = None
        if config.webhook is not None:
            self._webhook = Webhook(config.webhook, config.format or webhook_format(config.webhook) or "slack")
        self._tickers = [
            Ticker("the watch for silence", config.silent_seconds / _LOOKS, self._look_at_clock),
            Ticker("the watch for full disks", disk_seconds, self._look_at_disks),
        ]

    def step(self, record: StepRecord) -> None:
        self._ask(lambda now: self._rules.step(record, now))

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._ask(lambda now: self._rules.event(kind, facts, now))

    def close(self) -> None:
        for ticker in self._tickers:
            ticker.close()
        if self._webhook is not None:
            self._webhook.close()

    def _look_at_clock(self) -> None:
        self._ask(self._rules.time)

    def _look_at_disks(self) -> None:
        for figures in disks(self._folders):
            self._ask(lambda now, figures=figures: self._rules.disk(figures, now))  # type: ignore[misc]

    def _ask(self, rules: Callable[[float], list[Alert]]) -> None:
        with self._lock:
            alerts = rules(time.monotonic())
        for alert in alerts:  # without the lock: the event comes back to this sink
            self._announce(alert)

    def _announce(self, alert: Alert) -> None:
        text = str(masked(alert.text))
        if alert.over:
            logger.info(f"alert over: {alert.rule} {text}")
            self._tell("alert_over", rule=alert.rule, step=alert.step)
        else:
            logger.warning(f"ALERT {alert.rule}: {text}")
            self._tell("alert", rule=alert.rule, step=alert.step, text=text)
        if self._webhook is not None:
            self._webhook.send(f"[{self._title}] {'over: ' if alert.over else ''}{alert.rule}: {text}")
