"""What is decided after a step: stopping and saving on request, by signals and the stop file, and in a real run."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internlm_lite.faults.signals import WATCHED, StopSignals
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.optim.grad_norm import Requests
from internlm_lite.optim.skips import SkipCounts
from internlm_lite.optim.step_decision import StepOutcome
from internlm_lite.train.build import build_run
from internlm_lite.train.control import Command, Control, ControlChannel, Decision
from tests.cli import ROOT, ended, start
from tests.steps import read_metrics
from tests.train.runs import tiny


def outcome(requests: Requests) -> StepOutcome:
    """Of a step in which nothing happened."""
    zero, number = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    return StepOutcome(
        norm_model_dtype=zero,
        norm_fp32=zero,
        spikes=torch.zeros(2, dtype=torch.float64),
        loss_scale=torch.ones(()),
        skips=SkipCounts(*[number] * 5),
        next_lr=zero,
        beta2=0.9,
        signalled=torch.tensor(requests.signalled, dtype=torch.float64),
        stop_file=torch.tensor(requests.stop_file, dtype=torch.float64),
    )


def commands(channel: ControlChannel, steps: int) -> list[Command]:
    """After each step."""
    found = []
    for steps_done in range(1, steps + 1):
        arrived = channel.exchange(outcome(channel.requests()))
        found.append(Command() if arrived is None else channel.command(arrived, steps_done))
    return found


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of pytest, once a test has ended."""
    before = {number: signal.getsignal(number) for number in WATCHED}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_is_obeyed_one_step_later(number: signal.Signals):
    with StopSignals() as signals:
        channel = ControlChannel(signals, None)
        assert commands(channel, 3) == [Command()] * 3
        os.kill(os.getpid(), number)
        assert commands(channel, 2) == [Command(), Command(True, True, number.name)]
    _send(*WATCHED)  # and this process lives


def test_nohup_is_obeyed():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        _send(signal.SIGHUP)
        assert signals.received is None


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
        channel = ControlChannel(signals, file)
        assert commands(channel, 2) == [Command()] * 2
        file.write_text("-3")
        save = Command(save=True, source="stop file with -3")
        assert commands(channel, 5) == [Command(), Command(), save, Command(), Command()]
        assert file.read_text() == "0\n"
        file.write_text("4")
        assert commands(channel, 4)[-1] == Command(save=True, stop=True, source="stop file with 4")


@pytest.mark.parametrize("content", [b"soon", b"\xff\xfe", b"1.5", b"9" * 400, b"9" * 5000])
def test_invalid_stop_file_is_logged_and_left(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "stop"
    file.write_bytes(content)
    with StopSignals() as signals:
        channel = ControlChannel(signals, file)
        assert commands(channel, 3) == [Command()] * 3
        assert caplog.text.count("is not obeyed") == 1 and file.read_bytes() == content
        file.write_text("2")
        assert any(command.stop for command in commands(channel, 3)), "corrected"


def metrics(folder: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm), of the run that is newest."""
    (file,) = (folder / "RUN" / "tiny" / "latest").glob("metrics.jsonl")
    return {step["step"]: (step["loss"], step["grad_norm"]["0_default"]) for step in read_metrics(file)}


def trained(folder: Path, steps: int, *more: str):
    folder.mkdir(exist_ok=True)
    arguments = ("--config", str(ROOT / "configs/tiny.py"), f"TOTAL_STEPS={steps}", *more)
    return start("train.py", *arguments, folder=folder, log=folder / "output.log")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "stop file"])
def test_stopped_run_saves_and_resumes_bit_for_bit(how: str, tmp_path: Path):
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


def test_rank_0_alone_reads_the_stop_file(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("4")
    config = tiny(None, ckpt={"stop_file_path": str(tmp_path / "stop")})
    run = build_run(config, single_process_mesh(), tmp_path)
    with StopSignals() as signals:
        for is_main in (True, False):
            control = Control(run.config, run.reporter, signals, is_main=is_main)
            assert control.requests() == Requests(stop_file=4.0 * is_main)
    run.reporter.close()


def test_commands_survive_a_rollback(tmp_path: Path) -> None:
    run = build_run(tiny(None, guard={"spike": "rollback"}), single_process_mesh(), tmp_path)
    with StopSignals() as signals:
        control = Control(run.config, run.reporter, signals, is_main=True)
        spiked = replace(outcome(Requests(signalled=1.0)), spikes=torch.tensor([20.0, 0.0], dtype=torch.float64))
        assert control.after_step(spiked, 3) == Decision()
        decision = control.after_step(outcome(Requests()), 4)
        assert decision == Decision(final=True, stopped_by="a signal to another rank", rollback_before=2)
        control.rolled_back(1)
        assert control.decision == Decision()
        assert control.after_step(outcome(Requests()), 2).stopped_by == "a signal to another rank"
    run.reporter.close()


def test_a_save_is_deferred_while_updates_are_skipped(tmp_path: Path) -> None:
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path / 'saves'}", "checkpoint_every": 2}
    run = build_run(tiny(None, ckpt=ckpt), single_process_mesh(), tmp_path)
    with StopSignals() as signals:
        control = Control(run.config, run.reporter, signals, is_main=True)
        good = outcome(Requests())
        skipped = replace(good, skips=replace(good.skips, consecutive_skips=torch.tensor(1)))
        outcomes = (outcome(Requests()), skipped, skipped, outcome(Requests()), outcome(Requests()))
        saves = []
        for steps_done, one in enumerate(outcomes, 1):
            decision = control.after_step(one, steps_done)
            deferred = decision.save and control.defer_if_skipped(one, decision)
            saves.append(None if deferred else decision.save)
        assert saves == [None, None, None, "milestone", None]
    run.checkpoints.close(wait=True)
    run.reporter.close()
