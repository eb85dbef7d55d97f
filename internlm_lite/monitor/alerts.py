"""Rules that raise an alert: pure functions of step lines, events and time. No clock, no thread, no file here.

    non_finite_loss    the loss is no number                                  over: it is one again
    loss_spike         loss > loss_factor * mean of the last lines            over: half-way back to that mean
    overflow_run       so many updates skipped in a row                       over: an update is made
    silent             no step for 10 x the usual time                        over: the next step
    slow               tgs < (1 - tgs_drop) * its median, for a while         over: half-way back to that median
    checkpoint_failed  a checkpoint was not saved                             over: one is
    disk_nearly_full   less than 5 % and less than 200 GiB free               over: a quarter more than that

An alert is raised once, told as over when its condition ends, and not raised again before `cool_down_seconds`. While it
lasts, what is not usual does not enter the usual.
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
"""What is usual is taken from so many lines."""
FEWEST_LINES = 10
"""With fewer, nothing is unusual yet."""
SLOW_LINES = 3
SLOW_SECONDS = 60.0
"""Slow for fewer lines or seconds is no alert."""
SILENT_FACTOR = 10
DISK_SHARE = 0.05
DISK_BYTES = 200 * 1024**3
_ENDS = frozenset({"done", "stopped", "failed"})
_OWN = frozenset({"alert", "alert_over"})


@dataclass(frozen=True)
class Alert:
    """An alert that begins, or one that ends."""

    rule: str
    step: int | None
    """Last step that was seen."""
    text: str
    """For people; of one that ends, how long it lasted."""
    over: bool


@dataclass(frozen=True)
class DiskFigures:
    """Space where a folder lies, in bytes."""

    folder: str
    free: int
    total: int


class Rules:
    """All rules with their memory. Times `now` are seconds of one monotonic clock."""

    def __init__(self, config: AlertsConfig, total_steps: int) -> None:
        self._config, self._total_steps = config, total_steps
        self._latches = _Latches(config.cool_down_seconds)
        self._step: int | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW_LINES)
        self._speeds: deque[float] = deque(maxlen=WINDOW_LINES)
        self._intervals: deque[float] = deque(maxlen=WINDOW_LINES)
        self._slow_lines, self._slow_since = 0, 0.0
        self._skipped: int | None = None
        self._skips_in_a_row = 0
        self._last_line: float | None = None
        self._last_sign: float | None = None
        """When something happened; None: nothing is expected to."""

    def step(self, record: StepRecord, now: float) -> list[Alert]:
        """After a step line."""
        steps = 1 if self._step is None else max(1, record.step - self._step)
        self._step = record.step
        alerts = [*self._sign_of_life(now), *self._loss(record, now), *self._overflow(record, steps, now)]
        alerts += self._speed(record.speed.tgs, now)
        if self._last_line is not None:
            self._intervals.append(now - self._last_line)
        self._last_line = now
        if record.step + 1 >= self._total_steps:
            self._last_sign = None
        return alerts

    def event(self, kind: str, facts: Mapping[str, Any], now: float) -> list[Alert]:
        """After an event; alerts themselves are none."""
        if kind in _OWN:
            return []
        alerts = self._sign_of_life(now) if self._last_sign is not None or kind == "start" else []
        if kind in _ENDS:
            self._last_sign = None
        if kind == "alarm":
            text = f"checkpoint {facts.get('checkpoint')} was not saved: {facts.get('why')}"
            alerts += self._update("checkpoint_failed", True, text, now)
        elif kind == "checkpoint_done" or (kind == "checkpoint" and facts.get("waited")):
            alerts += self._update("checkpoint_failed", False, "", now)
        return alerts

    def time(self, now: float) -> list[Alert]:
        """Now and then, between steps."""
        if self._last_sign is None:
            return []
        usual = median(self._intervals) if self._intervals else 0.0
        silence, limit = now - self._last_sign, max(self._config.silent_seconds, SILENT_FACTOR * usual)
        after = "since the start" if self._step is None else f"after step {self._step}"
        text = f"no step for {silence:.0f} s {after}" + (f"; a line usually takes {usual:.1f} s" if usual else "")
        return self._update("silent", silence > limit, text, now)

    def disk(self, figures: DiskFigures, now: float) -> list[Alert]:
        """After a look at the space left for a folder."""
        limit = min(DISK_SHARE * figures.total, DISK_BYTES)
        full = _either(figures.free < limit, figures.free > 1.25 * limit)
        share = figures.free / figures.total if figures.total else 0.0
        text = f"{figures.folder} has {human_bytes(figures.free)} left ({share:.1%}); make room before it is full"
        return self._update(f"disk_nearly_full {figures.folder}", full, text, now)

    def _sign_of_life(self, now: float) -> list[Alert]:
        self._last_sign = now
        return self._update("silent", False, "", now)

    def _loss(self, record: StepRecord, now: float) -> list[Alert]:
        loss, known = record.loss, math.isfinite(record.loss)
        empty = bool(record.folders) and not any(folder.tokens for folder in record.folders.values())
        text = f"the loss of step {record.step} is {loss}"
        alerts = self._update("non_finite_loss", _either(not (known or empty), known), text, now)
        if not known:
            return alerts
        if len(self._losses) < FEWEST_LINES:
            self._losses.append(loss)
            return alerts
        mean, factor = fmean(self._losses), self._config.loss_factor
        spike = _either(loss > factor * mean, loss < (1 + factor) / 2 * mean)
        if not spike and not self._latches.is_raised("loss_spike"):
            self._losses.append(loss)
        text = f"loss {loss:.4g} at step {record.step}, more than {factor:g} x its mean {mean:.4g} over the last lines"
        return alerts + self._update("loss_spike", spike, text, now)

    def _overflow(self, record: StepRecord, steps: int, now: float) -> list[Alert]:
        """The number of skipped updates grew by as many as there were steps: they were all skipped."""
        before = record.inf_nan_skip_batches if self._skipped is None else self._skipped
        new, self._skipped = record.inf_nan_skip_batches - before, record.inf_nan_skip_batches
        self._skips_in_a_row = self._skips_in_a_row + steps if new >= steps else 0
        on = _either(self._skips_in_a_row >= self._config.skips_in_a_row, self._skips_in_a_row == 0)
        text = f"{self._skips_in_a_row} updates skipped in a row up to step {record.step}: gradients are not finite"
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
        if not low and not self._latches.is_raised("slow"):
            self._speeds.append(tgs)
        on = _either(slow, tgs > (1 - drop / 2) * usual)
        text = f"{tgs:.0f} tokens per GPU and second, usually {usual:.0f}: more than {drop:.0%} less"
        return self._update("slow", on, text, now)

    def _update(self, rule: str, on: bool | None, text: str, now: float) -> list[Alert]:
        return self._latches.update(rule, on, self._step, text, now)


def _either(on: bool, off: bool) -> bool | None:
    """True, False, or None between two thresholds."""
    return True if on else False if off else None


class _Latches:
    """Which alerts last, and when the others ended."""

    def __init__(self, cool_down_seconds: float) -> None:
        self._cool_down_seconds = cool_down_seconds
        self._begun: dict[str, float] = {}
        self._ended: dict[str, float] = {}

    def is_raised(self, rule: str) -> bool:
        return rule in self._begun

    def update(self, rule: str, on: bool | None, step: int | None, text: str, now: float) -> list[Alert]:
        """What there is to tell. `on` None: neither clearly on nor clearly off."""
        if on and rule not in self._begun and now - self._ended.get(rule, -math.inf) >= self._cool_down_seconds:
            self._begun[rule] = now
            return [Alert(rule, step, text, over=False)]
        if on is False and rule in self._begun:
            lasted = now - self._begun.pop(rule)
            self._ended[rule] = now
            return [Alert(rule, step, f"after {lasted:.0f} s", over=True)]
        return []
