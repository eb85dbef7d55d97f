"""report.html while training goes on."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from pathlib import Path

import pytest

from internlm_lite.apps.report import writer as module
from internlm_lite.apps.report.writer import ReportWriter
from tests.apps.report.small import event, line, run_folder, write


def steps_in(path: Path) -> list[int]:
    data = re.search(r'id="payload">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert data is not None
    return json.loads(data[1])["runs"][0]["series"]["step"]


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.01)


def test_it_follows_the_run_and_ends_with_all_of_it(tmp_path: Path) -> None:
    run_folder(tmp_path, [line(0)])
    writer = ReportWriter(tmp_path, every_seconds=0.01)
    wait_for(lambda: writer.path.exists() and steps_in(writer.path) == [0])
    write(tmp_path / "metrics.jsonl", [line(1)], "a")
    write(tmp_path / "events.jsonl", [event("done", 2, step=2)], "a")
    writer.close()
    assert steps_in(writer.path) == [0, 1]
    assert '"phase":"done"' in writer.path.read_text()
    assert "report" not in [thread.name for thread in threading.enumerate()]


def test_nothing_new_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(module, "write_report", lambda payload, path, assets: written.append(path))
    run_folder(tmp_path, [line(0)])
    writer = ReportWriter(tmp_path, every_seconds=3600)
    writer.close()
    writer._write()
    assert written == [tmp_path / "report.html"]


def test_it_waits_as_long_as_its_share_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of 3 s may come again after 1000 s."""
    waits: list[float] = []

    class Ended:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) == 3

    clock = iter([0.0, 3.0, 10.0, 10.05])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    writer = ReportWriter(tmp_path, every_seconds=3600)
    writer.close()
    writer._ended, writer._every_seconds = Ended(), 60.0
    writer._work()
    assert waits == [5.0, pytest.approx(1000.0), 60.0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("odd")])
def test_a_failure_is_told_once_and_never_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "make_payload", fail)
    run_folder(tmp_path, [line(0)])
    with caplog.at_level(logging.WARNING, "internlm_lite"):
        writer = ReportWriter(tmp_path, every_seconds=0.001)
        time.sleep(0.05)
        writer.close()
    assert [record.getMessage().count("training goes on") for record in caplog.records] == [1]


def test_a_folder_that_is_gone_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_folder(tmp_path / "run", [line(0)])
    writer = ReportWriter(tmp_path / "run", every_seconds=3600)
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run").rmdir()
    with caplog.at_level(logging.WARNING, "internlm_lite"):
        writer.close()
    assert len(caplog.records) <= 1
