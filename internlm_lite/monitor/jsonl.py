"""metrics.jsonl, events.jsonl, samples.jsonl: append-only, one JSON object a line, readable while they grow.

    {"seg":0,"step":12,"loss":3.21,...,"folders":{"code":[tokens,loss,acc]},"seen":{"code":tokens}}     never NaN: null

A folder that is not named had no token in the step. `seg` counts the starts of a run. A start continues from a
checkpoint and repeats the steps after it: readers drop what earlier starts wrote at and after the first step of a later
one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from internlm_lite.monitor.record import Sample, Sink, StepRecord

logger = logging.getLogger("internlm_lite")

_NESTED = ("time", "speed", "folders", "origin", "stage", "in_pass")
_PLAIN = tuple(field.name for field in dataclasses.fields(StepRecord) if field.name not in _NESTED)
_SEGMENT = re.compile(rb'"seg":\s*(\d+)')
"""Cannot match inside a JSON string, where quotes are escaped."""


class JsonlWriter:
    """Appends objects to a file, unbuffered, from any thread. A failure is logged once and never raised."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._failed = False
        self._descriptor: int | None = None
        self._torn = True  # whether the file may end in an incomplete line, of this or an earlier process

    def write(self, value: Mapping[str, Any]) -> None:
        """Append `value` as one line; nan and inf become null."""
        text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"), ensure_ascii=False) + "\n"
        with self._lock:
            try:
                self._append(text.encode("utf-8", "backslashreplace"))
            except OSError as error:
                self._torn = True
                if not self._failed:
                    self._failed = True
                    text = "cannot write %s: %s; training goes on without these lines"
                    logger.warning(text, self.path, error.strerror)

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        if self._torn:
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            self._torn = False
        while line:  # a nearly full disk may write only a part
            line = line[os.write(self._descriptor, line) :]

    def close(self) -> None:
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


class _RunFile(Sink):
    """A file of the run folder; each line has the number of the start that wrote it."""

    def __init__(self, path: Path, segment: int) -> None:
        self._segment = segment
        self._writer = JsonlWriter(path)

    def close(self) -> None:
        self._writer.close()


class MetricsFile(_RunFile):
    """metrics.jsonl: one object per step line."""

    def step(self, record: StepRecord) -> None:
        self._writer.write(step_object(record, self._segment))


class EventsFile(_RunFile):
    """events.jsonl: events with their time, such as a checkpoint, an alert, the end."""

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._writer.write({"time": _now(), "seg": self._segment, "event": kind, **facts})


class SamplesFile(_RunFile):
    """samples.jsonl: continuations of prompts after `step` steps; if a step is repeated, its last lines are valid."""

    def sample(self, sample: Sample) -> None:
        self._writer.write({"time": _now(), "seg": self._segment, **dataclasses.asdict(sample)})


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="milliseconds")


def step_object(record: StepRecord, segment: int) -> dict[str, Any]:
    """The object of one step; keys as in the step line, speeds flat, folders with tokens as name: [labels, loss, acc].

    "seen": all tokens of the folders of which some have no label; of the others all are labels, or it is not known.
    """
    folders = {name: folder for name, folder in record.folders.items() if folder.tokens or folder.seen}
    seen = {name: folder.seen for name, folder in folders.items() if folder.seen not in (None, folder.tokens)}
    return {
        "seg": segment,
        "time": record.time.isoformat(timespec="milliseconds"),
        **{key: getattr(record, key) for key in _PLAIN},
        **({} if record.stage is None else {"stage": record.stage}),
        **({} if record.in_pass is None else dataclasses.asdict(record.in_pass)),
        **dataclasses.asdict(record.speed),
        "folders": {name: [folder.tokens, folder.loss, folder.acc] for name, folder in folders.items()},
        **({"seen": seen} if seen else {}),
    }


def finite(value: Any) -> Any:
    """`value`, nested, with nan and inf replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file in order; none if it does not exist. Incomplete lines (crash, full disk) are skipped."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def has_ended(path: Path) -> bool:
    """Whether the last start in this events.jsonl recorded that all steps are done."""
    last = (-1, "")
    for value in read_objects(path):
        segment, kind = value.get("seg"), value.get("event")
        # A suspended process of an earlier start may still write.
        if isinstance(segment, int) and segment >= last[0] and kind in ("start", "failed", "done"):
            last = (segment, kind)
    return last[1] == "done"


def is_evaluated(path: Path, step: int, what: str = "evaluation") -> bool:
    """Whether this events.jsonl has an evaluation after `step` that no later start will repeat. `what`: the kind of its
    event, "tasks" of tasks alone."""
    found = False
    for value in read_objects(path):
        kind, at = value.get("event"), value.get("step")
        if kind == what and at == step:
            found = True
        elif kind == "start" and isinstance(at, int) and at <= step:
            found = False
    return found


def next_segment(*paths: Path) -> int:
    """The segment of a new start: one more than the highest in the files, 0 if they are new."""
    highest = -1
    for path in paths:
        if path.exists():
            with path.open("rb") as file:
                found = (int(match[1]) for line in file if (match := _SEGMENT.search(line)))
                highest = max(highest, max(found, default=-1))
    return highest + 1
