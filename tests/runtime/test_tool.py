"""What a user sees when a tool ends."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from rich.table import Table

from internlm_lite.errors import CheckpointError, StorageError
from internlm_lite.runtime.tool import ToolConsole, run_tool


def raising(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("set ckpt.s3.insecure"), 2, "CheckpointError: set ckpt.s3.insecure"),
        (StorageError("full"), 6, "StorageError: full"),
        (PermissionError(13, "Permission denied", "/x"), 6, "StorageError: /x: Permission denied; mend it, or give"),
        (OSError(28, "No space left on device"), 6, "StorageError: standard output, or a file that was"),
        (StorageError("no \x1b[31m\u202e"), 6, "StorageError: no \\x1b[31m\\u202e"),
        (PermissionError(13, "Permission denied", "/x\x07\n"), 6, "StorageError: /x\\x07\\n: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted: half is there"),
    ],
)
def test_user_error(error, code, line, capsys):
    assert run_tool(raising(error), "interrupted: half is there") == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_s3_option_in_message(capsys):
    assert run_tool(raising(CheckpointError("set ckpt.s3.insecure=True")), has_s3_option=True) == 2
    assert capsys.readouterr().err == "CheckpointError: set --s3 insecure=True\n"


@pytest.mark.parametrize("defect", [ValueError("x"), ConnectionResetError(104, "reset")])
def test_internal_error_keeps_traceback(defect):
    with pytest.raises(type(defect)):
        run_tool(raising(defect))


@pytest.mark.parametrize("show", [print, lambda line: ToolConsole().print(line)], ids=["print", "rich"])
def test_closed_pipe(show, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run_tool(lambda: show("a line") or 0) == 128 + signal.SIGPIPE
        print("what is still to be flushed")
    assert capsys.readouterr().err == ""


def test_full_standard_output(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_tool(lambda: print("a line") or 0) == StorageError.exit_code
        print("what is still to be flushed")
    assert capsys.readouterr().err.startswith(
        "StorageError: standard output, or a file that was being written: No space"
    )


@pytest.mark.parametrize("show", [print, lambda line: ToolConsole().print(line)], ids=["print", "rich"])
def test_closed_standard_output(show, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run_tool(lambda: show("a line") or 0) == 0


def test_a_table_obeys_no_name(capsys):
    table = Table("folder")
    table.add_row("a\x1b[31m[bold]b[/]")
    ToolConsole(width=40).print(table)
    out = capsys.readouterr().out
    assert "a\\x1b[31mb" in out and "\x1b" not in out
