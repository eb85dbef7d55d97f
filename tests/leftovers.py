"""Checks that a test session leaves behind no processes (and so no open ports), network namespaces or mounts."""

from __future__ import annotations

import contextlib
import os
import sys
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
    """Session fixture that is set up before all others, and so torn down after them."""
    mark = os.environ[_MARK] = uuid.uuid4().hex
    yield
    if "wandb" in sys.modules:  # its service ends only with this process
        sys.modules["wandb"].teardown()
    deadline = time.monotonic() + _END_SECONDS
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"processes left behind: {left}"
    assert not (named := [*_namespaces(), *_mounts()]), f"left behind: {named}"


def processes(mark: str) -> dict[int, str]:
    """Process id -> command line of processes that inherited `mark`, except this one and multiprocessing's servers."""
    servers = (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) in (os.getpid(), *servers):
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to another user
            if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


def _namespaces() -> list[str]:
    """Network namespaces with this process's id in their name, as NetLab creates them."""
    return [f"network namespace {path.name}" for path in Path("/run/netns").glob(f"lab{os.getpid()}n*")]


def _mounts() -> list[str]:
    """Mounts of devices whose name ends in this process's id, as small disks have."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [f"mount {place}" for device, place, *_ in lines if device.endswith(f"-{os.getpid()}")]
