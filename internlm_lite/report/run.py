"""One run folder, read while it grows: figures as columns, events, samples, config and environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from internlm_lite.errors import ConfigError
from internlm_lite.monitor.jsonl import finite
from internlm_lite.report.columns import Columns
from internlm_lite.report.tail import Tail

SIGNS = ("metrics.jsonl", "events.jsonl", "config.resolved.yaml")
"""A folder that holds one of these is a run folder."""


class RunReader:
    """What is in a run folder by now. `name` is what people are shown."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
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
        self._seen: dict[str, tuple[int, int] | None] = {}

    def advance(self) -> bool:
        """Take in what the files gained, a few megabytes at most; False once there is nothing new.

        Raises ConfigError when a file cannot be read.
        """
        try:
            changed = [self._metrics(), self._events(), self._samples(), self._documents()]
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
        self.version += any(changed)
        self.parsed = self.parsed or not any(changed)
        return any(changed)

    def read_all(self) -> RunReader:
        """Everything there is now; itself, for chaining. Raises ConfigError."""
        while self.advance():
            pass
        return self

    def _metrics(self) -> bool:
        gain = self._tails["metrics.jsonl"].read()
        if gain.anew:
            self.columns = Columns()
        self.columns.append(gain.lines)
        return bool(gain)

    def _events(self) -> bool:
        gain = self._tails["events.jsonl"].read()
        if gain.anew:
            self.events = []
        for value in self._objects(gain.lines):
            if isinstance(value.get("event"), str) and isinstance(value.get("time"), str):
                self.events.append({**value, "seg": value["seg"] if type(value.get("seg")) is int else 0})
            else:
                self.bad_lines += 1
        return bool(gain)

    def _samples(self) -> bool:
        gain = self._tails["samples.jsonl"].read()
        if gain.anew:
            self.samples = []
        self.samples += self._objects(gain.lines)
        return bool(gain)

    def _objects(self, lines: list[bytes]) -> list[dict[str, Any]]:
        values = [_json(line) for line in lines if line.strip()]
        good = [value for value in values if isinstance(value, dict)]
        self.bad_lines += len(values) - len(good)
        return good

    def _documents(self) -> bool:
        """The small files that are written whole; each is read again when it changed."""
        readers: dict[str, Callable[[str], None]] = {
            "config.resolved.yaml": self._read_config,
            "config.origins.json": self._read_origins,
            "env.json": self._read_environment,
            "FAILED.json": self._read_failure,
        }
        changed = False
        for name, read in readers.items():
            path = self.folder / name
            try:
                status = path.stat()
            except FileNotFoundError:
                if self._seen.get(name) is not None:
                    self._seen[name] = None
                    read("{}")
                    changed = True
                continue
            stamp = (status.st_mtime_ns, status.st_size)
            if self._seen.get(name) != stamp:
                self._seen[name] = stamp
                read(path.read_text(encoding="utf-8", errors="replace"))
                changed = True
        return changed

    def _read_config(self, text: str) -> None:
        if self._seen.get("config.origins.json"):
            return
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
            return
        self.config = [
            {"key": key, "value": _text(value), "origin": None} for key, value in _flat(values) if key is not None
        ]

    def _read_origins(self, text: str) -> None:
        rows = _json(text)
        if isinstance(rows, list):
            whole = [row for row in rows if isinstance(row, dict) and isinstance(row.get("key"), str)]
            inner = {row["key"].rpartition(".")[0] for row in whole}
            self.config = [  # a section's keys have rows of their own
                {"key": row["key"], "value": _text(row.get("value")), "origin": row.get("origin")}
                for row in whole
                if row["key"] not in inner
            ]

    def _read_environment(self, text: str) -> None:
        value = _json(text)
        self.environment = value if isinstance(value, dict) else {}

    def _read_failure(self, text: str) -> None:
        value, stamp = _json(text), self._seen.get("FAILED.json")
        facts = value if isinstance(value, dict) else {}
        self.failed = None if stamp is None else {**facts, "modified": stamp[0] / 1e9}


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SIGNS)


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
