"""The smallest run folders that show one thing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

BEGIN = datetime(2026, 11, 21, 10, 0, tzinfo=timezone.utc)


def at(seconds: float) -> str:
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def line(step: int, seg: int = 0, loss: float | None = 2.0, **more: Any) -> dict[str, Any]:
    """A step line, one second after the one before."""
    value = {"seg": seg, "time": at(step), "step": step, "loss": loss, "grad_norm": {"0_default": 1.0, "1_fp32": 0.0}}
    return {**value, "num_consumed_tokens": 10 * (step + 1), "folders": {"code": [10, loss, 0.5]}, **more}


def event(kind: str, seconds: float, seg: int = 0, **facts: Any) -> dict[str, Any]:
    return {"time": at(seconds), "seg": seg, "event": kind, **facts}


def write(path: Path, values: Iterable[Mapping[str, Any]], mode: str = "w") -> Path:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
    return path


def encoded(values: Iterable[Mapping[str, Any]]) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def run_folder(folder: Path, lines: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "metrics.jsonl", lines)
    write(folder / "events.jsonl", events)
    return folder
