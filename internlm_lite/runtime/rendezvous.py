"""The rendezvous: all ranks of a job meet through a key-value store, before there is any process group.

    rank 0   round = NAME                  waits for NAME/here/<rank> of all     NAME/all = ids of all
    others   wait for round, then          NAME/here/<rank> = introduction       wait until NAME/all has the own id

An introduction is an id, the host, and a digest of the job fingerprint. If digests differ, rank 0 requests the
fingerprint of the first rank that differs, and all ranks raise the difference (or the list of missing ranks):

    rank 0   NAME/request/<rank>           NAME/problem = the message
    <rank>   NAME/fingerprint/<rank> = its fingerprint

Keys of our own distinguish missing ranks from other failures. NAME is new for every start: the store of
torchrun's agent still holds what earlier processes wrote, and the agents' restart counts may differ (an agent whose
ranks were healthy, or that joined later, has counted fewer), so they cannot identify a start.
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
from internlm_lite.runtime.dist_env import DistEnv

_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.02, 0.5
_LAST_WORDS_SECONDS = 2.0
"""Time that rank 0 keeps serving the store after a problem, and that other ranks wait longer to read it."""
_NAMED_KEYS = 4


def rendezvous(dist_env: DistEnv, timeout: timedelta, fingerprint: Mapping[str, str]) -> Store:
    """The job's key-value store, once all ranks have connected with equal fingerprints (key -> value, no secrets).

    A world of one gets a store of its own. Raises MeshError.
    It works in a thread, so that Ctrl-C ends it at once: Python does not handle signals inside torch.
    """
    if dist_env.world_size == 1:
        return HashStore()
    worker = ThreadPoolExecutor(1, thread_name_prefix="rendezvous")
    try:
        return worker.submit(_rendezvous_in_thread, dist_env, timeout, fingerprint).result()
    finally:
        worker.shutdown(wait=False)


def _rendezvous_in_thread(dist_env: DistEnv, timeout: timedelta, fingerprint: Mapping[str, str]) -> Store:
    serves = dist_env.is_main and not dist_env.agent_store
    # Ranks that were started for another world size must not join.
    store = PrefixStore(f"world{dist_env.world_size}", _connect(dist_env, timeout, serves=serves))
    try:
        name = (
            _host_round(store, dist_env, timeout, fingerprint)
            if dist_env.is_main
            else _join_round(store, dist_env, timeout, fingerprint)
        )
    except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
        raise MeshError(
            f"rank {dist_env.rank} on {dist_env.hostname} lost rank 0 at {_where(dist_env)} while waiting for the "
            f"others; see its log ({first_line(error)})"
        ) from error
    return PrefixStore(name, store)


def _connect(dist_env: DistEnv, timeout: timedelta, *, serves: bool) -> Store:
    try:
        return TCPStore(
            dist_env.master_host,
            dist_env.master_port,
            dist_env.world_size,
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        problem = first_line(error)
        if serves and ("EADDRINUSE" in str(error) or "in use" in str(error)):
            raise MeshError(
                f"rank 0 on {dist_env.hostname}: port {dist_env.master_port} is in use, perhaps by another job; "
                "choose another (--port under Slurm and mpirun, --master-port of torchrun)"
            ) from error
        if serves:
            raise MeshError(f"rank 0 on {dist_env.hostname} cannot serve at {_where(dist_env)}: {problem}") from error
        raise MeshError(
            f"rank {dist_env.rank} on {dist_env.hostname} did not reach rank 0 at {_where(dist_env)} within "
            f"{_seconds(timeout)}: {problem}; check that rank 0 started, that host and port are right (--host, --port) "
            "and reachable"
        ) from error


def _host_round(store: Store, dist_env: DistEnv, timeout: timedelta, fingerprint: Mapping[str, str]) -> str:
    """Rank 0: open a round under a new name, wait for all ranks, and compare their fingerprints."""
    name = uuid.uuid4().hex
    keys = [f"{name}/here/{rank}" for rank in range(dist_env.world_size)]
    store.set(keys[0], _introduction(name, dist_env, fingerprint))
    store.set("round", name)
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        problem = _missing([rank for rank, key in enumerate(keys) if not store.check([key])], dist_env, timeout)
    else:
        introductions = [json.loads(one) for one in store.multi_get(keys)]
        problem = _difference(introductions, PrefixStore(name, store), fingerprint)
    if problem:
        store.set(f"{name}/problem", problem)
        if not dist_env.agent_store:
            time.sleep(_LAST_WORDS_SECONDS)
        raise MeshError(problem)
    store.set(f"{name}/all", json.dumps([one["id"] for one in introductions]))
    return name


def _join_round(store: Store, dist_env: DistEnv, timeout: timedelta, fingerprint: Mapping[str, str]) -> str:
    """Other ranks: join the newest round until it is complete."""
    me, name = uuid.uuid4().hex, ""
    deadline, pause = time.monotonic() + timeout.total_seconds() + _LAST_WORDS_SECONDS, _FIRST_LOOK_SECONDS
    while time.monotonic() < deadline:
        if store.check(["round"]) and (called := store.get("round").decode()) != name:
            name = called
            _check_unique(store.add(f"{name}/starts/{dist_env.rank}", 1), dist_env)
            store.set(f"{name}/here/{dist_env.rank}", _introduction(me, dist_env, fingerprint))
        if name and store.check([f"{name}/all"]) and me in json.loads(store.get(f"{name}/all")):
            return name
        if name and store.check([f"{name}/request/{dist_env.rank}"]):
            store.set(f"{name}/fingerprint/{dist_env.rank}", json.dumps(dict(fingerprint)))
        if name and store.check([f"{name}/problem"]):
            raise MeshError(store.get(f"{name}/problem").decode())
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_LOOK_SECONDS)
    raise MeshError(
        f"rank {dist_env.rank} on {dist_env.hostname} was not called by rank 0 at {_where(dist_env)} within "
        f"{_seconds(timeout)}; check that rank 0 was started, for a world of {dist_env.world_size} ranks as this one; "
        "its log says more"
    )


def _check_unique(starts: int, dist_env: DistEnv) -> None:
    # An agent's store may be used by a process that is ending and by its replacement.
    if starts > 1 and not dist_env.agent_store:
        raise MeshError(
            f"rank {dist_env.rank} was started {starts} times, now on {dist_env.hostname}: every process needs a rank "
            "of its own; is another job using the same address and port?"
        )


def _introduction(own: str, dist_env: DistEnv, fingerprint: Mapping[str, str]) -> str:
    digest = sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()
    return json.dumps({"id": own, "host": dist_env.hostname, "digest": digest})


def _difference(introductions: Sequence[Mapping[str, str]], store: Store, fingerprint: Mapping[str, str]) -> str:
    """How the first rank that differs from rank 0 differs; empty if all are equal. `store`: of this round."""
    others = [rank for rank, one in enumerate(introductions) if one["digest"] != introductions[0]["digest"]]
    if not others:
        return ""
    first = others[0]
    store.set(f"request/{first}", "")
    found: list[str] = []
    with suppress(RuntimeError):  # the rank may have ended since it connected
        store.wait([f"fingerprint/{first}"], timedelta(seconds=_LAST_WORDS_SECONDS))
        found = _differing(json.loads(store.get(f"fingerprint/{first}")), fingerprint)
    return (
        f"rank {first} on {introductions[first]['host']} was not started like rank 0 on {introductions[0]['host']}: "
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


def _missing(absent: list[int], dist_env: DistEnv, timeout: timedelta) -> str:
    return (
        f"{dist_env.world_size - len(absent)} of {dist_env.world_size} ranks came to {_where(dist_env)} within "
        f"{_seconds(timeout)}; missing: {_some(absent, 8)}; check that they were started and did not fail before this"
    )


def _some(items: Sequence[object], most: int) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if items[most:] else "")


def _where(dist_env: DistEnv) -> str:
    return f"{dist_env.master_host}:{dist_env.master_port}"


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"
