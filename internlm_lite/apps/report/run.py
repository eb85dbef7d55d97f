"""One run folder, read while it grows: figures as columns, events, samples, config and environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from internlm_lite.apps.report.columns import MAX_STEP, Columns
from internlm_lite.apps.report.history import as_int
from internlm_lite.apps.report.tail import LineDelta, Tail
from internlm_lite.apps.report.untrusted_files import printable, read_file
from internlm_lite.errors import ConfigError
from internlm_lite.monitor.jsonl import finite

RUN_FILES = ("metrics.jsonl", "events.jsonl", "config.resolved.yaml")
"""A folder that holds one of these is a run folder."""
_DOCUMENTS = ("config.resolved.yaml", "config.origins.json", "env.json", "FAILED.json")


@dataclass(frozen=True)
class RunDelta:
    """What the files of a run have gained."""

    gains: Mapping[str, LineDelta]
    """By file."""
    documents: Mapping[str, tuple[float | None, str]]
    """Small files that changed: (seconds since the epoch, text), or (None, "") of one that is gone."""
    problem: OSError | None
    """Of a file that could not be read; the others were."""

    def __bool__(self) -> bool:
        return any(self.gains.values()) or bool(self.documents)


class RunReader:
    """What is in a run folder by now. `name` is what people are shown.

    `look` waits for the disk and changes nothing that is shown, `ingest` is the other way round.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.is_log = False
        """There is but a log's step lines: whether the run has ended is not to be known."""
        self.error: str | None = None
        """Why what there is cannot be shown."""
        self.columns = Columns()
        self.events: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.config: list[dict[str, Any]] = []
        self.environment: dict[str, Any] = {}
        self.failed: dict[str, Any] | None = None
        """FAILED.json, with its age as "modified": seconds since the epoch."""
        self.bad_lines = 0
        """Lines of events.jsonl and samples.jsonl that could not be read; those of step lines: columns.bad."""
        self.version = 0
        """Grows with everything that is taken in."""
        self.parsed = False
        """The files were read to their end once."""
        self._tails = {name: Tail(folder / name) for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl")}
        self._seen: dict[str, tuple[int, int]] = {}
        self._origins: list[dict[str, Any]] = []
        self._plain_config: list[dict[str, Any]] = []

    def advance(self) -> bool:
        """Take in what the files gained, of step lines a few megabytes at most; False once there is nothing new.

        Raises ConfigError when a file cannot be read.
        """
        return self.ingest(self.look())

    def look(self) -> RunDelta:
        """What is new since the last look."""
        gains: dict[str, LineDelta] = {}
        documents: dict[str, tuple[float | None, str]] = {}
        problem = None
        for name in (*self._tails, *_DOCUMENTS):
            try:
                if name in self._tails:
                    gains[name] = self._tails[name].read()
                    # All of them, and after the step lines: only starts say which of these count.
                    while name == "events.jsonl" and (more := self._tails[name].read()):
                        gains[name] = gains[name].merged(more)
                else:
                    documents |= self._changed(name)
            except OSError as error:
                problem = problem or error
        return RunDelta(gains, documents, problem)

    def ingest(self, news: RunDelta) -> bool:
        """False when there is nothing in it. Raises ConfigError, at last, when a file could not be read."""
        takers = {"events.jsonl": self._events, "metrics.jsonl": self._metrics, "samples.jsonl": self._samples}
        for name, take in takers.items():
            if name in news.gains:
                take(news.gains[name])
        for name, (modified, text) in news.documents.items():
            self._document(name, modified, text)
        self.version += bool(news)
        if news.problem is not None:
            path = printable(news.problem.filename or self.folder)
            raise ConfigError(f"cannot read {path}: {news.problem.strerror}") from news.problem
        self.parsed = self.parsed or not news
        return bool(news)

    def read_all(self) -> RunReader:
        """Everything there is now; itself, for chaining. Raises ConfigError."""
        while self.advance():
            pass
        return self

    def _metrics(self, gain: LineDelta) -> None:
        if gain.replaced:
            self.columns = Columns()
            self._announce(self.events)
        self.columns.append(gain.lines)

    def _events(self, gain: LineDelta) -> None:
        if gain.replaced:
            self.events = []
        first = len(self.events)
        for value in self._objects(gain.lines):
            if isinstance(value.get("event"), str) and isinstance(value.get("time"), str):
                self.events.append({**value, "seg": max(0, as_int(value.get("seg")) or 0)})
            else:
                self.bad_lines += 1
        self._announce(self.events[first:])

    def _announce(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self.columns.max_segment = max(self.columns.max_segment, event["seg"])
            step, total = as_int(event.get("step")), as_int(event.get("total_steps"))
            if event["event"] == "start" and step is not None:
                self.columns.start_segment(event["seg"], step, total if total and total > 0 else MAX_STEP)

    def _samples(self, gain: LineDelta) -> None:
        if gain.replaced:
            self.samples = []
        self.samples += self._objects(gain.lines)

    def _objects(self, lines: list[bytes]) -> list[dict[str, Any]]:
        values = [_json(line) for line in lines if line.strip()]
        good = [value for value in values if isinstance(value, dict)]
        self.bad_lines += len(values) - len(good)
        return good

    def _changed(self, name: str) -> dict[str, tuple[float | None, str]]:
        """A small file that is written whole, when it changed since the last look."""
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
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none, or a value inside itself
        return []


def _origins(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        return []
    good = [row for row in rows if isinstance(row, dict) and isinstance(row.get("key"), str)]
    inner = {row["key"].rpartition(".")[0] for row in good}
    return [  # a section's keys have rows of their own
        {"key": row["key"], "value": _text(row.get("value")), "origin": row.get("origin")}
        for row in good
        if row["key"] not in inner
    ]


def _json(text: str | bytes) -> Any:
    """The value with nan and inf as None; None for what is no JSON."""
    try:
        return finite(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    """As JSON, or as Python shows what YAML has and JSON has not."""
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
