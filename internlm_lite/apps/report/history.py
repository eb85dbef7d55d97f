"""Lists computed from events.jsonl and samples.jsonl: checkpoints, validation, alerts, restarts, samples.

Pure functions of the events in file order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from internlm_lite.apps.report.columns import seconds

Event = dict[str, Any]

_CHECKPOINT_RULE = "checkpoint_failed"
_STEP_OF_NAME = re.compile(r"(?:step )?0*(\d{1,15})")
_EXACT = 1 << 53
"""Smaller integers are exact in JSON, Python and JavaScript."""
ENDS = ("done", "stopped", "failed")


def of_kind(events: Iterable[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event["event"] in kinds]


def restarts(events: Sequence[Event], first_steps: dict[int, int]) -> list[Event]:
    """{"seg", "step", "time"} of every segment after the first. `first_steps`: segment -> first step of its lines."""
    starts = {event["seg"]: event for event in of_kind(events, "start")}
    segments = sorted({*starts, *first_steps})
    return [
        {
            "seg": segment,
            "step": as_int(starts.get(segment, {}).get("step"), first_steps.get(segment)),
            "time": starts.get(segment, {}).get("time"),
        }
        for segment in segments[1:]
    ]


def checkpoints(events: Iterable[Event]) -> list[Event]:
    """Every save in event order, with its result; a save that was skipped or failed early has no name."""
    saves: list[Event] = []
    for event in of_kind(events, "checkpoint", "checkpoint_done", "alarm"):
        if event["event"] == "checkpoint":
            saves.append(_save(event))
            continue
        name = event.get("name" if event["event"] == "checkpoint_done" else "checkpoint")
        save = next((save for save in reversed(saves) if save["name"] == name), None)
        if event["event"] == "alarm":
            if save is None:
                save = {**_save({}), "time": event["time"], "step": _step_in(name), "failed": None}
                saves.append(save)
            save["failed"] = str(event.get("why", event.get("what", "failed")))
        elif save is not None:
            save["done"] = event["time"]
            save["seconds"] = _span(save["time"], event["time"], save["stall_seconds"])
    return saves


def _save(event: Event) -> Event:
    name, time, stall = event.get("name"), event.get("time"), event.get("stall_seconds")
    stall = stall if isinstance(stall, int | float) and abs(stall) < _EXACT else None
    waited = event.get("event") == "checkpoint" and _is_saved(event)
    return {
        "step": as_int(event.get("step")),
        "name": str(name or ""),
        "kind": str(event.get("saved") or ""),
        "time": time,
        "done": time if waited else None,
        "seconds": stall if waited else None,
        "stall_seconds": stall,
        "failed": None if name else "skipped: the one before was still being written",
    }


def _span(begin: str, end: str, before: float | None) -> float | None:
    first, last = seconds(begin), seconds(end)
    return None if first is None or last is None else round(max(0.0, last - first) + (before or 0.0), 3)


def _step_in(name: object) -> int | None:
    found = _STEP_OF_NAME.match(str(name))
    return int(found[1]) if found else None


def validation(events: Iterable[Event]) -> list[Event]:
    """Evaluations by rising step, without those that a restart superseded."""
    kept: list[Event] = []
    for event in of_kind(events, "start", "evaluation"):
        step = as_int(event.get("step"))
        if step is None:
            continue
        while kept and kept[-1]["step"] >= step:
            kept.pop()
        if event["event"] == "evaluation":
            folders = event.get("folders")
            folders = folders if isinstance(folders, dict) else {}
            figures = {key: event.get(key) for key in ("loss", "train_loss", "acc", "bits_per_byte")}
            averaged = event.get("ema")
            averaged = averaged if isinstance(averaged, dict) else {}
            kept.append({"step": step, **figures, "ema": numbers_of(averaged), "folders": folders})
    return kept


def tasks(events: Iterable[Event]) -> list[Event]:
    """{"step", "tasks": task -> metric -> value} by rising step, without those that a restart superseded."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for event in of_kind(events, "start", "evaluation", "tasks"):
        step, scores = as_int(event.get("step")), event.get("tasks")
        if step is None:
            continue
        if event["event"] == "start":
            found = {before: kept for before, kept in found.items() if before < step}
        elif isinstance(scores, dict):
            of_step = found.setdefault(step, {})
            of_step |= {name: numbers_of(figures) for name, figures in scores.items() if isinstance(figures, dict)}
    return [{"step": step, "tasks": found[step]} for step in sorted(found)]


