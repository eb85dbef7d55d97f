"""From a rule to the log, the events and the webhook; disks; the threads behind it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from typing import Any

import pytest

from internlm_lite.config.schema import AlertsConfig, CkptConfig
from internlm_lite.monitor.alert_monitor import AlertMonitor, Ticker
from internlm_lite.monitor.disk_usage import disks, written_folders
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.monitor.sinks import FanOut, run_files
from tests.monitor.chat import SECRET, Chat
from tests.monitor.test_alerts import line


def watched(folder: Path, **config: Any) -> FanOut:
    fan_out = FanOut(run_files(folder), {})
    alerts = AlertsConfig(**config)
    fan_out.add("alerts", AlertMonitor(alerts, 100, [folder], "job x", fan_out.event, disk_seconds=0.02))
    fan_out.event("start", step=0)
    return fan_out


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def alerts_in(folder: Path) -> list[dict[str, Any]]:
    found = [value for value in read_objects(folder / "events.jsonl") if value["event"].startswith("alert")]
    return [{key: value for key, value in event.items() if key not in ("time", "seg")} for event in found]


def test_alert_reaches_log_events_and_webhook(
    tmp_path: Path,
    chat: Chat,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    fan_out = watched(tmp_path, webhook=chat.address, format="slack")
    fan_out.step(line(0, loss=math.nan))
    fan_out.step(line(1))
    fan_out.event("alarm", checkpoint="step 2", why="https://me:hush@host/x is full")
    until(lambda: len(chat.seen) == 3)
    fan_out.close()
    assert alerts_in(tmp_path) == [
        {"event": "alert", "rule": "non_finite_loss", "step": 0, "text": "the loss of step 0 is nan"},
        {"event": "alert_over", "rule": "non_finite_loss", "step": 1},
        {
            "event": "alert",
            "rule": "checkpoint_failed",
            "step": 1,
            "text": "checkpoint step 2 was not saved: https://***@host/x is full",
        },
    ]
    assert [body["text"] for _, _, body in chat.seen] == [
        "[job x] non_finite_loss: the loss of step 0 is nan",
        "[job x] over: non_finite_loss: after 0 s",
        "[job x] checkpoint_failed: checkpoint step 2 was not saved: https://***@host/x is full",
    ]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[0] == "ALERT non_finite_loss: the loss of step 0 is nan" and len(warnings) == 2
    assert SECRET not in caplog.text + (tmp_path / "events.jsonl").read_text()


def test_silence_is_noticed_without_events(tmp_path: Path) -> None:
    fan_out = watched(tmp_path, silent_seconds=0.05)
    until(lambda: alerts_in(tmp_path))
    assert alerts_in(tmp_path)[0]["rule"] == "silent"
    fan_out.step(line(0))
    assert alerts_in(tmp_path)[1] == {"event": "alert_over", "rule": "silent", "step": 0}
    fan_out.close()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=usage.total // 100))
    fan_out = watched(tmp_path)
    until(lambda: alerts_in(tmp_path))
    (alert,) = alerts_in(tmp_path)
    assert alert["rule"] == f"disk_nearly_full {tmp_path}" and "left (1.0%); make room" in alert["text"]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=usage.total))
    until(lambda: len(alerts_in(tmp_path)) == 2)
    assert alerts_in(tmp_path)[1]["event"] == "alert_over"
    fan_out.close()


def test_close_joins_threads(tmp_path: Path, chat: Chat) -> None:
    before = set(threading.enumerate())
    fan_out = watched(tmp_path, webhook=chat.address, format="slack")
    assert len(set(threading.enumerate()) - before) == 3
    fan_out.close()
    assert not {thread for thread in set(threading.enumerate()) - before if "Handler" not in thread.name}


def test_disk_of_several_folders_is_checked_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (found,) = disks([tmp_path, tmp_path / "a", tmp_path / "missing"])
    assert found.folder == str(tmp_path) and 0 <= found.free <= found.total


def test_written_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ckpt = {
        "save_ckpt_folder": "local:~/ckpts",
        "snapshot_ckpt_folder": "snapshots",
        "async_upload_tmp_folder": "/dev/shm/x",
    }
    for changes, expected in (
        ({}, []),
        ({"enable_save_ckpt": True}, ["home/ckpts", "/dev/shm/x"]),
        ({"enable_save_ckpt": True, "oss_snapshot_freq": 5, "async_upload": False}, ["home/ckpts", "snapshots"]),
        ({"enable_save_ckpt": True, "save_ckpt_folder": "s3://bucket/x"}, ["/dev/shm/x"]),
    ):
        found = written_folders(tmp_path, CkptConfig(**{**ckpt, **changes}))
        assert found == [tmp_path, *(tmp_path / name for name in expected)]


def test_failing_ticker_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("gone")

    ticker = Ticker("the watch", 0.01, fail)
    until(lambda: caplog.records)
    ticker.close()
    assert "the watch failed and is switched off: OSError: gone" in caplog.text
