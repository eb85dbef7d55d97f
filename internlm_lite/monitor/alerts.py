"""Rules that raise an alert: pure functions of step lines, events and time, without a clock, threads or files.

    rule               raised when                                             over when
    non_finite_loss    the loss is nan or inf                                  it is finite
    loss_spike         loss > loss_factor * mean of the last lines             half-way back to that mean
    overflow_run       `skips_in_a_row` updates were skipped in a row          an update is made
    silent             no step for 10 x the usual time                         the next step
    slow               tgs < (1 - tgs_drop) * its median, for a while          half-way back to that median
    checkpoint_failed  a checkpoint was not saved                              one is saved
    disk_nearly_full   less than 5 % and less than 200 GiB free                a quarter more than that is free

An alert is raised once, reported as over when its condition ends, and not raised again before `cool_down_seconds`.
Values measured during an alert do not enter the mean or median that it is judged by.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from internlm_lite.config.schema import AlertsConfig
from internlm_lite.monitor.record import StepRecord
from internlm_lite.units import human_bytes

WINDOW_LINES = 50
"""Number of last lines in means and medians."""
FEWEST_LINES = 10
"""Loss and speed raise no alert before this number of lines."""
SLOW_LINES = 3
SLOW_SECONDS = 60.0
"""Low speed is an alert only after this number of lines and of seconds."""
SILENT_FACTOR = 10
DISK_SHARE = 0.05
DISK_BYTES = 200 * 1024**3
_ENDS = frozenset({"done", "stopped", "failed"})
_ALERTS = frozenset({"alert", "alert_over"})


@dataclass(frozen=True)
class Alert:
    """The begin or the end of an alert."""

    rule: str
    step: int | None
    """Index of the last step line."""
    text: str
    """Message for the user; at the end of an alert, how long it lasted."""
    over: bool


@dataclass(frozen=True)
class DiskFigures:
    """Space of the file system of a folder, in bytes."""

    folder: str
    free: int
    total: int


class Rules:
    """All rules and their state. `now` is in seconds, by a monotonic clock."""

    def __init__(self, config: AlertsConfig, total_steps: int) -> None:
        self._config, self._total_steps = config, total_steps
        self._begun: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        """When each alert that lasts began, and when the others ended."""
        self._step: int | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW_LINES)
        self._speeds: deque[float] = deque(maxlen=WINDOW_LINES)
        self._intervals: deque[float] = deque(maxlen=WINDOW_LINES)
        self._slow_lines, self._slow_since = 0, 0.0
        self._skipped: int | None = None
        self._consecutive_skips = 0
        self._last_line: float | None = None
        self._last_seen: float | None = None
        """Time of the last step or event; None while no step is expected."""

    def step(self, record: StepRecord, now: float) -> list[Alert]:
        """Alerts that begin or end with a step line."""
        steps = 1 if self._step is None else max(1, record.step - self._step)
        self._step = record.step
        alerts = [*self._alive(now), *self._loss(record, now), *self._overflow(record, steps, now)]
        alerts += self._speed(record.speed.tgs, now)
        if self._last_line is not None:
            self._intervals.append(now - self._last_line)
        self._last_line = now
        if record.step + 1 >= self._total_steps:
            self._last_seen = None
        return alerts

    def event(self, kind: str, facts: Mapping[str, Any], now: float) -> list[Alert]:
        """Alerts that begin or end with an event; events of alerts themselves are ignored."""
        if kind in _ALERTS:
            return []
        alerts = self._alive(now) if self._last_seen is not None or kind == "start" else []
        if kind in _ENDS:
            self._last_seen = None
        if kind == "alarm":
            text = f"checkpoint {facts.get('checkpoint')} was not saved: {facts.get('why')}"
            alerts += self._update("checkpoint_failed", True, text, now)
        elif kind == "checkpoint_done" or (kind == "checkpoint" and facts.get("waited")):
            alerts += self._update("checkpoint_failed", False, "", now)
        return alerts

    def time(self, now: float) -> list[Alert]:
        """Alerts that begin or end by time alone. To be called at regular intervals, also between steps."""
        if self._last_seen is None:
            return []
        usual = median(self._intervals) if self._intervals else 0.0
        silence, limit = now - self._last_seen, max(self._config.silent_seconds, SILENT_FACTOR * usual)
        after = "since the start" if self._step is None else f"after step {self._step}"
        text = f"no step for {silence:.0f} s {after}" + (f"; a line usually takes {usual:.1f} s" if usual else "")
        return self._update("silent", silence > limit, text, now)

    def disk(self, figures: DiskFigures, now: float) -> list[Alert]:
        """Alerts that begin or end with a measurement of free space."""
        limit = min(DISK_SHARE * figures.total, DISK_BYTES)
        full = _either(on=figures.free < limit, off=figures.free > 1.25 * limit)
        share = figures.free / figures.total if figures.total else 0.0
        text = f"{figures.folder} has {human_bytes(figures.free)} left ({share:.1%}); make room before it is full"
        return self._update(f"disk_nearly_full {figures.folder}", full, text, now)

    def _alive(self, now: float) -> list[Alert]:
        self._last_seen = now
        return self._update("silent", False, "", now)

    def _loss(self, record: StepRecord, now: float) -> list[Alert]:
        loss, known = record.loss, math.isfinite(record.loss)
        empty = bool(record.folders) and not any(folder.tokens for folder in record.folders.values())
        text = f"the loss of step {record.step} is {loss}"
        alerts = self._update("non_finite_loss", _either(on=not (known or empty), off=known), text, now)
        if not known:
            return alerts
        if len(self._losses) < FEWEST_LINES:
            self._losses.append(loss)
            return alerts
        mean, factor = fmean(self._losses), self._config.loss_factor
        spike = _either(on=loss > factor * mean, off=loss < (1 + factor) / 2 * mean)
        if not spike and "loss_spike" not in self._begun:
            self._losses.append(loss)
        text = f"loss {loss:.4g} at step {record.step}, more than {factor:g} x its mean {mean:.4g} over the last lines"
        return alerts + self._update("loss_spike", spike, text, now)

    def _overflow(self, record: StepRecord, steps: int, now: float) -> list[Alert]:
        """All `steps` updates since the last line were skipped if the count of skipped updates grew by `steps`."""
        before = record.inf_nan_skip_batches if self._skipped is None else self._skipped
        new, self._skipped = record.inf_nan_skip_batches - before, record.inf_nan_skip_batches
        self._consecutive_skips = self._consecutive_skips + steps if new >= steps else 0
        on = _either(on=self._consecutive_skips >= self._config.skips_in_a_row, off=self._consecutive_skips == 0)
        why = "gradients or losses are not finite, or no token has a label"
        text = f"{self._consecutive_skips} updates skipped in a row up to step {record.step}: {why}"
        return self._update("overflow_run", on, text, now)

    def _speed(self, tgs: float, now: float) -> list[Alert]:
        if len(self._speeds) < FEWEST_LINES:
            self._speeds.append(tgs)
            return []
        usual, drop = median(self._speeds), self._config.tgs_drop
        low = tgs < (1 - drop) * usual
        self._slow_lines = self._slow_lines + 1 if low else 0
        if self._slow_lines == 1:
            self._slow_since = now
        slow = self._slow_lines >= SLOW_LINES and now - self._slow_since >= SLOW_SECONDS
        if not low and "slow" not in self._begun:
            self._speeds.append(tgs)
        on = _either(on=slow, off=tgs > (1 - drop / 2) * usual)
        text = f"{tgs:.0f} tokens per GPU and second, usually {usual:.0f}: more than {drop:.0%} less"
        return self._update("slow", on, text, now)

    def _update(self, rule: str, on: bool | None, text: str, now: float) -> list[Alert]:
        """The alert that begins or ends, if any. `on` None: between the two thresholds."""
        if on and rule not in self._begun and now - self._ended.get(rule, -math.inf) >= self._config.cool_down_seconds:
            self._begun[rule] = now
            return [Alert(rule, self._step, text, over=False)]
        if on is False and rule in self._begun:
            lasted = now - self._begun.pop(rule)
            self._ended[rule] = now
            return [Alert(rule, self._step, f"after {lasted:.0f} s", over=True)]
        return []


def _either(*, on: bool, off: bool) -> bool | None:
    """True if `on`, False if `off`, None between the two thresholds."""
    return True if on else False if off else None
