"""Ends a process in which one thread holds the interpreter's lock for too long, so that no other can act.

rank    writes a line, the file for its stacks, to its child from a thread that gets the lock now and then
child   counts the seconds without a line, then sends SIGUSR2: faulthandler, which needs no lock, writes the stacks to
        the child, and the process ends; SIGKILL if it does not

A timer inside the process would also count the time in which the job is suspended (`scontrol suspend`).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("internlm_lite")

_LOOK_SECONDS = 0.5
_STACKS_SECONDS = 5.0


class LockTimer:
    """Measures the process that made it, until `close` or its end."""

    def __init__(self, limit_seconds: float) -> None:
        read, self._pipe = os.pipe()
        try:
            self._child = subprocess.Popen([sys.executable, "-I", "-S", __file__, str(limit_seconds)], stdin=read)
        except OSError as error:
            logger.warning("a rank that holds Python's lock for too long will not be ended: %s", error.strerror)
        finally:
            os.close(read)
        faulthandler.register(signal.SIGUSR2, self._pipe, all_threads=True, chain=True)

    def restart(self, stacks_file: Path | None) -> None:
        """Count from now on. `stacks_file`: where stacks are appended; None: standard error. Never blocks."""
        if select.select([], [self._pipe], [], 0)[1]:  # else the child is suspended
            with suppress(BrokenPipeError):
                os.write(self._pipe, f"{stacks_file or ''}\n".encode())

    def close(self) -> None:
        """Stop counting. The child, which ends soon, is not waited for: it may be suspended."""
        faulthandler.unregister(signal.SIGUSR2)
        os.close(self._pipe)


def watch(pid: int, limit_seconds: float) -> None:
    """What the child does. Returns when process `pid` has ended."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job, which then may still have much to save
    silent_seconds, path = 0.0, ""
    while silent_seconds < limit_seconds:
        if select.select([0], [], [], _LOOK_SECONDS)[0]:
            lines = os.read(0, 1 << 16).decode(errors="replace").split("\n")
            if lines == [""]:
                return
            silent_seconds, path = 0.0, ([path, *lines])[-2]
        elif not _is_suspended(pid):
            silent_seconds += _LOOK_SECONDS  # not by the clock: this process is suspended with the job
    stacks = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {pid}\n".encode() + _end(pid)
    print(
        f"process {pid} was ended: one of its threads held Python's lock for {silent_seconds:g} s, so no other ran; "
        f"their stacks: {path}",
        file=sys.stderr,
        flush=True,
    )
    try:
        with open(path or sys.stderr.fileno(), "ab", closefd=bool(path)) as file:
            file.write(stacks)
    except OSError:
        sys.stderr.buffer.write(stacks)


def _end(pid: int) -> bytes:
    """End the process; returns its stacks."""
    stacks, deadline = b"", time.monotonic() + _STACKS_SECONDS
    for number in (signal.SIGUSR2, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        while select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0] and (part := os.read(0, 1 << 16)):
            stacks += part
    return stacks


def _is_suspended(pid: int) -> bool:
    """Whether a signal or a debugger has stopped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] in b"Tt"
    except OSError:
        return False


if __name__ == "__main__":
    watch(os.getppid(), float(sys.argv[1]))
