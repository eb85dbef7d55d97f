"""What torchrun's agent reads of a rank that failed, read as the agent does."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from internlm_lite.errors import DataError, PeerLostError
from internlm_lite.runtime.torchrun import report_to_agent


def _failed(file: Path, error: BaseException, code: int) -> ProcessFailure:
    with pytest.raises(type(error)), report_to_agent(file):
        raise error
    return ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))


def test_summary_has_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1700000000.9)
    lost = _failed(tmp_path / "0.json", PeerLostError("rank 0 lost a peer"), 5)
    cause = _failed(tmp_path / "1.json", DataError("data.train_folder: /data is missing"), 2)
    _, root = str(ChildFailedError("train.py", {0: lost, 1: cause})).split("Root Cause")
    assert "exitcode  : 2" in root and "traceback : DataError: data.train_folder: /data is missing\n" in root


def test_internal_error_has_traceback(tmp_path: Path) -> None:
    found = _failed(tmp_path / "0.json", ZeroDivisionError("of all things"), 1)
    text = str(ChildFailedError("train.py", {0: found}))
    assert "Traceback (most recent call last)" in text and "ZeroDivisionError: of all things" in text


def test_no_error_file(tmp_path: Path) -> None:
    for file in (None, tmp_path / "absent" / "error.json"):
        with pytest.raises(DataError, match="no data"), report_to_agent(file):
            raise DataError("no data")