def numbers_of(values: dict[str, Any]) -> dict[str, float]:
    """Those of the values that are numbers."""
    return {name: value for name, value in values.items() if type(value) in (int, float) and abs(value) < _EXACT}


def stages(events: Sequence[Event], planned: Sequence[tuple[int, int]] = ()) -> list[Event]:
    """{"stage", "from": first step, "planned", "values": what the event says of it} by rising step.

    `planned`: (step, stage) of the schedule, by rising step: borders that lie behind the last event. A run without any
    border has no stages."""
    found: dict[int, Event] = {}
    for event in of_kind(events, "start", "stage"):
        step, number = as_int(event.get("step")), as_int(event.get("stage"))
        if step is None:
            continue
        if event["event"] == "start":
            found = {before: kept for before, kept in found.items() if before < step}
        elif number is not None:
            changed = event.get("changed")
            values = {str(name): _words(value) for name, value in changed.items()} if isinstance(changed, dict) else {}
            found[step] = {"stage": number, "from": step, "planned": False, "values": values}
    done = {item["stage"] for item in found.values()}
    borders = [later for before, later in pairwise(planned) if later[1] != before[1] and later[1] not in done]
    for step, number in borders:
        found.setdefault(step, {"stage": number, "from": step, "planned": True, "values": {}})
    if not found:
        return []
    first = planned[0][1] if planned else min(item["stage"] for item in found.values()) - 1
    found.setdefault(0, {"stage": max(0, first), "from": 0, "planned": False, "values": {}})
    return [found[step] for step in sorted(found)]


def _words(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def alerts(events: Sequence[Event]) -> list[Event]:
    """Raised alerts in order; `over` once the condition ended, the run ended, or the run restarted.

    In a run without checkpoint alerts, "alarm" events about checkpoints take their place.
    """
    alarms_count = all(event.get("rule") != _CHECKPOINT_RULE for event in of_kind(events, "alert"))
    raised: list[Event] = []
    for event in events:
        kind = event["event"]
        if kind == "alert" or (kind == "alarm" and alarms_count):
            rule, text = event.get("rule", _CHECKPOINT_RULE), event.get("text", event.get("why", ""))
            facts = {"rule": str(rule), "step": event.get("step"), "text": str(text), "time": event["time"]}
            raised.append({**facts, "over": False})
        elif kind in ("start", "alert_over", *ENDS) or _is_saved(event):
            ended = event.get("rule", _CHECKPOINT_RULE)
            for alert in raised:
                alert["over"] = alert["over"] or kind in ("start", *ENDS) or alert["rule"] == ended
    return raised


def _is_saved(event: Event) -> bool:
    waited = event.get("waited") is True and event.get("name") is not None
    return event["event"] == "checkpoint_done" or (event["event"] == "checkpoint" and waited)


def samples(lines: Iterable[dict[str, Any]], events: Iterable[Event]) -> list[dict[str, Any]]:
    """Samples by rising step: the newest per step and prompt, without those that a restart superseded."""
    starts = [(event["seg"], as_int(event.get("step")) or 0) for event in of_kind(events, "start")]
    newest: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        step, prompt, text = as_int(line.get("step")), line.get("prompt"), line.get("text")
        if step is None or not isinstance(prompt, str) or not isinstance(text, str):
            continue
        segment = as_int(line.get("seg")) or 0
        if not any(segment < later and step > start for later, start in starts):
            newest[step, prompt] = {"step": step, "prompt": prompt, "text": text, "time": line.get("time")}
    return sorted(newest.values(), key=lambda sample: sample["step"])


def as_int(*values: object) -> int | None:
    """The first value that is an integer below _EXACT; None if there is none."""
    return next((value for value in values if type(value) is int and abs(value) < _EXACT), None)
