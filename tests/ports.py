"""Free ports of this machine that the kernel does not assign by itself."""

from __future__ import annotations

import contextlib
import random
import socket

_ASKED_FOR = range(5_000, 15_000)
"""Below the ports of Slurm jobs (runtime/dist_env.py) and below the kernel's ephemeral range."""


def free_ports(count: int) -> list[int]:
    """`count` different ports, chosen at random, as tests of other processes look for ports too."""
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
