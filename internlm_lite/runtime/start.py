"""Bring the ranks of a job together, and end a process with the exit code that is true.

    every rank: store.set("here/<rank>")  ->  wait for all  ->  init_process_group over the same store

Meeting through our own keys first tells "rank 3 never came" from every other failure.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from internlm_lite.errors import MeshError, PeerLostError
from internlm_lite.runtime.log import flush_logging
from internlm_lite.runtime.place import Place

logger = logging.getLogger("internlm_lite")


def start_world(
    place: Place, device: torch.device, timeout: timedelta, collectives: timedelta | None = None
) -> Store | None:
    """Initialise `torch.distributed`: nccl on CUDA, gloo on the CPU; nothing for a world of one.

    `timeout` bounds the meeting here, `collectives` (None: the same) every later collective of the default group.
    Returns a connection of its own to the store, for the watchdog. Raises MeshError when the port is taken, the master
    cannot be reached, or ranks are missing after `timeout`.
    """
    if place.world_size == 1:
        return None
    connect_ranks(meet(place, timeout), place, device, collectives or timeout)
    return PrefixStore(f"{_prefix(place)}/watchdog", _connect(place, timeout, serves=False))


def meet(place: Place, timeout: timedelta) -> Store:
    """The job's key-value store, once every rank has come to it; a world of one has its own. Raises MeshError."""
    if place.world_size == 1:
        return HashStore()
    serves = place.rank == 0 and not place.agent_store
    store = PrefixStore(_prefix(place), _connect(place, timeout, serves))
    _wait_for_all(store, place, timeout)
    return store


def connect_ranks(store: Store, place: Place, device: torch.device, timeout: timedelta) -> None:
    """The default process group, for ranks that have met. Raises MeshError."""
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("process_group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
        raise MeshError(
            f"rank {place.rank} on {place.hostname} met all {place.world_size} ranks but could not connect to them: "
            f"{_first_line(error)}; check that the hosts reach each other on the interface used "
            "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        ) from error


def announce_layout(data: int, pipeline: int, tensor: int) -> None:
    """Log the sizes of the mesh in the seed's words."""
    logger.info(
        f"Distributed environment is initialized, data parallel size: {data}, "
        f"pipeline parallel size: {pipeline}, tensor parallel size: {tensor}"
    )


def stop_world() -> None:
    """Wait for all ranks and take the process groups down. Raises PeerLostError when a rank is gone."""
    if not dist.is_initialized():
        return
    try:
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        raise PeerLostError(f"a peer was lost while the job ended: {_first_line(error)}") from error


def end_process(code: int, together: bool = False) -> NoReturn:
    """End this process with exit code `code`, after flushing logs and taking the process groups down.

    `together`: every rank ends with this code, so they wait for each other, as with code 0. Else peers may be gone,
    and nothing waits for them. A process that used torch.distributed leaves by `os._exit`: gloo's threads abort about
    half of all interpreter exits with signal 6, and NCCL waits for dead peers. So does one with a thread that still
    works: it has been waited for as long as it should, and may hang in its storage.
    """
    distributed = dist.is_initialized()
    if code == 0 or together:
        # `srun --kill-on-bad-exit` sends SIGTERM to ranks that are still here when the first has ended with a code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            stop_world()
        except PeerLostError as error:
            logger.error(str(error))
            code = error.exit_code
    flush_logging()
    if distributed or any(_must_be_joined(thread) for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def _must_be_joined(thread: threading.Thread) -> bool:
    """Whether the interpreter waits for it at its end."""
    return thread is not threading.main_thread() and not thread.daemon


def leave_now(code: int, last_words: Callable[[], object], seconds: float) -> NoReturn:
    """End this process from any thread, whatever the others are blocked in: `last_words`, which write to the log and to
    files, get `seconds`, as a disk or a terminal that takes nothing may be what blocks them.
    """

    def speak() -> None:
        last_words()
        flush_logging()

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(seconds)
    os._exit(code)


def _prefix(place: Place) -> str:
    world = f"world{place.world_size}"
    # An agent's store outlives the processes, and still holds the dead ones' addresses. Other stores are new each time,
    # and their agents may count differently: one that came later has not seen the failures before it.
    return f"{world}/attempt{place.attempt}" if place.agent_store else world


def _connect(place: Place, timeout: timedelta, serves: bool) -> Store:
    where = f"{place.master_host}:{place.master_port}"
    try:
        return TCPStore(
            place.master_host,
            place.master_port,
            place.world_size,
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        problem = _first_line(error)
        if serves and ("EADDRINUSE" in str(error) or "in use" in str(error)):
            raise MeshError(
                f"rank 0 on {place.hostname}: port {place.master_port} is in use, perhaps by another job; "
                "choose another (--port under Slurm, --master-port of torchrun)"
            ) from error
        if serves:
            raise MeshError(f"rank 0 on {place.hostname} cannot serve at {where}: {problem}") from error
        raise MeshError(
            f"rank {place.rank} on {place.hostname} did not reach rank 0 at {where} within {_seconds(timeout)}: "
            f"{problem}; check that rank 0 started, that host and port are right (--host, --port) and reachable"
        ) from error


def _wait_for_all(store: Store, place: Place, timeout: timedelta) -> None:
    keys = [f"here/{rank}" for rank in range(place.world_size)]
    try:
        times = store.add(keys[place.rank], 1)
        if times > 1 and not place.agent_store:
            raise MeshError(
                f"rank {place.rank} was started {times} times, now on {place.hostname}: every process needs a rank of "
                "its own; is another job using the same address and port?"
            )
        store.wait(keys, timeout)
    except RuntimeError as error:
        raise MeshError(_missing(store, keys, place, timeout)) from error


def _missing(store: Store, keys: list[str], place: Place, timeout: timedelta) -> str:
    where = f"{place.master_host}:{place.master_port}"
    try:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return f"rank {place.rank} on {place.hostname} lost rank 0 at {where} while waiting for the others; see its log"
    named = ", ".join(map(str, absent[:8])) + (", ..." if absent[8:] else "")
    return (
        f"{place.world_size - len(absent)} of {place.world_size} ranks came to {where} within {_seconds(timeout)}; "
        f"missing: {named}; check that they were started and did not fail before this"
    )


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
