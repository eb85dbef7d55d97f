"""Checks of the folders that a run writes to: existing, shared by all hosts, free space, write speed."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from internlm_lite.apps.doctor.exchange import Exchange

PROBE_BYTES = 64 * 2**20
_SEEN_SECONDS = 5.0
"""Longest delay until a network file system shows a file that another host wrote."""


def existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent, which may turn out to be a file."""
    folder = folder.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def probe_folder(exchange: Exchange, name: str, folder: Path) -> dict[str, Any]:
    """{path, free_bytes, write_bytes_per_second, shared, problem}; collective. One rank of each host writes.

    `shared`: whether the file that rank 0 wrote is visible. None: not checked, or the check failed.
    """
    place, where = exchange.dist_env, existing(folder)
    found: dict[str, Any] = {"path": str(where), "free_bytes": None, "write_bytes_per_second": None}
    found |= {"shared": None, "problem": None}
    mark = where / f".doctor-{uuid.uuid4().hex}"  # a process id may be the same in containers on two hosts
    try:
        if not os.path.isdir(where):
            kind = "a file" if where.exists() else "a dangling link"
            raise NotADirectoryError(errno.ENOTDIR, f"{kind}, expected a folder")
        found["free_bytes"] = shutil.disk_usage(where).free
        if place.local_rank == 0:
            found["write_bytes_per_second"] = _write_speed(mark)
    except OSError as error:
        found["problem"] = f"{where}: {error.strerror}"
    main_mark = exchange.broadcast(f"disk/{name}", mark.name if place.is_main and found["problem"] is None else None)
    if main_mark is not None and place.local_rank == 0 and found["problem"] is None:
        found["shared"] = _is_visible(where / main_mark)
    exchange.gather(f"disk/{name}/looked", True)
    exchange.broadcast(f"disk/{name}/over", True)
    with suppress(OSError):
        mark.unlink(missing_ok=True)
    return found


def _write_speed(path: Path) -> float:
    block = os.urandom(2**20)
    begin = time.monotonic()
    with open(path, "xb", buffering=0) as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return PROBE_BYTES / (time.monotonic() - begin)


def _is_visible(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # makes the NFS client ask the server again
        time.sleep(0.1)
    return True
