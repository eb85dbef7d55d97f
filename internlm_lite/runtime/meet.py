"""Ranks find each other through a key-value store, before there is any process group.

    rank 0   round = NAME              waits for NAME/here/<rank> of all        NAME/all = who they are
    others   round? -> NAME/here/<rank> = who I am           NAME/all? am I in it?

Meeting through our own keys tells "rank 3 never came" from every other failure. The name is new for every start: the
store of torchrun's agent outlives the processes and still holds what dead ones said, and its agents do not count
restarts alike (one whose ranks were healthy, or that joined later, has seen fewer), so their count cannot tell starts
apart.
"""

from __future__ import annotations

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from internlm_lite.errors import MeshError
from internlm_lite.runtime.place import Place

_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.02, 0.5
_LAST_WORDS_SECONDS = 2.0
"""Rank 0, which serves the store, says who is missing before it goes; others wait so much longer for that."""


def meet(place: Place, timeout: timedelta) -> Store:
    """The job's key-value store, once every rank has come to it; a world of one has its own. Raises MeshError.

    Ctrl-C ends it at once: Python would not hear it inside of torch, which is why a thread meets.
    """
    if place.world_size == 1:
        return HashStore()
    worker = ThreadPoolExecutor(1, thread_name_prefix="meeting")
    try:
        return worker.submit(_meet, place, timeout).result()
    finally:
        worker.shutdown(wait=False)


def _meet(place: Place, timeout: timedelta) -> Store:
    serves = place.is_main and not place.agent_store
    # Ranks that were told of worlds of other sizes do not count for this one.
    store = PrefixStore(f"world{place.world_size}", _connect(place, timeout, serves))
    try:
        name = _call(store, place, timeout) if place.is_main else _answer(store, place, timeout)
    except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
        raise MeshError(
            f"rank {place.rank} on {place.hostname} lost rank 0 at {_where(place)} while waiting for the others; see "
            f"its log ({first_line(error)})"
        ) from error
    return PrefixStore(name, store)


def _connect(place: Place, timeout: timedelta, serves: bool) -> Store:
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
        problem = first_line(error)
        if serves and ("EADDRINUSE" in str(error) or "in use" in str(error)):
            raise MeshError(
                f"rank 0 on {place.hostname}: port {place.master_port} is in use, perhaps by another job; "
                "choose another (--port under Slurm, --master-port of torchrun)"
            ) from error
        if serves:
            raise MeshError(f"rank 0 on {place.hostname} cannot serve at {_where(place)}: {problem}") from error
        raise MeshError(
            f"rank {place.rank} on {place.hostname} did not reach rank 0 at {_where(place)} within "
            f"{_seconds(timeout)}: {problem}; check that rank 0 started, that host and port are right (--host, --port) "
            "and reachable"
        ) from error


def _call(store: Store, place: Place, timeout: timedelta) -> str:
    """Rank 0: call all ranks under a new name, and wait for them."""
    name = uuid.uuid4().hex
    keys = [f"{name}/here/{rank}" for rank in range(place.world_size)]
    store.set(keys[0], name)
    store.set("round", name)
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        missing = _missing([rank for rank, key in enumerate(keys) if not store.check([key])], place, timeout)
        store.set(f"{name}/missing", missing)
        if not place.agent_store:
            time.sleep(_LAST_WORDS_SECONDS)
        raise MeshError(missing) from None
    store.set(f"{name}/all", json.dumps([store.get(key).decode() for key in keys]))
    return name


def _answer(store: Store, place: Place, timeout: timedelta) -> str:
    """Other ranks: answer the newest call until all have."""
    me, name = uuid.uuid4().hex, ""
    deadline, pause = time.monotonic() + timeout.total_seconds() + _LAST_WORDS_SECONDS, _FIRST_LOOK_SECONDS
    while time.monotonic() < deadline:
        if store.check(["round"]) and (called := store.get("round").decode()) != name:
            name = called
            _check_alone(store.add(f"{name}/starts/{place.rank}", 1), place)
            store.set(f"{name}/here/{place.rank}", me)
        if name and store.check([f"{name}/all"]) and me in json.loads(store.get(f"{name}/all")):
            return name
        if name and store.check([f"{name}/missing"]):
            raise MeshError(store.get(f"{name}/missing").decode())
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_LOOK_SECONDS)
    raise MeshError(
        f"rank {place.rank} on {place.hostname} was not called by rank 0 at {_where(place)} within "
        f"{_seconds(timeout)}; check that rank 0 was started, and for a world of {place.world_size} ranks as this one; "
        "its log says more"
    )


def _check_alone(starts: int, place: Place) -> None:
    # An agent's store may be asked by a process that is being ended, and by the one that takes its place.
    if starts > 1 and not place.agent_store:
        raise MeshError(
            f"rank {place.rank} was started {starts} times, now on {place.hostname}: every process needs a rank of its "
            "own; is another job using the same address and port?"
        )


def _missing(absent: list[int], place: Place, timeout: timedelta) -> str:
    named = ", ".join(map(str, absent[:8])) + (", ..." if absent[8:] else "")
    return (
        f"{place.world_size - len(absent)} of {place.world_size} ranks came to {_where(place)} within "
        f"{_seconds(timeout)}; missing: {named}; check that they were started and did not fail before this"
    )


def _where(place: Place) -> str:
    return f"{place.master_host}:{place.master_port}"


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"


def first_line(error: Exception) -> str:
    """What torch's errors say, without the frames of C++ below it."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
