"""What a run is said to be doing."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.run_state import run_state
from internlm_lite.faults.failure import Failure, record
from tests.apps.report.small import BEGIN, at, event, line, run_folder

START = event("start", -5, step=0, total_steps=100)
STEPS = [line(step, tgs=50.0, eta_seconds=97.0 - step) for step in range(3)]


def state(folder: Path, lines: list[dict], events: list[dict], now: float = 5) -> dict[str, Any]:
    run = RunReader(run_folder(folder, lines, events), "run").read_all()
    return run_state(run, BEGIN + timedelta(seconds=now))


@pytest.mark.parametrize(
    ("events", "now", "phase", "why"),
    [
        ([START], 5, "training", ""),
        ([START], 63, "silent", f"no line since {at(2)}; it was training"),
        ([START, event("checkpoint", 3, name="a", step=2, waited=False)], 5, "saving", ""),
        ([START, event("checkpoint", 3, name="a", step=2), event("checkpoint_done", 4, name="a")], 5, "training", ""),
        ([START, event("checkpoint", 3, name="a", step=2), event("alarm", 4, checkpoint="a")], 5, "training", ""),
        ([START, event("checkpoint", 3, name="a", step=2, waited=True)], 5, "training", ""),
        ([START, event("evaluating", 3, step=2)], 300, "evaluating", ""),
        ([START, event("evaluating", 1.5, step=1)], 5, "training", ""),
        ([START, event("evaluating", 3, step=2), event("evaluation", 4, step=2)], 5, "training", ""),
        ([START, event("done", 3, step=100)], 10_000, "done", ""),
        ([START, event("stopped", 3, step=2, why="SIGTERM")], 10_000, "stopped", "SIGTERM"),
        ([START, event("failed", 3, why="out of memory", rank=3)], 10_000, "failed", "out of memory"),
        ([START, event("failed", 3, why="x", rank=3), event("start", 4, 1, step=2)], 5, "starting", ""),
        ([START, event("done", 3), event("start", 4, 1, step=3)], 10_000, "silent", None),
        ([], 5, "training", ""),
    ],
)
def test_phase(tmp_path: Path, events: list[dict], now: float, phase: str, why: str | None) -> None:
    found = state(tmp_path, STEPS, events, now)
    assert found["phase"] == phase
    assert why is None or found["why"] == why


def test_a_slow_run_is_not_silent_for_its_usual_pace(tmp_path: Path) -> None:
    lines = [line(step, time=at(100 * step)) for step in range(3)]
    assert state(tmp_path, lines, [], 1100)["phase"] == "training"
    assert state(tmp_path, lines, [], 1300)["phase"] == "silent"


def test_a_pause_of_days_changes_no_pace(tmp_path: Path) -> None:
    lines = [line(step, time=at(step + 400_000 * (step > 4))) for step in range(9)]
    found = state(tmp_path, lines, [START], 400_010)
    assert (found["phase"], found["line_seconds"], found["eta_seconds"]) == ("training", 1.0, 91.0)
    assert state(tmp_path, lines, [START], 400_100)["phase"] == "silent"


def test_figures(tmp_path: Path) -> None:
    found = state(tmp_path, STEPS, [START])
    assert found["step"] == 3
    assert found["total_steps"] == 100
    assert found["tokens"] == 30
    assert found["eta_seconds"] == 95.0
    assert (found["loss"], found["tgs"], found["mfu"]) == (2.0, 50.0, None)
    assert (found["started"], found["last_time"]) == (at(-5), at(2))


def test_eta_from_the_pace_where_lines_have_none(tmp_path: Path) -> None:
    lines = [line(step, time=at(2 * step)) for step in (4, 9, 14)]
    assert state(tmp_path, lines, [START])["eta_seconds"] == 2 * 85
    assert state(tmp_path, lines, [START, event("done", 90)])["eta_seconds"] is None


def test_before_the_first_step_and_before_anything(tmp_path: Path) -> None:
    assert state(tmp_path / "a", [], [START], 5)["phase"] == "starting"
    assert state(tmp_path / "a", [], [START], 700)["phase"] == "silent"
    found = state(tmp_path / "b", [], [])
    assert (found["phase"], found["step"], found["last_time"], found["started"]) == ("starting", None, None, None)


def test_failed_json_says_why_unless_the_run_started_again(tmp_path: Path) -> None:
    path = tmp_path / "FAILED.json"
    failure = Failure(3, "node-1", 17, "forward", "OutOfMemoryError", "no <memory>", exit_code=1, follows=False)
    record(tmp_path, failure)
    record(tmp_path, replace(failure, rank=0, kind="lost", follows=True))
    os.utime(path, (BEGIN.timestamp() + 4, BEGIN.timestamp() + 4))
    found = state(tmp_path, STEPS, [START, event("failed", 3, why="rank 0 was lost")])
    why = "rank 3 on node-1, step 17: OutOfMemoryError: no <memory>"
    assert (found["phase"], found["why"]) == ("failed", why)
    found = state(tmp_path, STEPS, [START, event("start", 5, 1, step=2)], 6)
    assert found["phase"] == "starting"


@pytest.mark.parametrize("text", ["{}", "[1]", '{"cause": 5}', '{"cause": {"rank": 1}}', "{"])
def test_another_failed_json_leaves_it_to_the_event(tmp_path: Path, text: str) -> None:
    (tmp_path / "FAILED.json").write_text(text)
    found = state(tmp_path, STEPS, [START, event("failed", 3, why="disk full")])
    assert (found["phase"], found["why"]) == ("failed", "disk full")
    assert state(tmp_path, STEPS, [START])["why"] == ""


def test_before_the_first_line_of_a_resume_the_tail_is_gone(tmp_path: Path) -> None:
    found = state(tmp_path, STEPS, [START, event("start", 4, 1, step=1, total_steps=100)])
    assert (found["phase"], found["step"]) == ("starting", 1)


def test_numbers_that_no_run_has(tmp_path: Path) -> None:
    found = state(tmp_path, STEPS, [event("start", -5, step=10**400, total_steps=10**400)])
    assert (found["total_steps"], found["step"]) == (None, 3)
    (tmp_path / "config.resolved.yaml").write_text(f"data: {{total_steps: {'9' * 4000}}}")
    assert state(tmp_path, STEPS, [])["total_steps"] is None


def test_while_files_are_read_the_first_time(tmp_path: Path) -> None:
    run = RunReader(run_folder(tmp_path, STEPS, [START]), "run")
    run.advance()
    assert run_state(run, BEGIN)["phase"] == "starting"
    assert not run.advance()
    assert run_state(run, BEGIN)["phase"] == "training"
