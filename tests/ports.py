"""Ports of this machine that nobody listens on right now, and that nobody gets who does not ask for them by number."""

from __future__ import annotations

import contextlib
import random
import socket

_ASKED_FOR = range(5_000, 15_000)
"""Below those of Slurm jobs (runtime/dist_env.py), and below those that the kernel hands out to whoever wants any."""


def free_ports(count: int) -> list[int]:
    """Different ones, at random, as other tests of this machine may look for some too."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_ASKED_FOR, len(_ASKED_FOR)):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"found {len(found)} free ports, expected {count}")


def free_port() -> int:
    return free_ports(1)[0]
