"""Programs of the system that some tests need: installed only where INSTALL_TEST_DEPS=1 allows it, as .ci/run does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_LOCK = Path(tempfile.gettempdir()) / "internlm_lite-install.lock"


def install(*packages: str) -> None:
    """On Debian, as root and with INSTALL_TEST_DEPS=1; elsewhere, and without a package source, nothing happens."""
    allowed = os.environ.get("INSTALL_TEST_DEPS") == "1"
    if not allowed or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(_LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of one test run
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["apt-get", "-qq", *command], env=environment, timeout=240, check=False,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                )  # fmt: skip


def advice(*packages: str) -> str:
    """What a skip says."""
    return f"apt-get install {' '.join(packages)} (INSTALL_TEST_DEPS=1 does it, as root)"
