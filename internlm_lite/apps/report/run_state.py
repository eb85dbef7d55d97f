"""The state of a run, from its events and the age of its last line."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np

from internlm_lite.apps.report.columns import seconds
from internlm_lite.apps.report.history import ENDS, Event, as_int, checkpoints, of_kind
from internlm_lite.apps.report.run import RunReader

SILENT_SECONDS = 60.0
SLOW_PHASE_SECONDS = 600.0
"""Seconds without a line after which a run is silent; the longer limit holds while it starts or evaluates."""
_DIGITS = 16
"""A number of steps has fewer."""
SILENT_STEPS = 10.0
"""Or this number of usual intervals between step lines, if that is longer."""
ACTIVE = ("training", "saving", "evaluating", "starting")
_OVER = (*ENDS, "log")
PHASES = (*ACTIVE, "silent", *_OVER)
"""Phases in which no more lines are expected."""


def run_state(run: RunReader, now: datetime) -> dict[str, Any]:
    """The "state" of the page's payload; `restarts` and `last_checkpoint` are the caller's."""
    start = last_of(run.events, "start")
    phase, why = _phase(run, now)
    done = _steps_done(run, start, phase)
    total = total_steps(run)
    figures = {key: last_number(run, key) for key in ("tgs", "tflops", "mfu", "pack_fill", "loss", "eta_seconds")}
    tokens = last_number(run, "num_consumed_tokens")
    eta = figures["eta_seconds"]
    if eta is None and total and done is not None and (pace := seconds_per_step(run)):
        eta = pace * max(0, total - done)
    return {
        "phase": phase,
        "why": why,
        "step": done,
        "total_steps": total,
        "tokens": None if tokens is None else int(tokens),
        **figures,
        "eta_seconds": None if phase in _OVER else eta,
        "line_seconds": seconds_per_line(run),
        "last_time": last_time(run),
        "started": _started(run),
    }


def _steps_done(run: RunReader, start: Event | None, phase: str) -> int | None:
    """Steps done according to the last line, or to the end event: the last steps may have no line."""
    end = last_of(run.events, phase)
    step = as_int((end or {}).get("step") if phase in ENDS else (start or {}).get("step"))
    if run.columns.n and not (phase in ENDS and step is not None):
        return int(run.columns.step[-1]) + 1
    return step


def _phase(run: RunReader, now: datetime) -> tuple[str, str]:
    if not run.parsed:
        return "starting", "its files are still being read"
    if run.is_log:
        return "log", f"ends at {time}" if (time := last_time(run)) else ""
    start, end = last_of(run.events, "start"), last_of(run.events, *ENDS)
    started = seconds(start["time"]) if start else None
    if run.failed is not None and (started is None or run.failed["modified"] >= started):
        return "failed", _failure_text(run.failed.get("cause")) or str(
            (last_of(run.events, "failed") or {}).get("why", "")
        )
    if end is not None and run.events.index(end) > (run.events.index(start) if start else -1):
        return end["event"], str(end.get("why", ""))
    phase = _active_phase(run, start)
    age, patience = _age(run, now), _silence_limit(run, phase)
    if age is not None and age > patience:
        return "silent", f"no line since {last_time(run)}; it was {phase}"
    return phase, ""


def _active_phase(run: RunReader, start: Event | None) -> str:
    """The phase of a run that has not ended, as of its last line or event."""
    columns = run.columns
    newest = columns.time[-1] if columns.n else -np.inf
    events = [event for event in run.events if start is None or event["seg"] == start["seg"]]
    evaluating = last_of(events, "evaluating", "evaluation")
    if evaluating and evaluating["event"] == "evaluating" and newest <= (seconds(evaluating["time"]) or np.inf):
        return "evaluating"
    saves = checkpoints(events)
    if saves and saves[-1]["done"] is None and saves[-1]["failed"] is None:
        return "saving"
    return "training" if columns.n and (start is None or start["seg"] <= columns.segment) else "starting"


def _silence_limit(run: RunReader, phase: str) -> float:
    pace = seconds_per_line(run) or 0.0
    return max(SILENT_SECONDS if phase in ("training", "saving") else SLOW_PHASE_SECONDS, SILENT_STEPS * pace)


def _failure_text(cause: object) -> str:
    """The record of faults/failure.py about the rank that failed first, as text; empty for anything else."""
    if not isinstance(cause, dict) or "kind" not in cause:
        return ""
    at = f", step {cause['step']}" if cause.get("step") is not None else ""
    return f"rank {cause.get('rank')} on {cause.get('host')}{at}: {cause['kind']}: {cause.get('message')}"


def _age(run: RunReader, now: datetime) -> float | None:
    last = seconds(last_time(run) or run.environment.get("time"))
    return None if last is None else now.timestamp() - last


def last_time(run: RunReader) -> str | None:
    """The time of the newest line or event, as written."""
    times = [run.columns.last_time, run.events[-1]["time"] if run.events else None]
    return max((time for time in times if time), key=lambda time: seconds(time) or 0.0, default=None)


def last_of(events: list[Event], *kinds: str) -> Event | None:
    return next((event for event in reversed(events) if event["event"] in kinds), None)


def last_number(run: RunReader, key: str) -> float | None:
    """The number at `key` in the last line; None if it has none."""
    column = run.columns.scalars.get(key)
    return None if column is None or not len(column) or np.isnan(column[-1]) else float(column[-1])


def total_steps(run: RunReader) -> int | None:
    """Steps of the whole run, from the newest start event, else from the config."""
    start = last_of(run.events, "start")
    total = as_int(start.get("total_steps")) if start else None
    if total is None:
        text = next((row["value"] for row in run.config if row["key"] == "data.total_steps"), "")
        total = int(text) if text.isdecimal() and len(text) < _DIGITS else None
    return total


def seconds_per_line(run: RunReader) -> float | None:
    """Median interval of the newest lines, which ignores pauses of days; None with fewer than two lines."""
    gaps = np.diff(run.columns.time[-101:])
    return float(np.nanmedian(gaps)) if np.isfinite(gaps).any() else None


def seconds_per_step(run: RunReader) -> float | None:
    """Median seconds per step; a line may cover several steps."""
    gaps = np.diff(run.columns.time[-101:]) / np.diff(run.columns.step[-101:])
    return float(np.nanmedian(gaps)) if np.isfinite(gaps).any() else None


def _started(run: RunReader) -> str | None:
    first = of_kind(run.events, "start")[:1]
    if first:
        return str(first[0]["time"])
    if run.columns.n and np.isfinite(run.columns.time[0]):
        return datetime.fromtimestamp(float(run.columns.time[0])).astimezone().isoformat(timespec="seconds")
    time = run.environment.get("time")
    return time if isinstance(time, str) else None
