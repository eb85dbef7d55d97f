"""What the page shows of a run's recipe, in a real browser: stages, the schedule, averaged weights, tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.monitor.jsonl import read_objects
from tests.apps.report import made
from tests.apps.report.browser import Tab
from tests.apps.report.made import report

HOSTILE = made.HOSTILE[0]
TOTAL = 1000


def recipe_run(folder: Path, ramp: int = 100) -> Path:
    """300 of 1000 steps; the batch doubles at step `ramp`; stages from steps 150 and 600; evaluations of everything."""
    made.make_run(folder, made.STEPS, end=None)
    lines = list(read_objects(folder / "metrics.jsonl"))
    for line in lines:
        line["num_consumed_tokens"] = tokens(line["step"], ramp)
    made.write_lines(folder / "metrics.jsonl", lines, "w")
    found: list[dict[str, Any]] = []
    for event in read_objects(folder / "events.jsonl"):
        if event["event"] == "evaluation":
            averaged = {"loss": event["loss"] - 0.1, "acc": 0.7, "bits_per_byte": 0.9}
            scores = {"cloze_word": {"acc": event["step"] / 1000}, HOSTILE: {"acc": 0.5, "__proto__": 0.1}}
            event = {**event, "bits_per_byte": 1.1, "ema": averaged, "tasks": scores}
        found.append(event)
    border = {"time": made.time_of(150), "seg": 0, "event": "stage", "step": 150, "stage": 1}
    facts = {"weights": {HOSTILE: 2.0}, "seq_len": 4096, "rope_base": 5e5, "micro_bsz": 1, "lr": None}
    found.append({**border, "changed": {"seq_len": 4096, "weights": {HOSTILE: 2.0}}, **facts})
    made.write_lines(folder / "events.jsonl", sorted(found, key=lambda event: event["time"]), "w")
    steps = [*range(0, TOTAL, 10), TOTAL - 1]
    plan = {
        "step": steps,
        "lr": [3e-4 * (1 - step / TOTAL) for step in steps],
        "batch_tokens": [65536 * (1 + (step >= ramp)) for step in steps],
        "tokens": [tokens(step - 1, ramp) for step in steps],
        "momentum": [0.9 for _ in steps],
        "stage": [(step >= 150) + (step >= 600) for step in steps],
    }
    (folder / "schedule.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def tokens(step: int, ramp: int) -> int:
    return 65536 * (step + 1 + max(0, step + 1 - ramp))


def named(tab: Tab, title: str) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in tab.chart(title)["lines"]}


def test_the_recipe_of_a_run(tab: Tab, tmp_path: Path, pictures: Path) -> None:
    tab.open(report(recipe_run(tmp_path / "run")))
    assert tab.page.evaluate("page.bands") == [
        {"from": 0, "to": 150, "text": "stage 0"},
        {"from": 150, "to": 600, "text": "stage 1"},
        {"from": 600, "to": float("inf"), "text": "stage 2"},
    ]
    rate = tab.chart("Learning rate")
    assert rate["x"] == [0, TOTAL - 1] and tab.chart("Gradient norm")["x"] == [0, made.STEPS - 1]
    assert named(tab, "Learning rate")["planned"]["values"][-1] == pytest.approx(3e-4 / TOTAL)
    batch = named(tab, "Tokens per step")
    assert [value for value in batch["Tokens per step"]["values"] if value][98:102] == [65536, 65536, 131072, 131072]
    assert batch["planned"]["values"][-1] == 131072
    momenta = {name: line["values"][0] for name, line in named(tab, "Momentum and beta2").items()}
    assert momenta == {"beta2": 0.95, "planned momentum": 0.9}
    loss = named(tab, "Loss")
    pairs = zip(loss["validation"]["values"], loss["validation, averaged weights"]["values"], strict=True)
    points = [(raw, mean) for raw, mean in pairs if raw is not None]
    assert len(points) == 10 and all(mean == pytest.approx(raw - 0.1) for raw, mean in points)
    assert {line["values"][-1] for line in tab.chart("Bits per byte, validation")["lines"]} == {1.1, 0.9}
    assert set(named(tab, "Tasks: acc")) == {"cloze_word", HOSTILE}
    rows = tab.page.eval_on_selector_all("#stages tbody tr", "(rows) => rows.map((row) => row.innerText)")
    assert len(rows) == 3 and "seq_len: 4096" in rows[1] and HOSTILE in rows[1] and "planned" in rows[2]
    tab.picture(pictures, "recipe", whole=True)
    assert tab.violations() == [] and tab.spills() <= 0
    tab.press('#controls input[data-focus="mark:stage"]')
    assert tab.page.evaluate("page.bands") == []


def test_by_tokens_everything_lies_where_its_tokens_are(tab: Tab, tmp_path: Path) -> None:
    """Two runs whose batches grow at different steps: by step they differ, by tokens seen they lie side by side."""
    runs = recipe_run(tmp_path / "a", ramp=50), recipe_run(tmp_path / "b", ramp=250)
    tab.open(report(*runs))
    tab.press('#controls button[data-focus="x:tokens"]')
    last = tokens(made.STEPS - 1, 50)
    assert tab.chart("Loss")["x"] == [tokens(0, 50), last]
    assert tab.chart("Learning rate")["x"] == [tokens(0, 50), tokens(TOTAL - 1, 50)]
    lines = tab.chart("Tasks: acc")["lines"]
    assert {line["name"] for line in lines} == {f"{name} · {run}" for name in ("cloze_word", HOSTILE) for run in "ab"}
    bands = tab.page.evaluate("page.bands")
    first, second = (tokens(step, 50) for step in (150, 600))
    assert [band["from"] for band in bands[1:]] == pytest.approx([first, second], rel=1e-3)
    tab.press('#controls button[data-focus="x:time"]')  # what is to come has no time
    assert "planned · a" not in named(tab, "Learning rate")


def test_runs_of_different_stages_have_marks(tab: Tab, tmp_path: Path) -> None:
    first, second = recipe_run(tmp_path / "a"), recipe_run(tmp_path / "b")
    plan = json.loads((second / "schedule.json").read_text())
    plan["stage"] = [0 for _ in plan["step"]]
    (second / "schedule.json").write_text(json.dumps(plan))
    tab.open(report(first, second))
    assert tab.page.evaluate("page.bands") == []
    found = [mark for mark in tab.page.evaluate("page.marks") if mark["kind"] == "stage"]
    assert {(mark["x"], mark["text"]) for mark in found} == {
        (150, "stage 1 · a"), (600, "stage 2 · a"), (150, "stage 1 · b")
    }  # fmt: skip


def test_a_run_without_any_of_it(tab: Tab, runs: Path) -> None:
    tab.open(report(runs / "one"))
    assert tab.page.evaluate("page.bands") == [] and tab.page.locator("#stages").inner_text() == ""
    assert tab.page.locator('#controls input[data-focus="mark:stage"]').count() == 0
    assert [line["name"] for line in tab.chart("Learning rate")["lines"]] == ["Learning rate"]
    assert not [chart for chart in tab.page.evaluate("page.charts") if chart["title"].startswith(("Tasks", "Bits"))]
