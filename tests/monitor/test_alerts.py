"""Every rule: raised once, over, quiet while it cools down, raised again. Time is a number here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from internlm_lite.config.schema import AlertsConfig
from internlm_lite.monitor.alerts import Alert, DiskFigures, Rules
from internlm_lite.monitor.record import FolderFigures, SpeedFigures, StepRecord
from tests.monitor.test_line import SEED

SPEED = SpeedFigures(100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0)
GB = 1024**3


def line(step: int, loss: float = 2.0, tgs: float = 100.0, skipped: int = 0, **changes: Any) -> StepRecord:
    return dataclasses.replace(
        SEED[0],
        step=step,
        loss=loss,
        speed=dataclasses.replace(SPEED, tgs=tgs),
        inf_nan_skip_batches=skipped,
        **{"folders": {}, **changes},
    )


class Story:
    """A run of one line a second, and what was told: [(rule, step, over)]."""

    def __init__(self, cool_down_seconds: float = 0.0, total_steps: int = 10**6, **config: Any) -> None:
        self.rules = Rules(AlertsConfig(cool_down_seconds=cool_down_seconds, **config), total_steps)
        self.now = 0.0
        self.steps = 0
        self.told: list[Alert] = []
        self.event("start")

    def event(self, kind: str, **facts: Any) -> None:
        self.told += self.rules.event(kind, facts, self.now)

    def lines(self, n: int, every: int = 1, **figures: Any) -> Story:
        for _ in range(n):
            self.now += 1
            self.steps += every
            self.told += self.rules.step(line(self.steps - 1, **figures), self.now)
        return self

    def wait(self, seconds: float) -> None:
        """The clock is looked at every second."""
        for _ in range(int(seconds)):
            self.now += 1
            self.told += self.rules.time(self.now)

    def heard(self) -> list[tuple[str, int | None, bool]]:
        told = [(alert.rule, alert.step, alert.over) for alert in self.told]
        self.told = []
        return told


def test_no_alert() -> None:
    story = Story()
    for n in range(200):
        story.lines(1, loss=11.0 * 0.99**n, tgs=100 + n % 20, skipped=n // 40)
    story.event("checkpoint", waited=False)
    story.event("evaluation")
    assert story.heard() == []


def test_non_finite_loss() -> None:
    story = Story().lines(12)
    assert story.lines(3, loss=math.nan).heard() == [("non_finite_loss", 12, False)]
    assert story.lines(1, loss=math.inf).heard() == []
    assert story.lines(2).heard() == [("non_finite_loss", 16, True)]
    assert story.lines(1, loss=-math.inf).heard() == [("non_finite_loss", 18, False)]


def test_line_without_labels() -> None:
    nothing = {"code": FolderFigures(0, math.nan, 0.0)}
    assert Story().lines(3, loss=math.nan, folders=nothing).heard() == []


def test_loss_spike() -> None:
    story = Story().lines(20)
    assert story.lines(1, loss=2.9).heard() == []
    assert story.lines(100, loss=3.2).heard() == [("loss_spike", 21, False)]  # the average is that before it
    assert story.lines(1, loss=2.7).heard() == []  # neither high nor low
    assert story.lines(1, loss=2.2).heard() == [("loss_spike", 122, True)]
    assert story.lines(1, loss=9.0).heard() == [("loss_spike", 123, False)]


def test_no_spike_in_first_lines() -> None:
    story = Story().lines(5, loss=1.0)
    assert story.lines(4, loss=9.0).heard() == []


def test_overflow_run() -> None:
    story = Story().lines(5)
    for skipped in range(1, 9):
        story.lines(1, skipped=skipped)
    assert story.heard() == [("overflow_run", 9, False)]
    assert story.lines(3, skipped=8).heard() == [("overflow_run", 13, True)]
    assert story.lines(4, skipped=8).heard() == []


def test_overflow_run_over_lines_of_many_steps() -> None:
    story = Story().lines(2, every=4)
    assert story.lines(1, every=4, skipped=3).heard() == []  # one of the four was done
    assert story.lines(1, every=4, skipped=7).heard() == []
    assert story.lines(1, every=4, skipped=11).heard() == [("overflow_run", 19, False)]


def test_slow() -> None:
    story = Story().lines(20)
    assert story.lines(60, tgs=50.0).lines(1).heard() == []  # slow for 59 s
    assert story.lines(100, tgs=60.0).heard() == [("slow", 141, False)]
    assert story.lines(1, tgs=80.0).heard() == []
    assert story.lines(1, tgs=90.0).heard() == [("slow", 182, True)]
    for _ in range(2):
        story.now += 60
        assert story.lines(1, tgs=69.0).heard() == []  # two slow lines happen
    assert story.lines(1, tgs=69.0).heard() == [("slow", 185, False)]


def test_silent() -> None:
    story = Story(silent_seconds=60.0).lines(5)
    story.wait(59)
    assert story.heard() == []
    story.wait(100)
    assert story.heard() == [("silent", 4, False)]
    assert story.lines(1).heard() == [("silent", 5, True)]
    story.wait(61)
    assert story.heard() == [("silent", 5, False)]


def test_silence_limit_depends_on_usual_time() -> None:
    story = Story(silent_seconds=5.0)
    for _ in range(20):
        story.now += 9
        story.lines(1)
    story.wait(100)
    assert story.heard() == []
    story.wait(1)
    assert story.heard() == [("silent", 19, False)]


def test_events_end_silence() -> None:
    story = Story(silent_seconds=60.0, total_steps=10).lines(5)
    for _ in range(3):
        story.wait(50)
        story.event("evaluating")
    story.event("alert", rule="slow")  # is none
    story.wait(60)
    assert story.heard() == []
    story.wait(1)
    assert story.heard() == [("silent", 4, False)]
    story.lines(5)  # the last step: what comes now takes its time
    assert story.heard() == [("silent", 5, True)]
    story.wait(1000)
    story.event("done")
    story.wait(1000)
    assert story.heard() == []


def test_silence_before_first_step() -> None:
    story = Story(silent_seconds=60.0)
    story.wait(61)
    assert story.heard() == [("silent", None, False)]


def test_checkpoint_failed() -> None:
    story = Story().lines(3)
    for name in ("step 2", "step 4"):
        story.event("alarm", what="checkpoint failed", checkpoint=name, why="disk full")
    assert story.told[0].text == "checkpoint step 2 was not saved: disk full"
    assert story.heard() == [("checkpoint_failed", 2, False)]
    story.event("checkpoint", waited=False)
    assert story.heard() == []
    story.event("checkpoint_done", name="step 6")
    assert story.heard() == [("checkpoint_failed", 2, True)]
    story.event("alarm", checkpoint="step 8", why="again")
    story.event("checkpoint", waited=True)
    assert story.heard() == [("checkpoint_failed", 2, False), ("checkpoint_failed", 2, True)]


@pytest.mark.parametrize(("total", "limit"), [(100 * GB, 5 * GB), (100_000 * GB, 200 * GB)])
def test_disk_nearly_full(total: int, limit: int) -> None:
    story = Story().lines(1)

    def look(free: float) -> list[tuple[str, int | None, bool]]:
        story.told += story.rules.disk(DiskFigures("/data", int(free), total), story.now)
        return story.heard()

    assert look(limit + 1) == []
    assert look(limit - 1) == [("disk_nearly_full /data", 0, False)]
    assert look(limit * 1.1) == [] and look(limit / 2) == []
    assert look(limit * 1.3) == [("disk_nearly_full /data", 0, True)]
    assert look(0) == [("disk_nearly_full /data", 0, False)]


def test_cool_down() -> None:
    story = Story(cool_down_seconds=100.0).lines(20)
    assert story.lines(1, loss=math.nan).lines(1).heard() == [
        ("non_finite_loss", 20, False),
        ("non_finite_loss", 21, True),
    ]
    for _ in range(49):
        story.lines(1, loss=math.nan).lines(1)
    assert story.heard() == []
    assert story.lines(3, loss=math.nan).heard() == [("non_finite_loss", 121, False)]
