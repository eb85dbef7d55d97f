"""Every example runs as it stands, and is short enough to be read at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
JOBS = {
    "own_data": "own_data/RUN/own_data",
    "own_layer": "RUN/own_layer",
    "own_sink": "RUN/own_sink",
    "own_update_rule": "RUN/signum",
}
"""Where each writes its run."""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / JOBS[example.stem] / "latest"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 20 and losses[-1] < losses[0]
    if example.stem == "own_data":
        assert {name for line in lines for name in json.loads(line)["folders"]} == {"email", "json"}
    if example.stem == "own_sink":
        rows = [row.split(",") for row in (folder / "loss.csv").read_text().splitlines()]
        assert [float(row[1]) for row in rows if len(row) == 3] == losses


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text("utf-8").splitlines()) < 60
