"""What a test session must not leave behind: processes, and with them their ports, network namespaces, mounts."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest

_MARK = "INTERNLM_LITE_TESTS"
"""Environment variable that all processes of a session inherit."""
_END_SECONDS = 20.0


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Set up before all other fixtures of the session, and so torn down after them."""
    mark = os.environ[_MARK] = uuid.uuid4().hex
    before = {*_namespaces(), *_mounts()}
    yield
    deadline = time.monotonic() + _END_SECONDS
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"processes left behind: {left}"
    assert not (left_there := {*_namespaces(), *_mounts()} - before), f"left behind: {left_there}"


def processes(mark: str) -> dict[int, str]:
    """Process id -> command line, of all that inherited `mark` but this one and multiprocessing's own servers."""
    servers = (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) in (os.getpid(), *servers):
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


def _namespaces() -> set[str]:
    return {f"network namespace {path.name}" for path in Path("/run/netns").glob("*")}


def _mounts() -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {f"mount {line.split()[4]}" for line in lines if "/run/netns" not in line}
