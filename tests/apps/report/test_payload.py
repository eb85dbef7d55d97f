"""The data of the page."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.apps.report.columns import Columns
from internlm_lite.apps.report.payload import MAX_EVENTS, UNREADABLE, make_payload, numbers, run_payload, series, window
from internlm_lite.apps.report.run import RunReader
from tests.apps.report.small import BEGIN, at, encoded, event, line, run_folder


def payload_of(folder: Path, lines: list[dict], events: list[dict] = (), now: float = 5) -> dict[str, Any]:
    run = RunReader(run_folder(folder, lines, events), "job/run").read_all()
    found = run_payload("r0", run, BEGIN + timedelta(seconds=now))
    json.dumps(found, allow_nan=False)
    return found


def columns_of(*values: dict) -> Columns:
    columns = Columns()
    columns.append(encoded(values))
    return columns


def test_an_example_of_everything(tmp_path: Path) -> None:
    (tmp_path / "env.json").write_text('{"host": "h"}')
    plan = {"step": [0, 2, 3], "lr": [1.0, 0.5, 0.0], "stage": [0, 1, 2], "short": [1], "words": ["a", "b", "c"]}
    (tmp_path / "schedule.json").write_text(json.dumps(plan))
    more = {"ema": {"loss": 2.3, "words": "x"}, "tasks": {"cloze": {"acc": 0.5}, "odd": 3}}
    events = [
        event("start", -1, step=0, total_steps=4, folder_tokens={"code": 200}),
        event("evaluation", 1.5, step=1, loss=2.4, acc=0.3, train_loss=2.6, folders={"code": [9, 2.4, 0.3]}, **more),
        event("stage", 0.5, step=1, stage=1, changed={"seq_len": 48, "weights": {"code": 2.0}}),
        event("checkpoint", 1.6, step=2, saved="milestone", name="c", waited=True, stall_seconds=0.5),
        event("alert", 1.7, rule="loss", step=1, text="loss is up"),
    ]
    short = event("evaluation", 1.5, step=1, loss=2.4, acc=0.3, train_loss=2.6, ema=more["ema"])
    lines = [line(0, loss=3.0, seen={"code": 20}), line(1, loss=2.5, inf_nan_skip_batches=1, seen={"code": 30})]
    assert payload_of(tmp_path, lines, events) == {
        "id": "r0",
        "name": "job/run",
        "folder": str(tmp_path),
        "parsing": False,
        "bad_lines": 0,
        "state": {
            "phase": "training",
            "why": "",
            "step": 2,
            "total_steps": 4,
            "tokens": 20,
            "tgs": None,
            "tflops": None,
            "mfu": None,
            "pack_fill": None,
            "loss": 2.5,
            "eta_seconds": 2.0,
            "line_seconds": 1.0,
            "last_time": at(1.7),
            "started": at(-1),
            "restarts": 0,
            "last_checkpoint": {"step": 2, "name": "c", "time": at(1.6), "kind": "milestone"},
        },
        "window": 1,
        "change_from": 0,
        "epoch_tokens": 200,
        "folders": [
            {
                "name": "code",
                "tokens": 20,
                "share": 1.0,
                "seen": 50,
                "epochs": 0.25,
                "loss": 2.5,
                "first_loss": 3.0,
                "change": -0.5,
                "acc": 0.5,
                "perplexity": math.exp(2.5),
                "val_loss": 2.4,
                "val_acc": 0.3,
            }
        ],
        "series": {
            "from": 0,
            "to": 1,
            "points": 2,
            "step": [0, 1],
            "time": [BEGIN.timestamp(), BEGIN.timestamp() + 1],
            "loss": [3, 2.5],
            "grad_norm/0_default": [1, 1],
            "grad_norm/1_fp32": [0, 0],
            "num_consumed_tokens": [10, 20],
            "batch_tokens": [10, 10],
            "inf_nan_skip_batches": [None, 1],
            "folders": {"code": {"tokens": [10, 10], "loss": [3, 2.5], "acc": [0.5, 0.5]}},
            "skipped": [1],
        },
        "validation": [
            {
                "step": 1,
                "loss": 2.4,
                "train_loss": 2.6,
                "acc": 0.3,
                "bits_per_byte": None,
                "ema": {"loss": 2.3},
                "folders": {"code": [9, 2.4, 0.3]},
            },
        ],
        "tasks": [{"step": 1, "tasks": {"cloze": {"acc": 0.5}}}],
        "stages": [
            {"stage": 0, "from": 0, "planned": False, "values": {}},
            {"stage": 1, "from": 1, "planned": False, "values": {"seq_len": "48", "weights": '{"code": 2.0}'}},
            {"stage": 2, "from": 3, "planned": True, "values": {}},
        ],
        "schedule": {"step": [0, 2, 3], "lr": [1.0, 0.5, 0.0], "stage": [0, 1, 2]},
        "checkpoints": [
            {
                "step": 2,
                "name": "c",
                "kind": "milestone",
                "time": at(1.6),
                "done": at(1.6),
                "seconds": 0.5,
                "stall_seconds": 0.5,
                "failed": None,
            }
        ],
        "samples": [],
        "events": [
            events[0],
            short,
            *events[2:],
        ],
        "alerts": [{"rule": "loss", "step": 1, "text": "loss is up", "time": at(1.7), "over": False}],
        "restarts": [],
        "config": [],
        "env": {"host": "h"},
    }


def test_an_empty_run_and_one_step(tmp_path: Path) -> None:
    empty = payload_of(tmp_path / "empty", [])
    assert (empty["folders"], empty["series"]["step"], empty["series"]["from"]) == ([], [], None)
    one = payload_of(tmp_path / "one", [line(0, loss=None, folders={"a": [0, None, 0.0]})])
    assert one["series"]["step"] == [0]
    assert "loss" not in one["series"]
    (row,) = one["folders"]
    assert [row[key] for key in ("loss", "first_loss", "change", "acc", "perplexity", "share")] == [None] * 5 + [0.0]


def test_a_resume_is_drawn_once_and_counted(tmp_path: Path) -> None:
    lines = [*(line(step) for step in range(6)), *(line(step, 1) for step in range(4, 8))]
    found = payload_of(tmp_path, lines, [event("start", 0, step=0), event("start", 6, 1, step=4)], 8)
    assert found["series"]["step"] == list(range(8))
    assert found["folders"][0]["tokens"] == 80
    assert found["restarts"] == [{"seg": 1, "step": 4, "time": at(6)}]
    assert found["state"]["restarts"] == 1


@pytest.mark.parametrize(
    ("lines", "expected"), [(0, 1), (1, 1), (6, 1), (20, 5), (40, 10), (400, 10), (600, 12), (50_000, 1000)]
)
def test_window(lines: int, expected: int) -> None:
    assert window(lines) == expected


def test_the_table_weighs_by_tokens_within_the_window(tmp_path: Path) -> None:
    lines = [line(step, folders={"a": [1, 9.0, 0.0], "b": [1, 5.0, 0.0]}) for step in range(32)]
    lines += [line(step, folders={"a": [1, 4.0, 0.5], "b": [0, None, 0.0]}) for step in range(32, 36)]
    lines += [line(step, folders={"a": [3, 2.0, 0.9], "b": [0, None, 0.0]}) for step in range(36, 40)]
    a, b = payload_of(tmp_path, lines)["folders"]
    assert a["loss"] == pytest.approx((2 * 9 + 4 * 4 + 12 * 2) / 18)
    assert a["change"] == pytest.approx(a["loss"] - 9)
    assert a["acc"] == pytest.approx((4 * 0.5 + 12 * 0.9) / 18)
    assert (a["tokens"], a["share"], a["first_loss"]) == (48, 0.6, 9.0)
    assert b["loss"] == 5.0
    lines += [line(step, folders={"a": [1, 2.0, 0.9], "b": [0, None, 0.0]}) for step in range(40, 80)]
    b = payload_of(tmp_path, lines)["folders"][1]
    assert (b["loss"], b["change"], b["tokens"]) == (5.0, None, 32)


def test_a_range_and_its_points() -> None:
    columns = columns_of(*[line(step, loss=float(step)) for step in range(0, 1000, 10)])
    found = series(columns, 95, 300, 1000)
    assert (found["from"], found["to"], found["points"]) == (100, 300, 21)
    assert found["loss"] == list(range(100, 301, 10))
    found = series(columns, 0, 10**9, 10)
    assert found["points"] == 100
    assert found["step"] == [0, 190, 200, 390, 400, 590, 600, 790, 800, 990]
    assert found["loss"] == found["step"]
    for begin, end in ((500, 100), (2000, 3000), (-5, -1), (101, 102)):
        found = series(columns, begin, end)
        assert (found["from"], found["points"], found["step"], found["skipped"]) == (None, 0, [], [])


def test_a_spike_in_one_folder_of_a_long_run_survives() -> None:
    lines = [line(step, folders={"code": [10, 2.0, 0.5], "web": [10, 3.0, 0.5]}) for step in range(3000)]
    lines[1234]["folders"]["web"][1] = 11.0
    lines[2222]["folders"]["web"] = [0, None, 0.0]
    found = series(columns_of(*lines), points=100)
    assert len(found["step"]) == 100
    assert set(found["folders"]["code"]["loss"]) == {2}
    assert found["folders"]["web"]["loss"].count(11) == 1
    spike = found["folders"]["web"]["loss"].index(11)
    assert found["step"][spike - spike % 2] <= 1234 <= found["step"][spike - spike % 2 + 1]


def test_shares_of_a_long_run_are_those_of_its_lines() -> None:
    """Two folders that take turns, and one that comes late: extremes of different lines would not add up."""
    lines = [line(step, folders={"a": [30 * (step % 2), 2.0, 0.5], "b": [10, 3.0, 0.5]}) for step in range(3000)]
    for late in lines[1500:]:
        late["folders"]["c"] = [25, 1.0, 0.5]
    found = series(columns_of(*lines), points=100)["folders"]
    shares = [[pair[name]["tokens"][at] or 0 for name in "abc"] for pair, at in ((found, 0), (found, 99))]
    assert shares == [[15, 10, 0], [15, 10, 25]]
    assert found["c"]["tokens"][:50] == [None] * 50
    assert series(columns_of(*lines), 0, 3)["folders"]["a"]["tokens"] == [0, 30, 0, 30]


@pytest.mark.parametrize(
    ("lines", "events"),
    [
        ([line(step, folders={"a": [1e308, 1e308, 0]}, loss=1e308) for step in range(9)], []),
        ([line(step, folders={"a": [1e99, 1e99, 0]}, eta_seconds=1e99) for step in range(9)], []),
        ([line(0)], [event("alarm", 1, checkpoint="9" * 5000, why="y")]),
        ([line(0)], [event("start", 1, folder_tokens={"code": 1e-320}, total_steps=10**400, step=10**400)]),
        ([line(0)], [event("checkpoint", 1, name="a", stall_seconds=10**400), event("checkpoint_done", 2, name="a")]),
    ],
)
def test_numbers_that_no_run_has_are_shown_or_left_out(tmp_path: Path, lines: list[dict], events: list[dict]) -> None:
    assert payload_of(tmp_path, lines, events)["state"]["phase"] != UNREADABLE


@pytest.mark.parametrize("text", ["a: &a\n  b: *a\n", "a: &a [*a]\n"])
def test_a_config_inside_itself_is_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.resolved.yaml").write_text(text)
    assert payload_of(tmp_path, [line(0)])["config"] == []


def test_a_run_that_cannot_be_shown_stands_beside_the_others(tmp_path: Path) -> None:
    good, bad, unread = (RunReader(run_folder(tmp_path / name, [line(0)]), name).read_all() for name in "abc")
    bad.events = [{}]
    unread.error = "cannot read c/env.json: Permission denied"
    found = make_payload([("r0", bad), ("r1", good), ("r2", unread)], live=True)
    json.dumps(found, allow_nan=False)
    assert [(run["name"], run["state"]["phase"]) for run in found["runs"]] == [
        ("a", "silent"),
        ("b", UNREADABLE),
        ("c", UNREADABLE),
    ]
    assert [found["runs"][at]["state"]["why"] for at in (1, 2)] == ["KeyError: 'event'", unread.error]
    assert set(found["runs"][0]) == set(found["runs"][1])


def test_skipped_steps_are_where_the_count_grew() -> None:
    counts = [0, 1, 1, 3, 3]
    columns = columns_of(*[line(step, inf_nan_skip_batches=count) for step, count in enumerate(counts)])
    assert series(columns)["skipped"] == [1, 3]
    assert series(columns, 2, 4)["skipped"] == [3]


@given(st.lists(st.one_of(st.none(), st.floats(-1e30, 1e30), st.integers(-(2**60), 2**60)), max_size=30))
def test_numbers_are_json_and_close(values: list[float | None]) -> None:
    found = numbers(np.array([np.nan if value is None else value for value in values], dtype=float))
    json.dumps(found, allow_nan=False)
    assert [value is None for value in found] == [value is None for value in values]
    for ours, theirs in zip(found, values, strict=True):
        assert ours is None or theirs is None or math.isclose(ours, theirs, rel_tol=1e-6)


def test_whole_numbers_stay_exact() -> None:
    assert json.dumps(numbers(np.array([2.0**52 + 1, 3.0]))) == "[4503599627370497, 3]"
    assert numbers(np.array([1.23456789, 1e-300, 0.0])) == [1.234568, 1e-300, 0.0]


def test_newest_events_are_kept(tmp_path: Path) -> None:
    events = [event("x", number, number=number) for number in range(MAX_EVENTS + 20)]
    found = payload_of(tmp_path, [line(0)], events)["events"]
    assert [found[0]["number"], found[-1]["number"], len(found)] == [20, MAX_EVENTS + 19, MAX_EVENTS]


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        RunReader(run_folder(tmp_path / name, [line(0, loss=loss)]), name).read_all()
        for name, loss in (("a", 1.5), ("b", 2.5))
    ]
    found = make_payload([("r0", runs[0]), ("r1", runs[1])], live=False)
    assert [(run["id"], run["name"], run["series"]["loss"]) for run in found["runs"]] == [
        ("r0", "a", [1.5]),
        ("r1", "b", [2.5]),
    ]
    assert (found["version"], found["live"]) == (1, False)


def test_events_with_odd_facts_do_no_harm(tmp_path: Path) -> None:
    events = [
        event("start", 0, step="x", total_steps="y", folder_tokens=[1]),
        event("evaluation", 1, step=0, loss="z", folders=7),
        event("evaluation", 2, step=1, folders={"code": 3}),
        event("checkpoint", 3),
        event("alert", 4),
    ]
    found = payload_of(tmp_path, [line(0)], events)
    assert found["folders"][0]["val_loss"] is None
    assert found["state"]["total_steps"] is None


def test_runs_come_as_last_active_and_those_that_train_as_started(tmp_path: Path) -> None:
    made = {
        "old": ([line(0)], [event("start", 0, step=0), event("done", 5, step=1)]),
        "first": ([line(50)], [event("start", 1, step=0)]),
        "failed": ([], [event("start", 20, step=0), event("failed", 21)]),
        "second": ([line(40)], [event("start", 30, step=0)]),
        "unknown": ([], []),
    }
    runs = [(name, RunReader(run_folder(tmp_path / name, *content), name).read_all()) for name, content in made.items()]
    found = make_payload(runs, live=True, now=BEGIN + timedelta(seconds=60))
    assert [run["id"] for run in found["runs"]] == ["second", "first", "failed", "old", "unknown"]


def test_a_change_is_counted_from_a_tenth_of_the_run_ago(tmp_path: Path) -> None:
    lines = [line(step, loss=9.0, folders={"a": [1, 1000.0 - step, 0.5]}) for step in range(500)]
    found = payload_of(tmp_path, lines)
    assert (found["window"], found["change_from"], found["folders"][0]["change"]) == (10, 449, -50.0)


@pytest.mark.parametrize(
    ("dtype", "scales", "shown"),
    [
        ("torch.float16", [65536.0, 65536.0], True),
        ("torch.half", [1.0, 2.0], True),
        ("torch.bfloat16", [65536.0, 32768.0], False),
        ("torch.float32", [1.0, 1.0], False),
        (None, [65536.0, 65536.0], False),
        (None, [65536.0, None, 32768.0], True),
        (None, [None], False),
        ("torch.float16", [], False),
    ],
)
def test_the_loss_scale_is_one_of_fp16(tmp_path: Path, dtype: str | None, scales: list, shown: bool) -> None:
    if dtype is not None:
        (tmp_path / "config.resolved.yaml").write_text(f"model: {{dtype: {dtype}}}")
    found = payload_of(tmp_path, [line(step, loss_scale=scale) for step, scale in enumerate(scales)])
    assert ("loss_scale" in found["series"]) == shown
    assert found["series"].get("loss_scale", scales) == scales


def test_folders_without_any_token_are_rows_of_the_table(tmp_path: Path) -> None:
    lines = [line(0, folders={"web": [4, 2.0, 0.5]}), line(1, folders={})]
    found = payload_of(tmp_path, lines, [event("start", 0, step=0, folders=["code", "web"])])
    assert [(row["name"], row["tokens"], row["loss"]) for row in found["folders"]] == [("code", 0, None), ("web", 4, 2)]
    assert found["series"]["folders"]["web"] == {"tokens": [4, None], "loss": [2, None], "acc": [0.5, None]}
