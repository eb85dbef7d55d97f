"""The fan-out: errors and slowness of a sink do not affect training or other sinks."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.monitor.record import Sample, Sink, StepRecord, ValidationRecord
from internlm_lite.monitor.sinks import FanOut, run_files
from tests.monitor.test_line import SEED
from tests.steps import read_metrics

VALID = ValidationRecord(step=5, loss=2.0, acc=0.5, perplexity=7.4, folders=SEED[5].folders, train_loss=1.5)
SAMPLE = Sample(step=6, prompt="def", text=" f(x):")


class Kept(Sink):
    """Keeps what it was given."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.given: list[Any] = []
        self._fails_at = fails_at

    def _take(self, value: Any) -> None:
        if len(self.given) == self._fails_at:
            raise RuntimeError("no such luck at https://user:hush@host/x\nand more")
        self.given.append(value)

    def step(self, record: StepRecord) -> None:
        self._take(record.step)

    def validation(self, record: ValidationRecord) -> None:
        self._take(record)

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._take((kind, dict(facts)))

    def sample(self, sample: Sample) -> None:
        self._take(sample)

    def close(self) -> None:
        self._take("closed")


class Held(Kept):
    """Blocks at every step until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def step(self, record: StepRecord) -> None:
        self.go_on.wait(30)
        super().step(record)


def test_every_sink_gets_everything_in_order() -> None:
    direct, queued = Kept(), Kept()
    fan_out = FanOut({"a": direct}, {"b": lambda: queued})
    for record in SEED[:3]:
        fan_out.step(record)
    fan_out.event("checkpoint", step=3, name="n")
    fan_out.validation(VALID)
    fan_out.sample(SAMPLE)
    fan_out.close()
    assert direct.given == [0, 1, 2, ("checkpoint", {"step": 3, "name": "n"}), VALID, SAMPLE, "closed"]
    assert queued.given == direct.given


def test_raising_sink_is_reported_once_and_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad, other = Kept(), Kept(fails_at=1), Kept(fails_at=2)
    fan_out = FanOut({**run_files(tmp_path), "bad": bad, "good": good}, {"other": lambda: other})
    for record in SEED:
        fan_out.step(record)
    fan_out.close()
    assert bad.given == [0] and len(other.given) == 2
    assert [given for given in good.given if isinstance(given, int)] == [0, 1, 2, 3, 4, 5]
    assert [step["step"] for step in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    why = "RuntimeError: no such luck at https://***@host/x"
    events = [(event["event"], event["sink"], event["why"]) for event in read_objects(tmp_path / "events.jsonl")]
    assert sorted(events) == [("sink_failed", "bad", why), ("sink_failed", "other", why)]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{name} failed and is switched off, training goes on: {why}" for name in ("bad", "other")
    ]


def test_unwritable_event_does_not_affect_other_files(tmp_path: Path) -> None:
    fan_out = FanOut(run_files(tmp_path), {})
    fan_out.event("start", step=object())
    fan_out.step(SEED[0])
    fan_out.sample(SAMPLE)
    fan_out.close()
    assert [step["step"] for step in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    (sample,) = read_objects(tmp_path / "samples.jsonl")
    assert (sample["step"], sample["prompt"], sample["text"]) == (6, "def", " f(x):")


def test_switched_off_sink_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Kept):
        def close(self) -> None:
            self.given.append("closed")
            raise RuntimeError("again")

    broken = Broken(fails_at=0)
    fan_out = FanOut({"broken": broken}, {})
    fan_out.step(SEED[0])
    fan_out.close()
    assert broken.given == ["closed"] and len(caplog.records) == 1


def test_sink_that_cannot_be_made(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Sink:
        raise OSError(28, "No space left on device")

    good, late = Kept(), Kept()
    fan_out = FanOut({"good": good}, {"full": make, "late": lambda: late})
    fan_out.step(SEED[0])
    fan_out.close()
    assert 0 in good.given and 0 in late.given
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "full failed" in caplog.text


def test_slow_sink_drops_records_without_blocking(caplog: pytest.LogCaptureFixture) -> None:
    direct, held = Kept(), Held()
    fan_out = FanOut({"direct": direct}, {"held": lambda: held}, capacity=2)
    for _ in range(10):
        for record in SEED:
            fan_out.step(record)
    assert len(direct.given) == 60
    assert [record.getMessage() for record in caplog.records] == ["held: too slow, records will be missing from now on"]
    held.go_on.set()
    fan_out.close()
    kept = len(held.given) - 1  # and "closed"
    assert 2 <= kept <= 3
    assert f"held: {60 - kept} records came too fast" in caplog.text
    assert ("records_left_out", {"records": 60 - kept}) in direct.given


def test_close_has_a_time_limit(caplog: pytest.LogCaptureFixture) -> None:
    held, direct = Held(), Kept()
    fan_out = FanOut({"direct": direct}, {"held": lambda: held}, close_seconds=0.1)
    fan_out.step(SEED[0])
    fan_out.close()
    assert "did not end within 0.1 s" in caplog.text and direct.given[-1] == "closed"
    held.go_on.set()


def test_close_joins_threads() -> None:
    before = set(threading.enumerate())
    fan_out = FanOut({}, {"b": Kept})
    fan_out.close()
    assert not set(threading.enumerate()) - before
