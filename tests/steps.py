"""The step lines of a run, as the page counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internlm_lite.apps.report.run import RunReader
from internlm_lite.monitor.jsonl import read_objects


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl by rising step: of each step the newest, and nothing that a restart left behind."""
    steps = RunReader(path.parent, path.parent.name).read_all().columns.step.tolist()
    newest = {value.get("step"): value for value in read_objects(path)}
    return [newest[step] for step in steps]
