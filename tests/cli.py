"""Run a program of the repository like a user, in a process forked after torch was imported."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.world import fork_context

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """Result of a process: exit code, and standard output and error in one text."""

    code: int
    output: str


def _main(program: str, arguments: tuple[str, ...], log: str, folder: str, environment: dict[str, str]) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background jobs
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    runpy.run_path(program, run_name="__main__")


def start(program: str, *arguments: str, folder: Path, log: Path, environment: dict[str, str] | None = None):
    """Start `python PROGRAM ARGUMENTS` in `folder`; its output goes to `log`. Returns the process."""
    target = (str(ROOT / program), arguments, str(log), str(folder), environment or {})
    process = fork_context.Process(target=_main, args=target, daemon=True)
    process.start()
    return process


def run(program: str, *arguments: str, folder: Path, timeout_seconds: float = 120) -> Ended:
    """Run a program to its end; the test fails when that takes longer than `timeout_seconds`."""
    log = folder / "output.log"
    process = start(program, *arguments, folder=folder, log=log)
    return ended(process, log, timeout_seconds)


def ended(process, log: Path, timeout_seconds: float = 120) -> Ended:
    """Wait for the end of a started process; the test fails after `timeout_seconds`."""
    process.join(timeout_seconds)
    if process.is_alive():
        process.kill()
        process.join(10)
        raise AssertionError(f"still running after {timeout_seconds} s:\n{log.read_text()}")
    assert process.exitcode is not None
    return Ended(process.exitcode, log.read_text())
