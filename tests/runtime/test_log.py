"""Record formats, who prints what where, and the records from before the run folder was known."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest

from internlm_lite.errors import StorageError
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.log import close_logging, flush_logging, logger, resolve_style, setup_logging

SEED_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) (\w+\.py):\d+ in (\w+) -- (.*)")


@pytest.fixture(autouse=True)
def restored():
    yield
    close_logging()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def place(rank: int) -> DistEnv:
    return DistEnv(rank, 4, rank, 4, "host", "torch", "", "localhost", 1)


def speak() -> None:
    logger.debug("d")
    logger.info("i")
    logger.warning("w")


def test_rank_0_prints_info(capsys, tmp_path):
    setup_logging(place(0), tmp_path)
    speak()
    lines = capsys.readouterr().out.splitlines()
    parts = [SEED_RECORD.fullmatch(line).groups() for line in lines]
    assert parts == [("INFO", "test_log.py", "speak", "i"), ("WARNING", "test_log.py", "speak", "w")]


def test_other_ranks_print_warnings(capsys, tmp_path):
    setup_logging(place(3), tmp_path)
    speak()
    flush_logging()
    assert [line[-1] for line in capsys.readouterr().out.splitlines()] == ["w"]
    text = (tmp_path / "logs" / "rank-00003.log").read_text()
    assert [SEED_RECORD.fullmatch(line).group(4) for line in text.splitlines()] == ["d", "i", "w"]


def test_early_records(capsys, tmp_path):
    setup_logging(place(0), None)
    logger.info("early")
    setup_logging(place(0), None, "full")
    logger.info("still early")
    setup_logging(place(0), tmp_path)
    logger.info("late")
    text = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert [SEED_RECORD.fullmatch(line).group(4) for line in text.splitlines()] == ["early", "still early", "late"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_verbatim_and_compact(capsys, tmp_path):
    setup_logging(place(0), tmp_path, "compact")
    logger.info("100 % whole line ", extra={"verbatim": True, "compact": "short"})
    logger.info("plain")
    logger.error("bad")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "short"
    assert re.fullmatch(r"\d\d:\d\d:\d\d plain", out[1]) and re.fullmatch(r"ERROR \d\d:\d\d:\d\d bad", out[2])
    assert (tmp_path / "logs" / "rank-00000.log").read_text().startswith("100 % whole line \n")


@pytest.mark.parametrize("style", ["full", "compact"])
def test_a_terminal_obeys_no_name(capsys, tmp_path, style):
    setup_logging(place(0), tmp_path, style)
    logger.info("wrote %s\nin two lines", "a\x1b[31m\x9b31m\r中文")
    assert capsys.readouterr().out.endswith("wrote a\\x1b[31m\\x9b31m\\r中文\nin two lines\n")
    assert "\x1b" not in (tmp_path / "logs" / "rank-00000.log").read_text()


def test_auto_style(monkeypatch):
    assert resolve_style("auto", sys.stdout) == "full"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert resolve_style("auto", sys.stdout) == "compact"
    assert resolve_style("full", sys.stdout) == "full"


def test_errors_carry_their_traceback(capsys):
    setup_logging(place(0), None)
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("outer")
    assert "Traceback" in (out := capsys.readouterr().out) and "ValueError: inner" in out


def test_unwritable_folder(tmp_path):
    (tmp_path / "logs").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="rank-00000"):
        setup_logging(place(0), tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_reported_once(capsys, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.log").symlink_to("/dev/full")
    setup_logging(place(0), tmp_path)
    speak()
    assert capsys.readouterr().err.count("WARNING cannot write") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_and_stderr_on_full_disk(monkeypatch, tmp_path):
    """As under Slurm, where both are files beside the run folder."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.log").symlink_to("/dev/full")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w", buffering=1))  # noqa: SIM115 (cannot be closed: it is full)
    setup_logging(place(0), tmp_path)
    speak()
    flush_logging()
