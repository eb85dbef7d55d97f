"""Step lines whose numbers arrive late, as on a GPU: the same lines, at most a step later, before what names them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from internlm_lite.errors import DataError
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.record import Sink, StepRecord, ValidationRecord
from internlm_lite.train import reporter
from internlm_lite.train.build import Run, RunServices, build_run
from internlm_lite.train.loop import train
from internlm_lite.train.profiling import Stopwatch
from internlm_lite.train.trainer import Trainer
from tests.gpu_queue import Gpu, gpu
from tests.train.runs import STEPS, tiny
from tests.train.test_loop import spikes_at

__all__ = ["gpu"]
CUDA = torch.device("cuda")


class Late(comm.Pending):
    """Arrives when a later one is waited for, in the order of a stream."""

    made: ClassVar[int]
    arrived: ClassVar[int]

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self.number = Late.made = Late.made + 1

    def ready(self) -> bool:
        return self.number <= Late.arrived

    def value(self) -> Any:
        Late.arrived = max(Late.arrived, self.number)
        return super().value()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    Late.made = Late.arrived = 0
    monkeypatch.setattr(comm, "read_later", Late)


class Order(Sink):
    """What came in which order: (kind, step, steps begun by then)."""

    def __init__(self) -> None:
        self.came: list[tuple[str, Any, int]] = []
        self.begun = 0

    def step(self, record: StepRecord) -> None:
        self.came.append(("line", record.step, self.begun))

    def validation(self, record: ValidationRecord) -> None:
        self.came.append(("validation", record.step, self.begun))

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self.came.append((kind, facts.get("step"), self.begun))


def run_with(order: Order, folder: Path, patch: pytest.MonkeyPatch, **sections: Any) -> Run:
    step = Trainer.step

    def counted(self: Trainer, *args: Any, **hooks: Any) -> Any:
        order.begun += 1
        return step(self, *args, **hooks)

    patch.setattr(Trainer, "step", counted)
    folder.mkdir()
    services = RunServices(sinks={"order": lambda folder, config: order})
    return build_run(tiny(None, **sections), single_process_mesh(), folder, services=services)


def trained(folder: Path, patch: pytest.MonkeyPatch, **sections: Any) -> tuple[Order, list[dict[str, Any]]]:
    order = Order()
    run = run_with(order, folder, patch, **sections)
    try:
        train(run, StopSignals())
    finally:
        run.checkpoints.close(wait=True)
        run.reporter.close()
    return order, lines(folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "eta", "tflops", "tgs", "fwd_bwd_time")
    return [{key: value for key, value in line.items() if not any(word in key for word in timed)} for line in found]


@pytest.mark.parametrize("log_every", [1, 3])
def test_late_lines_are_the_same_and_in_order(
    log_every: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    spikes_at(2, monkeypatch)
    sections = {
        "monitor": {"log_every": log_every},
        "data": {"valid_every": 4},
        "ckpt": {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path}/saves", "checkpoint_every": 3},
    }
    at_once, expected = trained(tmp_path / "first", monkeypatch, **sections)
    assert all(begun == step + 1 for kind, step, begun in at_once.came if kind == "line")
    request.getfixturevalue("late")
    sections["ckpt"]["save_ckpt_folder"] += "-late"
    spikes_at(2, monkeypatch)
    order, found = trained(tmp_path / "second", monkeypatch, **sections)
    assert found == expected and len(found) == -(-STEPS // log_every)
    assert {came[:2] for came in order.came} == {came[:2] for came in at_once.came}
    written = -1
    for kind, step, begun in order.came:
        if kind == "line":
            assert begun - step in (1, 2), "at most a step later"
            written = step
        elif step is not None and kind != "start":
            done = step if kind in ("spike", "evaluating", "evaluation", "validation") else step - 1
            assert written >= done // log_every * log_every - 1, (kind, step, "before its line")
    assert any(begun == step + 2 for kind, step, begun in order.came if kind == "line"), "some are late"


def test_an_error_does_not_lose_the_line_before_it(tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order()
    run = run_with(order, tmp_path / "run", monkeypatch)
    failing_at(run, 3, monkeypatch)
    monkeypatch.setattr(reporter.time, "sleep", lambda _: setattr(Late, "arrived", Late.made))
    with pytest.raises(DataError, match="third"):
        train(run, StopSignals())
    assert [step for kind, step, _ in order.came if kind == "line"] == [0, 1, 2]
    run.checkpoints.close(wait=True)
    run.reporter.close()


def test_a_lost_device_does_not_hide_the_error(tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order()
    run = run_with(order, tmp_path / "run", monkeypatch)

    def lost(_: Late) -> bool:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    failing_at(run, 3, monkeypatch, then=lambda: monkeypatch.setattr(Late, "ready", lost))
    with pytest.raises(DataError, match="third"):
        train(run, StopSignals())
    run.reporter.event("failed", why="x", rank=0)  # nothing reads the device any more
    run.checkpoints.close(wait=True)
    run.reporter.close()
    assert [came[:2] for came in order.came[-2:]] == [("line", 1), ("failed", None)]


def failing_at(run: Run, step: int, patch: pytest.MonkeyPatch, then: Callable[[], object] = lambda: None) -> None:
    batches = run.data.batches

    def some(*args: Any, **options: Any) -> Any:
        for number, batch in enumerate(batches(*args, **options)):
            if number == step:
                then()
                raise DataError("the third batch cannot be read")
            yield batch

    patch.setattr(type(run.data), "batches", lambda self, *args, **options: some(*args, **options))


def test_a_stopwatch_has_the_time_of_the_device_though_the_host_is_ahead(gpu: Gpu) -> None:
    watch = Stopwatch(CUDA)
    watch.start()
    for work in ("forward", "backward", "update"):
        gpu.launch(work)
    watch.stop()
    gpu.launch("evaluation")  # not counted
    watch.start()
    gpu.launch("forward")
    watch.stop()
    seconds = watch.take()
    watch.start()
    gpu.launch("the next line's")
    assert gpu.ran == [], "the host waited for nothing"
    gpu.main.synchronize()
    assert seconds() == pytest.approx(4 / 1000)


def test_an_interval_that_an_error_broke_off_is_dropped(gpu: Gpu) -> None:
    watch = Stopwatch(CUDA)
    watch.start()
    watch.take()
    watch.start()
    gpu.launch("forward")
    watch.stop()
    seconds = watch.take()
    gpu.main.synchronize()
    assert seconds() == pytest.approx(1 / 1000)
