"""Reads the step lines of a run like the report page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internlm_lite.apps.report.run import RunReader
from internlm_lite.monitor.jsonl import read_objects


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl by rising step: the newest of each step, without lines that a restart superseded."""
    steps = RunReader(path.parent, path.parent.name).read_all().columns.step.tolist()
    newest = {value.get("step"): value for value in read_objects(path)}
    return [newest[step] for step in steps]
