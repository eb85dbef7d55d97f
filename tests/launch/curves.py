"""The curve of a job that was started several times."""

from __future__ import annotations

from pathlib import Path

from tests.steps import read_metrics
from tests.train.runs import curve


def joined_curve(folder: Path, job: str = "launch", root: str = "RUN") -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step under <root>/<job>: of a step trained twice, the later start's."""
    runs = sorted(run for run in (folder / root / job).iterdir() if not run.is_symlink())
    steps = {step["step"]: step for run in runs for step in read_metrics(run / "metrics.jsonl")}
    assert sorted(steps) == list(range(len(steps))), "a step is missing"
    return curve([steps[step] for step in sorted(steps)])
