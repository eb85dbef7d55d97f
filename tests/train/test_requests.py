"""Stopping and saving on request: signals, the stop file, and what they do to a real run."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from internlm_lite.faults.signals import WATCHED, StopSignals
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.optim.zero import StepOutcome
from internlm_lite.train.requests import Order, Requests
from tests.cli import ROOT, ended, start
from tests.steps import read_metrics


def outcome(asked: tuple[float, float]) -> StepOutcome:
    """Of a step in which nothing happened."""
    zero, number = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    return StepOutcome(
        norm_model_dtype=zero,
        norm_fp32=zero,
        spikes=torch.zeros(2, dtype=torch.float64),
        loss_scale=torch.ones(()),
        skipped_steps=number,
        skips_in_a_row=number,
        overflows_in_a_row=number,
        next_lr=zero,
        beta2=0.9,
        requests=torch.tensor(asked, dtype=torch.float64),
    )


def asked(requests: Requests, steps: int) -> list[Order]:
    return [requests.order(outcome(requests.now()), step) for step in range(1, steps + 1)]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of pytest, once a test has ended."""
    before = {number: signal.getsignal(number) for number in WATCHED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_is_obeyed_one_step_after_it_was_told(number: signal.Signals):
    with StopSignals() as signals:
        requests = Requests(signals, None, is_main=True)
        assert asked(requests, 3) == [Order()] * 3
        os.kill(os.getpid(), number)
        assert asked(requests, 2) == [Order(), Order(True, True, number.name)]
    _send(*WATCHED)  # and this process lives


def _send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # a signal is noted between two instructions


class Interrupted(logging.Handler):
    """Many signals come while it writes a record."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []
        self._in: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        assert self._in != threading.get_ident(), "a record within a record"
        self._in = threading.get_ident()
        if record.getMessage() == "step 7":
            _send(*[signal.SIGTERM] * 5)
        self.written.append(record.getMessage())
        self._in = None


def test_signals_in_the_middle_of_a_log_record_leave_it_whole():
    handler, logger = Interrupted(), logging.getLogger("internlm_lite")
    logger.addHandler(handler)
    try:
        with StopSignals():
            logger.warning("step 7")
            for thread in threading.enumerate():
                if thread.name == "signal":
                    thread.join()
    finally:
        logger.removeHandler(handler)
    assert handler.written == ["step 7", "SIGTERM: the run stops within two steps; Ctrl-C (again) stops it at once"]


def test_what_a_launcher_sends_twice_is_asked_once():
    with StopSignals() as signals:
        _send(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        assert signals.received == "SIGTERM"


def test_a_second_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch):
    with StopSignals() as signals:
        _send(signal.SIGINT, signal.SIGINT)
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + 2)
        _send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)
        assert signals.received == "SIGINT"


def test_the_stop_file_saves_and_stops_or_goes_on(tmp_path: Path):
    file = tmp_path / "stop"
    with StopSignals() as signals:
        requests = Requests(signals, file, is_main=True)
        assert asked(requests, 2) == [Order()] * 2
        file.write_text("-3")
        save = Order(save=True, why="stop file with -3")
        assert asked(requests, 5) == [Order(), Order(), save, Order(), Order()]
        assert file.read_text() == "0\n"
        file.write_text("4")
        assert asked(requests, 4)[-1] == Order(save=True, stop=True, why="stop file with 4")
        other = Requests(signals, file, is_main=False)
        file.write_text("1")
        assert asked(other, 4) == [Order()] * 4, "rank 0 alone reads it"


@pytest.mark.parametrize("content", [b"soon", b"\xff\xfe", b"1.5", b"9" * 400, b"9" * 5000])
def test_a_stop_file_that_makes_no_sense_is_told_and_left(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "stop"
    file.write_bytes(content)
    with StopSignals() as signals:
        requests = Requests(signals, file, is_main=True)
        assert asked(requests, 3) == [Order()] * 3
        assert caplog.text.count("is not obeyed") == 1 and file.read_bytes() == content
        file.write_text("2")
        assert any(order.stop for order in asked(requests, 3)), "corrected"


def metrics(folder: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm), of the run that is newest."""
    (file,) = (folder / "RUN" / "tiny" / "latest").glob("metrics.jsonl")
    return {step["step"]: (step["loss"], step["grad_norm"]["0_default"]) for step in read_metrics(file)}


def trained(folder: Path, steps: int, *more: str):
    folder.mkdir(exist_ok=True)
    arguments = ("--config", str(ROOT / "configs/tiny.py"), f"TOTAL_STEPS={steps}", *more)
    return start("train.py", *arguments, folder=folder, log=folder / "output.log")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "stop file"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_with_the_same_bits(how: str, tmp_path: Path):
    save = ("ckpt.enable_save_ckpt=True", "ckpt.save_ckpt_folder=local:saves", "ckpt.stop_file_path=stop.txt")
    run = trained(tmp_path / "run", 60, *save, "data.total_steps=100000")
    folder, log = tmp_path / "run", tmp_path / "run" / "output.log"
    deadline = time.monotonic() + 60
    while "step=5 " not in log.read_text() if log.exists() else True:
        assert run.is_alive() and time.monotonic() < deadline, log.read_text() if log.exists() else "no output"
        time.sleep(0.01)
    if how == "stop file":
        (folder / "stop.txt").write_text("20")
    else:
        os.kill(run.pid, getattr(signal, how))
    stopped = ended(run, log)
    assert stopped.code == 3, stopped.output
    assert f"stopped by {'stop file with 20' if how == 'stop file' else how} after " in stopped.output
    first = metrics(folder)
    (run_folder,) = (folder / "RUN" / "tiny").glob("20*")
    assert max(first) >= (19 if how == "stop file" else 5)
    last = f"data.total_steps={max(first) + 20}"
    whole = trained(tmp_path / "whole", 60, last)
    again = ended(trained(folder, 60, *save, last), log)
    assert again.code == 0, again.output
    assert ended(whole, tmp_path / "whole" / "output.log").code == 0
    assert list((folder / "RUN" / "tiny").glob("20*")) == [run_folder], "it goes on where it was"
    assert metrics(folder) == metrics(tmp_path / "whole") and len(metrics(folder)) == max(first) + 20
    assert [
        (event["seg"], event["step"])
        for event in read_objects(run_folder / "events.jsonl")
        if event["event"] == "start"
    ] == [(0, 0), (1, max(first) + 1)]
