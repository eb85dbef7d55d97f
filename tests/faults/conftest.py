"""Faults are injected into files in memory where there is a memory file system: thousands of them are flushed.

Nothing that a fault leaves behind may outlive its test: neither a process, with its ports, nor a mount.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoint.conftest import tmp_path
from tests.faults.trouble import disk_name

__all__ = ["tmp_path"]
_MARK = "FAULTS_TESTS"
_HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


@pytest.fixture(scope="package", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Set up first, so looked at last. What tests of other folders started before, such as a server, may stay."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    own = os.environ[_MARK] = uuid.uuid4().hex
    yield
    del os.environ[_MARK]
    deadline = time.monotonic() + 10
    while left := _processes(own, before):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.1)
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if line.startswith(f"{disk_name()} ")]
    assert not mounts, f"mounts are left: {mounts}"


def _processes(own: str, before: set[int]) -> list[str]:
    """Descendants of this process, and orphans that were born among them; not multiprocessing's own helpers."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == own and process.pid != os.getpid():
                found[process.pid] = process
        except psutil.Error:
            continue
    return [_named(process) for pid, process in found.items() if pid not in before and not _may_stay(process)]


def _may_stay(process: psutil.Process) -> bool:
    """The fork server is a child of ours; its own children have its command line, and are ranks."""
    try:
        helper = any(name in " ".join(process.cmdline()) for name in _HELPERS)
        return process.status() == psutil.STATUS_ZOMBIE or (helper and process.ppid() == os.getpid())
    except psutil.Error:
        return True  # it has ended meanwhile


def _named(process: psutil.Process) -> str:
    try:
        return f"{process.pid} of {process.ppid()}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return str(process.pid)
