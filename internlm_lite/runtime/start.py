"""Start and stop the process group of a job, and end a process with the right exit code."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from internlm_lite.errors import MeshError, PeerLostError, first_line
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.log import flush_logging
from internlm_lite.runtime.rendezvous import rendezvous
from internlm_lite.runtime.tool import flush_or_discard

logger = logging.getLogger("internlm_lite")


def start_world(
    dist_env: DistEnv,
    device: torch.device,
    timeout: timedelta,
    collectives: timedelta | None = None,
    fingerprint: Mapping[str, str] = {},
) -> Store | None:
    """Initialise `torch.distributed`: nccl on CUDA, gloo on the CPU; nothing for a world of one.

    Collective. `timeout` limits the rendezvous, `collectives` (None: the same) later collectives of the default group.
    `fingerprint` of the job: must be equal on all ranks. Returns a separate connection to the store, for the
    watchdog. Raises MeshError when the port is taken, the master cannot be reached, ranks are missing after `timeout`,
    or fingerprints differ.
    """
    if dist_env.world_size == 1:
        return None
    store = rendezvous(dist_env, timeout, fingerprint)
    connect_ranks(store, dist_env, device, collectives or timeout)
    return PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]  # not in torch's stubs


def connect_ranks(store: Store, dist_env: DistEnv, device: torch.device, timeout: timedelta) -> None:
    """Make the default process group, after the rendezvous. Raises MeshError."""
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("process_group", store),
            rank=dist_env.rank,
            world_size=dist_env.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
        raise MeshError(
            f"rank {dist_env.rank} on {dist_env.hostname} met all {dist_env.world_size} ranks but could not connect to "
            f"them: {first_line(error)}; check that the hosts reach each other on the interface used "
            "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        ) from error


def announce_layout(data: int, pipeline: int, tensor: int, context: int = 1) -> None:
    """Log the sizes of the mesh in InternLM's format."""
    logger.info(
        "Distributed environment is initialized, data parallel size: %d, pipeline parallel size: %d, "
        "tensor parallel size: %d%s",
        *(data, pipeline, tensor, f", context parallel size: {context}" * (context > 1)),
    )


def stop_world() -> None:
    """Wait for all ranks and destroy the process groups. Collective. Raises PeerLostError when a rank has ended."""
    if not dist.is_initialized():
        return
    try:
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        raise PeerLostError(f"a peer was lost while the job ended: {first_line(error)}") from error


def end_process(code: int, world_size: int = 1) -> NoReturn:
    """End this process with exit code `code`, after flushing logs, without waiting for other ranks (`stop_world` does).

    With several ranks it calls `os._exit`: gloo's threads abort about half of all interpreter exits with signal 6,
    and NCCL waits for dead peers. So does a process with a running thread: such a thread has exceeded its time limit,
    and may be blocked in storage.
    """
    flush_logging()
    flush_or_discard()
    if world_size > 1 or any(_must_be_joined(thread) for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def _must_be_joined(thread: threading.Thread) -> bool:
    """Whether the interpreter waits for this thread at exit."""
    return thread is not threading.main_thread() and not thread.daemon


def leave_now(code: int, last_words: Callable[[], object], seconds: float) -> NoReturn:
    """End this process from any thread, even if others are blocked. `last_words` writes to the log and to files; it is
    abandoned after `seconds`, as a disk or a terminal may block it.
    """

    def speak() -> None:
        last_words()
        flush_logging()

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(seconds)
    os._exit(code)
