"""What events say: checkpoints and how they ended, validation, alerts, restarts, samples."""

from __future__ import annotations

import pytest

from internlm_lite.apps.report import history
from tests.apps.report.small import at, event


def test_a_checkpoint_in_the_background_ends_by_its_name() -> None:
    saves = history.checkpoints(
        [
            event("checkpoint", 10, step=5, saved="milestone", name="a", waited=False, stall_seconds=0.5),
            event("checkpoint_done", 14, name="a", saved="milestone"),
            event("checkpoint", 20, step=9, saved="snapshot", name="b", waited=False, stall_seconds=0.25),
        ]
    )
    assert saves == [
        {
            "step": 5,
            "name": "a",
            "kind": "milestone",
            "time": at(10),
            "done": at(14),
            "seconds": 4.5,
            "stall_seconds": 0.5,
            "failed": None,
        },
        {
            "step": 9,
            "name": "b",
            "kind": "snapshot",
            "time": at(20),
            "done": None,
            "seconds": None,
            "stall_seconds": 0.25,
            "failed": None,
        },
    ]


def test_one_that_training_waited_for_is_done_at_once() -> None:
    (save,) = history.checkpoints(
        [event("checkpoint", 3, step=5, saved="final", name="a", waited=True, stall_seconds=2)]
    )
    assert (save["done"], save["seconds"]) == (at(3), 2)


def test_failures_stand_at_their_checkpoint_or_alone() -> None:
    saves = history.checkpoints(
        [
            event("checkpoint", 1, step=5, saved="milestone", name="0000000005-00001.abcdef", waited=False),
            event("alarm", 2, what="checkpoint failed", checkpoint="0000000005-00001.abcdef", why="disk full"),
            event("alarm", 3, what="checkpoint failed", checkpoint="step 70", why="gone"),
            event("checkpoint", 4, step=80, saved="milestone", name=None, waited=False, stall_seconds=0.1),
            event("checkpoint_done", 5, name="of an earlier file"),
        ]
    )
    assert [(save["step"], save["failed"]) for save in saves] == [
        (5, "disk full"),
        (70, "gone"),
        (80, "skipped: the one before was still being written"),
    ]
    assert all(save["done"] is None for save in saves)


def test_validation_of_a_dropped_tail_is_dropped() -> None:
    events = [
        event("start", 0, step=0),
        event("evaluation", 1, step=9, loss=3.0, acc=0.1, folders={"a": [5, 3.0, 0.1]}),
        event("evaluation", 2, step=19, loss=2.0, acc=0.2, folders={}),
        event("start", 3, 1, step=15),
        event("evaluation", 4, 1, step=19, loss=2.5, acc=0.2),
    ]
    assert [(check["step"], check["loss"]) for check in history.validation(events)] == [(9, 3.0), (19, 2.5)]
    assert history.validation(events)[0]["folders"] == {"a": [5, 3.0, 0.1]}
    assert [check["step"] for check in history.validation(events[:4])] == [9]


def test_alerts_end_by_their_rule() -> None:
    events = [
        event("alert", 1, rule="speed", step=5, text="slow"),
        event("alert_over", 2, rule="speed", step=9),
        event("alert", 3, rule="speed", step=15, text="slow again"),
        event("alarm", 4, what="checkpoint failed", checkpoint="x", why="disk full"),
    ]
    found = [(alert["rule"], alert["text"], alert["over"]) for alert in history.alerts(events)]
    assert found == [("speed", "slow", True), ("speed", "slow again", False), ("checkpoint_failed", "disk full", False)]


def test_alarms_are_told_once_and_end_with_the_next_save() -> None:
    alarm = event("alarm", 1, what="checkpoint failed", checkpoint="x", why="disk full")
    alert = event("alert", 2, rule="checkpoint_failed", step=5, text="checkpoint x was not saved: disk full")
    saved = event("checkpoint_done", 3, name="y")
    assert [(one["text"], one["over"]) for one in history.alerts([alarm, saved])] == [("disk full", True)]
    assert [one["text"] for one in history.alerts([alarm, alert])] == [alert["text"]]


@pytest.mark.parametrize("end", ["done", "stopped", "failed"])
def test_the_end_of_a_run_ends_its_alerts(end: str) -> None:
    events = [event("alert", 1, rule="loss_up", step=5, text="up"), event(end, 2, step=5)]
    assert [one["over"] for one in history.alerts(events)] == [True]


def test_a_restart_ends_what_was_raised_before() -> None:
    events = [event("alert", 1, rule="silent", step=5, text="no step"), event("start", 2, 1, step=5)]
    assert [one["over"] for one in history.alerts(events)] == [True]


def test_restarts_stand_where_the_later_start_went_on() -> None:
    events = [event("start", 0, step=0), event("start", 9, 1, step=6), event("start", 20, 2, step=8)]
    assert history.restarts(events, {0: 0, 1: 6}) == [
        {"seg": 1, "step": 6, "time": at(9)},
        {"seg": 2, "step": 8, "time": at(20)},
    ]
    assert history.restarts([], {0: 0, 3: 7}) == [{"seg": 3, "step": 7, "time": None}]
    assert history.restarts([], {}) == []


def test_samples_of_one_step_are_the_newest() -> None:
    lines = [
        {"seg": 0, "step": 20, "prompt": "a", "text": "given up"},
        {"seg": 0, "step": 10, "prompt": "a", "text": "old", "time": at(1)},
        {"seg": 1, "step": 10, "prompt": "a", "text": "new", "time": at(2)},
        {"seg": 1, "step": 10, "prompt": "b", "text": "other", "time": at(2)},
        {"step": "x", "prompt": "b", "text": "bad"},
        {"step": 12, "prompt": None, "text": "bad"},
    ]
    found = history.samples(lines, [event("start", 0, step=0), event("start", 1, 1, step=10)])
    assert [(one["step"], one["prompt"], one["text"]) for one in found] == [(10, "a", "new"), (10, "b", "other")]
