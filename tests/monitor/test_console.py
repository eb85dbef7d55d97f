"""What reaches the terminal and what the log file; the heartbeat."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import sys
import threading
import time
from contextlib import closing

import pytest

from internlm_lite.monitor.console import Console, compact_line, heartbeat, next_checkpoint
from internlm_lite.monitor.record import FolderFigures
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.log import close_logging, logger, setup_logging
from tests.monitor.test_line import SEED, SEED_LINES

PLACE = DistEnv(0, 1, 0, 1, "host", "single", "", "localhost", 0)


@pytest.fixture(autouse=True)
def restored():
    yield
    close_logging()
    logger.propagate, logger.level = True, logging.NOTSET


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_full_line_without_terminal(capsys, tmp_path):
    setup_logging(PLACE, tmp_path)
    with closing(Console(50000, terminal=False)) as console:
        console.step(SEED[1])
    assert capsys.readouterr().out == SEED_LINES[1] + "\n"
    assert (tmp_path / "logs" / "rank-00000.log").read_text() == SEED_LINES[1] + "\n"


def test_short_line_and_bar_on_terminal(monkeypatch, tmp_path):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    setup_logging(PLACE, tmp_path)
    with closing(Console(50000, terminal=True, save_every=[50])) as console:
        console.step(dataclasses.replace(SEED[1], mfu=0.38, eta_seconds=3725.0))
        logger.info("something else")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "11:46:20  step 1  loss 11.3380" in shown and "tflops=" not in shown
    assert "2 of 50000 steps" in shown and "eta 1:02:05  loss 11.3380  tgs 965  mfu 38.0%  next checkpoint 50" in shown
    assert re.search(r"\d\d:\d\d:\d\d something else", shown)
    assert sys.stdout is terminal, "the bar gives standard output back"
    file = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert file.startswith(SEED_LINES[1] + "mfu=0.38 eta=1:02:05 \n") and "\x1b" not in file


def test_compact_line():
    folders = {
        "code": FolderFigures(9, 2.3456, 0.1),
        "docs": FolderFigures(1, 3.1, 0.1),
        "empty": FolderFigures(0, float("nan"), 0.0),
    }
    record = dataclasses.replace(
        SEED[2], folders=folders, mfu=0.412, memory_bytes=3 * 2**30, inf_nan_skip_batches=2, loss=float("nan")
    )
    plain = compact_line(record, colour=False)
    assert plain == (
        "11:46:24  step 2  loss nan  skipped 2  lr 8e-07  grad 77  tgs 1025  mfu 41.2%  3.00 GiB"
        "  code 2.346  docs 3.100"
    )
    assert compact_line(record, colour=False, width=len(plain)) == plain
    assert compact_line(record, colour=False, width=len(plain) - 1) == plain.removesuffix("  docs 3.100")
    assert compact_line(record, colour=True, width=30) == compact_line(record, colour=True, width=26)
    coloured = compact_line(record, colour=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain and "\x1b[31mloss nan" in coloured


@pytest.mark.parametrize(("done", "after"), [(0, 50), (49, 50), (50, 100), (120, 150), (170, 173), (173, 173)])
def test_next_checkpoint(done, after):
    assert next_checkpoint(done, [50], 173) == after


@pytest.mark.parametrize(("done", "after"), [(0, 20), (40, 50), (50, 60), (95, 100), (120, 130)])
def test_next_checkpoint_of_milestones_and_snapshots(done, after):
    assert next_checkpoint(done, [50, 20], 130) == after


def test_heartbeat_in_long_phases_only(caplog):
    with caplog.at_level("INFO", "internlm_lite"):
        with heartbeat("loading data", every_seconds=10):
            pass
        assert caplog.messages == []
        with heartbeat("loading data", every_seconds=0.05):
            deadline = time.monotonic() + 30
            while len(caplog.messages) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        spoken = len(caplog.messages)
        assert spoken >= 2 and caplog.messages[0].startswith("loading data: still at it after 0:00:0")
        time.sleep(0.15)
    assert len(caplog.messages) == spoken
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]


def test_heartbeat_ends_when_the_body_fails():
    with pytest.raises(ValueError, match="inner"), heartbeat("loading data", every_seconds=0.01):
        raise ValueError("inner")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]
