"""Ranks find each other through a key-value store, before there is any process group.

    rank 0   round = NAME              waits for NAME/here/<rank> of all        NAME/all = who they are
    others   round? -> NAME/here/<rank> = who I am           NAME/all? am I in it?

Who they are: an id, the host, and a digest of what each says of the job. Where the digests differ, rank 0 asks one that
differs for its words, and all end with what it finds in them:

    rank 0   NAME/ask/<rank>           NAME/problem = why they do not meet; also where some are missing
    <rank>   NAME/tell/<rank> = what it says

Meeting through our own keys tells "rank 3 never came" from every other failure. The name is new for every start: the
store of torchrun's agent outlives the processes and still holds what dead ones said, and its agents do not count
restarts alike (one whose ranks were healthy, or that joined later, has seen fewer), so their count cannot tell starts
apart.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from internlm_lite.errors import MeshError, first_line
from internlm_lite.runtime.place import Place

_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.02, 0.5
_LAST_WORDS_SECONDS = 2.0
"""Rank 0, which serves the store, says what is wrong before it goes; others wait so much longer for that."""
_NAMED_KEYS = 4


def meet(place: Place, timeout: timedelta, says: Mapping[str, str]) -> Store:
    """The job's key-value store, once every rank has come to it and says the same of the job: key -> value, no secrets.

    A world of one has its own. Raises MeshError.
    Ctrl-C ends it at once: Python would not hear it inside of torch, which is why a thread meets.
    """
    if place.world_size == 1:
        return HashStore()
    worker = ThreadPoolExecutor(1, thread_name_prefix="meeting")
    try:
        return worker.submit(_meet, place, timeout, says).result()
    finally:
        worker.shutdown(wait=False)


def _meet(place: Place, timeout: timedelta, says: Mapping[str, str]) -> Store:
    serves = place.is_main and not place.agent_store
    # Ranks that were told of worlds of other sizes do not count for this one.
    store = PrefixStore(f"world{place.world_size}", _connect(place, timeout, serves))
    try:
        name = _call(store, place, timeout, says) if place.is_main else _answer(store, place, timeout, says)
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


def _call(store: Store, place: Place, timeout: timedelta, says: Mapping[str, str]) -> str:
    """Rank 0: call all ranks under a new name, wait for them, and compare what they say."""
    name = uuid.uuid4().hex
    keys = [f"{name}/here/{rank}" for rank in range(place.world_size)]
    store.set(keys[0], _introduction(name, place, says))
    store.set("round", name)
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        problem = _missing([rank for rank, key in enumerate(keys) if not store.check([key])], place, timeout)
    else:
        came = [json.loads(store.get(key)) for key in keys]
        problem = _difference(came, PrefixStore(name, store), says)
    if problem:
        store.set(f"{name}/problem", problem)
        if not place.agent_store:
            time.sleep(_LAST_WORDS_SECONDS)
        raise MeshError(problem)
    store.set(f"{name}/all", json.dumps([one["id"] for one in came]))
    return name


def _answer(store: Store, place: Place, timeout: timedelta, says: Mapping[str, str]) -> str:
    """Other ranks: answer the newest call until all have."""
    me, name = uuid.uuid4().hex, ""
    deadline, pause = time.monotonic() + timeout.total_seconds() + _LAST_WORDS_SECONDS, _FIRST_LOOK_SECONDS
    while time.monotonic() < deadline:
        if store.check(["round"]) and (called := store.get("round").decode()) != name:
            name = called
            _check_alone(store.add(f"{name}/starts/{place.rank}", 1), place)
            store.set(f"{name}/here/{place.rank}", _introduction(me, place, says))
        if name and store.check([f"{name}/all"]) and me in json.loads(store.get(f"{name}/all")):
            return name
        if name and store.check([f"{name}/ask/{place.rank}"]):
            store.set(f"{name}/tell/{place.rank}", json.dumps(dict(says)))
        if name and store.check([f"{name}/problem"]):
            raise MeshError(store.get(f"{name}/problem").decode())
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


def _introduction(own: str, place: Place, says: Mapping[str, str]) -> str:
    digest = sha256(json.dumps(dict(says), sort_keys=True).encode()).hexdigest()
    return json.dumps({"id": own, "host": place.hostname, "digest": digest})


def _difference(came: Sequence[Mapping[str, str]], store: Store, says: Mapping[str, str]) -> str:
    """What the first rank that differs from rank 0 says; empty where all say the same. `store`: of this name."""
    others = [rank for rank, one in enumerate(came) if one["digest"] != came[0]["digest"]]
    if not others:
        return ""
    first = others[0]
    store.set(f"ask/{first}", "")
    found: list[str] = []
    with suppress(RuntimeError):  # it may have been ended since it came
        store.wait([f"tell/{first}"], timedelta(seconds=_LAST_WORDS_SECONDS))
        found = _differing(json.loads(store.get(f"tell/{first}")), says)
    return (
        f"rank {first} on {came[first]['host']} was not started like rank 0 on {came[0]['host']}: "
        f"{_some(found, _NAMED_KEYS) or 'it ended before it said which'}; ranks that differ from rank 0: "
        f"{_some(others, 8)}; start all ranks with the same command line, files and version; if this is another job, "
        "give one of them another port"
    )


def _differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    return [
        f"{key} is {theirs.get(key, 'not set')}, expected {ours.get(key, 'not set')}"
        for key in {**ours, **theirs}
        if theirs.get(key) != ours.get(key)
    ]


def _missing(absent: list[int], place: Place, timeout: timedelta) -> str:
    return (
        f"{place.world_size - len(absent)} of {place.world_size} ranks came to {_where(place)} within "
        f"{_seconds(timeout)}; missing: {_some(absent, 8)}; check that they were started and did not fail before this"
    )


def _some(items: Sequence[object], most: int) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if items[most:] else "")


def _where(place: Place) -> str:
    return f"{place.master_host}:{place.master_port}"


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"
