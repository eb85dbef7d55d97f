"""One run folder, read while it grows: figures as columns, events, samples, config and environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from internlm_lite.apps.report.columns import MAX_NUMBER, MAX_STEP, Columns
from internlm_lite.apps.report.history import as_int
from internlm_lite.apps.report.tail import LineDelta, Tail
from internlm_lite.apps.report.untrusted_files import printable, read_file
from internlm_lite.errors import ConfigError
from internlm_lite.monitor.jsonl import finite

RUN_FILES = ("metrics.jsonl", "events.jsonl", "config.resolved.yaml")
"""A folder that holds one of these is a run folder."""
_DOCUMENTS = ("config.resolved.yaml", "config.origins.json", "env.json", "schedule.json", "FAILED.json")
_MOST_PLANNED = 5000
"""A schedule with more points is left out: training writes 500."""


@dataclass(frozen=True)
class RunDelta:
    """Data added to the files of a run since the last poll."""

    lines: Mapping[str, LineDelta]
    """File name -> new lines."""
    documents: Mapping[str, tuple[float | None, str]]
    """Small files that changed: (seconds since the epoch, text); (None, "") for a removed file."""
    problem: OSError | None
    """The first error of a file that could not be read; all others were read."""

    def __bool__(self) -> bool:
        return any(self.lines.values()) or bool(self.documents)


class RunReader:
    """The content of a run folder, read incrementally. `name`: shown to users.

    `poll` reads files and changes no data; `ingest` changes data and reads no file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.is_log = False
        """Whether the run was read from a log: only step lines are known, not whether it has ended."""
        self.error: str | None = None
        """Why the data cannot be shown."""
        self.columns = Columns()
        self.events: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.config: list[dict[str, Any]] = []
        self.environment: dict[str, Any] = {}
        self.schedule: dict[str, list[Any]] = {}
        """schedule.json: columns of equal length over the whole run, "step" rising; empty without one."""
        self.failed: dict[str, Any] | None = None
        """FAILED.json, with "modified": seconds since the epoch."""
        self.bad_lines = 0
        """Invalid lines of events.jsonl and samples.jsonl; those of metrics.jsonl: columns.bad."""
        self.version = 0
        """Version number, increased with every change of the data."""
        self.parsed = False
        """Whether the files have been read to their end at least once."""
        self._tails = {name: Tail(folder / name) for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl")}
        self._seen: dict[str, tuple[int, int]] = {}
        self._origins: list[dict[str, Any]] = []
        self._plain_config: list[dict[str, Any]] = []

    def advance(self) -> bool:
        """Read and ingest new data, a few megabytes of step lines at most; False when there is nothing new.

        Raises ConfigError when a file cannot be read.
        """
        return self.ingest(self.poll())

    def poll(self) -> RunDelta:
        """Read the data that were added since the last poll."""
        lines: dict[str, LineDelta] = {}
        documents: dict[str, tuple[float | None, str]] = {}
        problem = None
        for name in (*self._tails, *_DOCUMENTS):
            try:
                if name in self._tails:
                    lines[name] = self._tails[name].read()
                    # All events, after the step lines: start events decide which step lines are superseded.
                    while name == "events.jsonl" and (more := self._tails[name].read()):
                        lines[name] = lines[name].merged(more)
                else:
                    documents |= self._changed(name)
            except OSError as error:
                problem = problem or error
        return RunDelta(lines, documents, problem)

    def ingest(self, delta: RunDelta) -> bool:
        """Add a delta to the data; False if it is empty. Finally raises ConfigError if a file could not be read."""
        takers = {"events.jsonl": self._events, "metrics.jsonl": self._metrics, "samples.jsonl": self._samples}
        for name, take in takers.items():
            if name in delta.lines:
                take(delta.lines[name])
        for name, (modified, text) in delta.documents.items():
            self._document(name, modified, text)
        self.version += bool(delta)
        if delta.problem is not None:
            path = printable(delta.problem.filename or self.folder)
            raise ConfigError(f"cannot read {path}: {delta.problem.strerror}") from delta.problem
        self.parsed = self.parsed or not delta
        return bool(delta)

    def read_all(self) -> RunReader:
        """Read to the end of all files; returns itself, for chaining. Raises ConfigError."""
        while self.advance():
            pass
        return self

    def _metrics(self, delta: LineDelta) -> None:
        if delta.replaced:
            self.columns = Columns()
            self._start_segments(self.events)
        self.columns.append(delta.lines)

    def _events(self, delta: LineDelta) -> None:
        if delta.replaced:
            self.events = []
        first = len(self.events)
        for value in self._objects(delta.lines):
            if isinstance(value.get("event"), str) and isinstance(value.get("time"), str):
                self.events.append({**value, "seg": max(0, as_int(value.get("seg")) or 0)})
            else:
                self.bad_lines += 1
        self._start_segments(self.events[first:])

    def _start_segments(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self.columns.max_segment = max(self.columns.max_segment, event["seg"])
            step, total = as_int(event.get("step")), as_int(event.get("total_steps"))
            if event["event"] == "start" and isinstance(event.get("folders"), list):
                self.columns.declare(str(name) for name in event["folders"])
            if event["event"] == "start" and step is not None:
                self.columns.start_segment(event["seg"], step, total if total and total > 0 else MAX_STEP)

    def _samples(self, delta: LineDelta) -> None:
        if delta.replaced:
            self.samples = []
        self.samples += self._objects(delta.lines)

    def _objects(self, lines: list[bytes]) -> list[dict[str, Any]]:
        values = [_json(line) for line in lines if line.strip()]
        good = [value for value in values if isinstance(value, dict)]
        self.bad_lines += len(values) - len(good)
        return good

    def _changed(self, name: str) -> dict[str, tuple[float | None, str]]:
        """{name: (time, text)} of a small file if it changed since the last poll, else {}."""
        path = self.folder / name
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if self._seen.get(name) == stamp:
                return {}
            text = read_file(path)
        except FileNotFoundError:
            return {} if self._seen.pop(name, None) is None else {name: (None, "")}
        self._seen[name] = stamp
        return {name: (status.st_mtime, text)}

    def _document(self, name: str, modified: float | None, text: str) -> None:
        value = _json(text)
        if name == "config.resolved.yaml":
            self._plain_config = _config(text)
        elif name == "config.origins.json":
            self._origins = _origins(value)
        elif name == "env.json":
            self.environment = value if isinstance(value, dict) else {}
        elif name == "schedule.json":
            self.schedule = _schedule(value)
        else:
            facts = value if isinstance(value, dict) else {}
            self.failed = None if modified is None else {**facts, "modified": modified}
        self.config = self._origins or self._plain_config


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _config(text: str) -> list[dict[str, Any]]:
    try:
        values = yaml.safe_load(text)
        return [{"key": key, "value": _text(value), "origin": None} for key, value in _flat(values) if key is not None]
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an invalid date, or a recursive value
        return []


def _origins(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        return []
    good = [row for row in rows if isinstance(row, dict) and isinstance(row.get("key"), str)]
    inner = {row["key"].rpartition(".")[0] for row in good}
    return [  # sections are left out: their keys have rows of their own
        {"key": row["key"], "value": _text(row.get("value")), "origin": row.get("origin")}
        for row in good
        if row["key"] not in inner
    ]


def _schedule(value: Any) -> dict[str, list[Any]]:
    """The columns that are as long as "step"; {} unless its steps are integers that rise."""
    steps = value.get("step") if isinstance(value, dict) else None
    if not isinstance(steps, list) or not 0 < len(steps) <= _MOST_PLANNED:
        return {}
    if not all(type(step) is int and 0 <= step < MAX_STEP for step in steps) or steps != sorted(set(steps)):
        return {}
    columns = {key: values for key, values in value.items() if isinstance(values, list) and len(values) == len(steps)}
    return {key: values for key, values in columns.items() if all(map(_is_figure, values))}


def _is_figure(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < MAX_NUMBER)


def _json(text: str | bytes) -> Any:
    """The parsed value with nan and inf as None; None for invalid JSON."""
    try:
        return finite(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    """The value as JSON, or as str() for YAML types that JSON lacks, such as dates."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return str(value)


def _flat(value: Any, key: str | None = None) -> list[tuple[str | None, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    if not isinstance(value, dict) or not value:
        return [(key, value)]
    return [
        pair for name, inner in value.items() for pair in _flat(inner, f"{name}" if key is None else f"{key}.{name}")
    ]
