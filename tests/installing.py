"""System packages that some tests need; installed only if INSTALL_TEST_DEPS=1 is set, as .ci/run does."""

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
    """Install packages on Debian, as root and with INSTALL_TEST_DEPS=1; else, or without package source, do nothing."""
    allowed = os.environ.get("INSTALL_TEST_DEPS") == "1"
    if not allowed or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(_LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one test run take turns
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["apt-get", "-qq", *command], env=environment, timeout=240, check=False,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                )  # fmt: skip


def advice(*packages: str) -> str:
    """Reason of a skip: how to install the packages."""
    return f"apt-get install {' '.join(packages)} (INSTALL_TEST_DEPS=1 does it, as root)"
