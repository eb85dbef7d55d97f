"""The data of the page, JSON-able.

{"version", "generated", "live", "runs": [{"id", "name", "state", "folders", "series", "validation", ...}]}

Curves with more lines than points hold the minimum and maximum of each bucket of lines, which come from different lines
in different columns. Tokens, which the page divides into shares, are therefore bucket means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from internlm_lite.apps.report.columns import Columns, Numbers, seconds
from internlm_lite.apps.report.downsample import Buckets
from internlm_lite.apps.report.history import alerts, checkpoints, restarts, samples, stages, tasks, validation
from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.run_state import ACTIVE, last_of, run_state
from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.monitor.jsonl import finite

VERSION = 1
UNREADABLE = "unreadable"
"""The phase of a run that cannot be shown; "why" holds the reason."""
POINTS = 1000
MAX_POINTS = 4000
"""Most points of a curve, summed over all runs of a page."""
MAX_EVENTS = 500
_FP16 = ('"torch.float16"', '"torch.half"')
_ELSEWHERE = ("folders", "tasks")
DIGITS = 7
"""Significant digits of numbers in a curve."""


def make_payload(runs: Sequence[tuple[str, RunReader]], live: bool, now: datetime | None = None) -> dict[str, Any]:
    """The whole page's data; `runs` are (id, run). They come as last active; those that train, as started."""
    now = (now or datetime.now(timezone.utc)).astimezone()
    points = min(POINTS, MAX_POINTS // max(1, len(runs)))
    found = [safe_payload(name, run, now, points) for name, run in runs]
    return {
        "version": VERSION,
        "generated": now.isoformat(timespec="seconds"),
        "live": live,
        "runs": sorted(found, key=lambda run: _activity(run["state"]), reverse=True),
    }


def _activity(state: Mapping[str, Any]) -> tuple[bool, float]:
    active = state["phase"] in ACTIVE and state["started"] is not None
    return active, seconds(state["started" if active else "last_time"]) or 0.0


def safe_payload(identity: str, run: RunReader, now: datetime, points: int = POINTS) -> dict[str, Any]:
    """`run_payload`; if the run's files cannot be interpreted, an empty run with the reason."""
    why = run.error
    if why is None:
        try:
            return run_payload(identity, run, now, points)
        except Exception as error:  # noqa: BLE001  one run must not break the page of the others
            why = f"{type(error).__name__}: {error}"
    nothing = RunReader(run.folder, run.name)
    nothing.parsed = True
    found = run_payload(identity, nothing, now)
    return {**found, "state": {**found["state"], "phase": UNREADABLE, "why": why}}


def run_payload(identity: str, run: RunReader, now: datetime, points: int = POINTS) -> dict[str, Any]:
    """The data of one run. The current loss of a folder is its mean over the last `window` lines."""
    columns = run.columns
    restarted = restarts(run.events, columns.starts)
    saves = checkpoints(run.events)
    checks = validation(run.events)
    saved = [save for save in saves if save["done"] and not save["failed"]]
    last = {key: saved[-1][key] for key in ("step", "name", "time", "kind")} if saved else None
    facts = {
        "id": identity,
        "name": run.name,
        "folder": printable(run.folder),
        "parsing": not run.parsed,
        "bad_lines": columns.bad + run.bad_lines,
        "state": {**run_state(run, now), "restarts": len(restarted), "last_checkpoint": last},
        "window": window(columns.n),
        "change_from": None if columns.n <= lookback(columns.n) else int(columns.step[-1 - lookback(columns.n)]),
        "epoch_tokens": sum(_folder_tokens(run).values()) or None,
        "folders": folder_table(run, checks),
        "validation": checks,
        "tasks": tasks(run.events),
        "stages": stages(run.events, planned_stages(run)),
        "schedule": run.schedule,
        "checkpoints": saves,
        "samples": samples(run.samples, run.events),
        "events": [_short(event) for event in run.events[-MAX_EVENTS:]],
        "alerts": alerts(run.events)[-MAX_EVENTS:],
        "restarts": restarted,
        "config": run.config,
        "env": run.environment,
    }
    return {**finite(facts), "series": curves(run, points=points)}


def _short(event: dict[str, Any]) -> dict[str, Any]:
    """The event without the folders and tasks of an evaluation, which have places of their own."""
    return {key: value for key, value in event.items() if event["event"] != "evaluation" or key not in _ELSEWHERE}


def planned_stages(run: RunReader) -> list[tuple[int, int]]:
    """(step, stage) of the schedule; none without both."""
    pairs = zip(run.schedule.get("step", ()), run.schedule.get("stage", ()), strict=False)
    return [(step, int(stage)) for step, stage in pairs if stage is not None]


def window(lines: int) -> int:
    """Lines averaged for the current value: 10 or 2 %, at most a quarter of all, at least one."""
    return max(1, min(max(10, lines // 50), lines // 4))


def lookback(lines: int) -> int:
    """Lines from the window that a change is counted from to the last one: a tenth of all, or the window."""
    return max(window(lines), lines // 10)


def _folder_tokens(run: RunReader) -> dict[str, float]:
    """Tokens of each training folder, where they are known."""
    sizes = (last_of(run.events, "start") or {}).get("folder_tokens")
    sizes = sizes if isinstance(sizes, dict) else {}
    return {name: size for name, size in sizes.items() if isinstance(size, int | float) and size > 0}


def folder_table(run: RunReader, checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per folder, in the order of the run's data."""
    sizes = _folder_tokens(run)
    last_check = checks[-1]["folders"] if checks else {}
    columns = run.columns.folders
    sums = {name: int(np.nansum(values[:, 0])) for name, values in columns.items()}
    seen = {name: int(np.nansum(values[:, 3])) for name, values in columns.items()}
    total = sum(sums.values())
    rows = []
    for name, values in columns.items():
        size, check = sizes.get(name), last_check.get(name)
        rows.append(
            {
                "name": name,
                "tokens": sums[name],
                "share": sums[name] / total if total else 0.0,
                "seen": seen[name],
                "epochs": seen[name] / size if size else None,
                **_folder_figures(values),
                "val_loss": check[1] if isinstance(check, list) and len(check) == 3 else None,
                "val_acc": check[2] if isinstance(check, list) and len(check) == 3 else None,
            }
        )
    return rows


def _folder_figures(values: Numbers) -> dict[str, Any]:
    """Figures of [lines, (tokens, loss, acc, seen)] of a folder: of the window, or of the last line with tokens."""
    width = window(len(values))
    seen = np.flatnonzero((values[:, 0] > 0) & np.isfinite(values[:, 1]))
    loss, acc = _means(values[-width:])
    if loss is None and len(seen):
        loss, acc = _means(values[seen[-1:]])
    back = lookback(len(values))
    before, _ = _means(values[-width - back : -back])
    return {
        "loss": loss,
        "first_loss": float(values[seen[0], 1]) if len(seen) else None,
        "change": None if loss is None or before is None else loss - before,
        "acc": acc,
        "perplexity": None if loss is None or loss > 700 else math.exp(loss),
    }


def _means(values: Numbers) -> tuple[float | None, float | None]:
    """Loss and accuracy weighted by tokens; None without tokens."""
    values = values[(values[:, 0] > 0) & np.isfinite(values[:, 1])]
    if not len(values):
        return None, None
    tokens = values[:, 0]
    means = tokens @ values[:, 1] / tokens.sum(), tokens @ np.nan_to_num(values[:, 2]) / tokens.sum()
    return float(means[0]), float(means[1])


def curves(run: RunReader, begin: float = -math.inf, end: float = math.inf, points: int = POINTS) -> dict[str, Any]:
    """`series` of a run, with the loss scale only of fp16 training, or, without a config, where it changes."""
    found = series(run.columns, begin, end, points)
    dtype = next((row["value"] for row in run.config if row["key"] == "model.dtype"), None)
    scale = run.columns.scalars.get("loss_scale", np.empty(0))
    if not (np.nanmin(scale) < np.nanmax(scale) if dtype is None and len(scale) else dtype in _FP16):
        found.pop("loss_scale", None)
    return found


def series(columns: Columns, begin: float = -math.inf, end: float = math.inf, points: int = POINTS) -> dict[str, Any]:
    """The curves from step `begin` to step `end`, both included; more lines than `points` are cut into buckets."""
    low, high = np.searchsorted(columns.step, begin), np.searchsorted(columns.step, end, side="right")
    rows = slice(int(low), max(int(low), int(high)))
    step = columns.step[rows]
    buckets = Buckets(len(step), points)
    skipped = columns.scalars.get("inf_nan_skip_batches", np.zeros(columns.n))
    grew = np.flatnonzero(np.diff(np.fmax.accumulate(np.r_[0.0, skipped]))[rows] > 0)
    found: dict[str, Any] = {
        "from": int(step[0]) if len(step) else None,
        "to": int(step[-1]) if len(step) else None,
        "points": len(step),
        "step": numbers(buckets.positions(step)),
        "time": numbers(buckets.positions(columns.time[rows]), digits=None),
        "folders": {
            name: {
                "tokens": numbers(buckets.means(values[rows, 0])),
                "loss": numbers(buckets.extremes(values[rows, 1])),
                "acc": numbers(buckets.extremes(values[rows, 2])),
            }
            for name, values in columns.folders.items()
        },
        "skipped": numbers(step[grew]),
    }
    if columns.n > 1:
        found["batch_tokens"] = numbers(buckets.extremes(batch_tokens(columns)[rows]))
    return {**{key: numbers(buckets.extremes(y[rows])) for key, y in columns.scalars.items()}, **found}


def batch_tokens(columns: Columns) -> Numbers:
    """Tokens per step, float64 [lines], of the steps since the line before; of the first line, of those up to it."""
    consumed = columns.scalars.get("num_consumed_tokens")
    if consumed is None:
        return np.full(columns.n, np.nan)
    found = np.diff(consumed, prepend=np.nan) / np.diff(columns.step, prepend=np.nan)
    found[:1] = consumed[:1] / (columns.step[:1] + 1)
    return np.where(found > 0, found, np.nan)


def numbers(values: Numbers, digits: int | None = DIGITS) -> list[float | int | None]:
    """Values for JSON: whole numbers as int, others to `digits` significant digits, nan as None."""
    there = np.isfinite(values)
    kept = values[there]
    whole = bool((kept == np.trunc(kept)).all()) and bool((np.abs(kept) < 2**53).all())
    if not whole and digits is not None:
        kept = significant(kept, digits)
    plain: list[float | int | None] = (kept.astype(np.int64) if whole else kept).tolist()
    if there.all():
        return plain
    found = np.full(len(values), None, dtype=object)
    found[there] = plain
    return list(found)


def significant(values: Numbers, digits: int) -> Numbers:
    """The values rounded to `digits` significant digits."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.round(values * scale) / scale
    return np.where(np.isfinite(rounded), rounded, values)
