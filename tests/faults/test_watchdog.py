"""The diagnosis of a hanging job, its end, and failure records; with real processes and a real store."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore, pipelining

from internlm_lite.faults import failure as failures
from internlm_lite.faults.failure import Failure, clear_failures, read_failures, record, summary
from internlm_lite.faults.heartbeats import Heartbeat, Limits, Verdict, diagnose
from internlm_lite.faults.waiting import waits_for_others
from internlm_lite.faults.watchdog import Watchdog, write_stacks
from internlm_lite.mesh import comm
from internlm_lite.runtime.start import leave_now
from tests.ports import free_port
from tests.world import fork_context

LIMITS = Limits(2.0, {"building": math.inf})
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def _table(*beats: tuple[int, str], waiting: tuple[int, ...] = ()) -> dict[int, Heartbeat]:
    return {
        rank: Heartbeat(progress, phase, 7, 1, f"node{rank}", rank in waiting)
        for rank, (progress, phase) in enumerate(beats)
    }


def test_progress_within_the_limit() -> None:
    assert diagnose(_table((5, "training"), (5, "training")), {0: (1.9, 0), 1: (0, 0)}, LIMITS, 0.5) is None


def test_verdict_names_rank_behind_and_phase() -> None:
    table = _table((9, "training"), (8, "data"), (9, "training"))
    found = diagnose(table, dict.fromkeys(range(3), (3.0, 0.1)), LIMITS, 0.5)
    assert found is not None and (found.ranks, found.hosts) == ((1,), ("node1",))
    assert found.why == (
        "rank 1 made no progress for 3 s, in phase 'data' of step 7 (the others wait for it); "
        "if it is only slow, raise --timeout"
    )


def test_silent_rank_precedes_rank_behind() -> None:
    found = diagnose(_table((8, "data"), (9, "training")), {0: (3.0, 0.1), 1: (3.0, 3.0)}, LIMITS, 0.5)
    assert found is not None and found.ranks == (1,) and "no sign of life" in found.why


def test_phase_without_limit() -> None:
    assert diagnose(_table((3, "building"), (4, "training")), {0: (99, 0), 1: (99, 0)}, LIMITS, 0.5) is None


def test_silent_rank_in_phase_without_limit() -> None:
    found = diagnose(_table((3, "building"), (4, "training")), {0: (2.6, 2.6), 1: (2.1, 0)}, LIMITS, 0.5)
    assert found is not None and found.ranks == (0,) and "no sign of life" in found.why


def test_verdict_without_culprit() -> None:
    found = diagnose(_table((4, "training"), (4, "training")), {0: (3, 0), 1: (3, 0)}, LIMITS, 0.5)
    assert found is not None and found.ranks == () and "all 2 ranks made no progress" in found.why
    assert found.why.endswith("their stacks say where; if it is only slow, raise --timeout")


@pytest.mark.parametrize(
    ("progress", "waiting", "seconds", "culprit"),
    [
        ((4, 4, 4), (0, 2), (3, 3, 3), (1,)),  # all in one phase: who does not wait for the others
        ((5, 4, 4), (0, 2), (3, 3, 3), (1,)),  # of those behind, too
        ((4, 5, 4), (0, 2), (3, 3, 3), (1,)),  # ahead: its sends have been done, those behind still miss others
        ((4, 5, 6), (0,), (3, 3, 3), (1,)),
        ((4, 4, 4), (0, 2), (3, 1.9, 3), None),  # it began later, and may have its time
        ((4, 4, 5), (0, 1, 2), (3, 3, 3), (0, 1)),
    ],
)
def test_verdict_names_rank_that_does_not_wait(
    progress: tuple[int, ...], waiting: tuple[int, ...], seconds: tuple[float, ...], culprit: tuple[int, ...] | None
) -> None:
    table = _table(*((each, "training") for each in progress), waiting=waiting)
    found = diagnose(table, {rank: (idle, 0.1) for rank, idle in enumerate(seconds)}, LIMITS, 0.5)
    assert (found and found.ranks) == culprit


def test_verdict_names_last_running_rank() -> None:
    found = diagnose({1: Heartbeat(4, "ending", None, 1)}, {1: (3.0, 0.1)}, LIMITS, 0.5)
    assert found is not None and found.ranks == (1,)


def test_json_round_trip() -> None:
    beat = Heartbeat(5, "training", 7, 3, "node1", waits=True)
    assert Heartbeat.from_json(beat.to_json().encode()) == beat
    verdict = Verdict((1, 3), "why", "training", 7, ("node1", "node3"))
    assert Verdict.from_json(verdict.to_json().encode()) == verdict


@pytest.mark.parametrize(
    ("inner", "outer", "waits"),
    [
        (comm.__file__, __file__, True),
        (pipelining.schedules.__file__, __file__, True),
        (torch.cuda.streams.__file__, __file__, True),
        (__file__, pipelining.schedules.__file__, False),  # a layer that hangs within a schedule
        (torch.nn.functional.__file__, comm.__file__, False),
    ],
)
def test_waits_for_others_reads_innermost_frame(inner: str, outer: str, waits: bool) -> None:
    """Blocked in C, as by a collective."""
    lock = threading.Lock()
    block = compile("lock.acquire()", inner, "exec")
    call = compile("exec(block, {'lock': lock})", outer, "exec")
    with lock:
        thread = threading.Thread(target=exec, args=(call, {"block": block, "lock": lock}))
        thread.start()
        deadline = time.monotonic() + 30
        while sys._current_frames()[thread.ident or 0].f_code is not block:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert waits_for_others(thread) == waits
    thread.join()
    assert not waits_for_others(thread), "it has ended"


def _rank(rank: int, size: int, port: int, folder: str, trouble: str) -> None:
    def end(verdict: Verdict) -> None:
        write_stacks(Path(folder, f"stacks-{rank}"))
        Path(folder, f"verdict-{rank}.tmp").write_text(verdict.to_json())
        os.rename(Path(folder, f"verdict-{rank}.tmp"), Path(folder, f"verdict-{rank}"))
        time.sleep(1 if rank == 0 else 0)  # its store is the others' way to the verdict
        os._exit(4)

    timeout = timedelta(seconds=20)
    served = TCPStore("127.0.0.1", port, size, rank == 0, timeout, False) if rank == 0 else None
    store = TCPStore("127.0.0.1", port, size, False, timeout, False)
    if trouble == f"kernel {rank}":
        torch.zeros(1, device="cuda")  # the driver starts before anybody watches
    store.add("here", 1)
    while store.add("here", 0) < size:  # nobody is watched before all are there
        time.sleep(0.02)
    with Watchdog(rank, size, store, LIMITS, end) as watchdog:
        for step in range(2000):
            watchdog.enter("data", step)
            if step == 20 and trouble == f"hang {rank}":
                time.sleep(60)
            if step == 20 and trouble == f"kernel {rank}":
                torch.cuda._sleep(3 * 10**10)  # about 15 seconds
                torch.cuda.synchronize()
            if step == 20 and trouble == f"stop {rank}":
                os.kill(os.getpid(), signal.SIGSTOP)
            watchdog.enter("training", step)
            store.add(f"step {step}", 1)  # stands for a collective: nobody goes on alone
            while store.add(f"step {step}", 0) < size:
                time.sleep(0.02)
            time.sleep(0.05)
            if step == 60 and trouble == "none":
                break
    del served
    os._exit(0)


def _start(folder: Path, trouble: str, size: int = 3) -> list:
    port = free_port()
    ranks = [
        fork_context.Process(target=_rank, args=(rank, size, port, str(folder), trouble), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _end(ranks: list) -> None:
    for rank in ranks:
        rank.kill()
        rank.join()


def test_job_without_hang(tmp_path: Path) -> None:
    ranks = _start(tmp_path, "none")
    try:
        for rank in ranks:
            rank.join(30)
        assert [rank.exitcode for rank in ranks] == [0, 0, 0]
        assert not list(tmp_path.iterdir())
    finally:
        _end(ranks)


@pytest.mark.parametrize(
    ("trouble", "culprit"), [("hang", 0), ("hang", 1), ("hang", 2), pytest.param("kernel", 1, marks=on_a_gpu)]
)
def test_hanging_rank_ends_job(tmp_path: Path, trouble: str, culprit: int) -> None:
    ranks = _start(tmp_path, f"{trouble} {culprit}")
    try:
        for rank in ranks:
            rank.join(30)
        assert [rank.exitcode for rank in ranks] == [4, 4, 4]
        for rank in range(3):
            verdict = Verdict.from_json((tmp_path / f"verdict-{rank}").read_bytes())
            assert verdict.ranks == (culprit,) and (verdict.phase, verdict.step) == ("data", 20)
            assert "test_watchdog.py" in (tmp_path / f"stacks-{rank}").read_text()
    finally:
        _end(ranks)


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_stopped_rank_ends_job(tmp_path: Path, culprit: int) -> None:
    ranks = _start(tmp_path, f"stop {culprit}")
    try:
        others = [rank for number, rank in enumerate(ranks) if number != culprit]
        for rank in others:
            rank.join(30)
        assert [rank.exitcode for rank in others] == [4, 4]
        for number in range(3):
            if number != culprit:
                verdict = Verdict.from_json((tmp_path / f"verdict-{number}").read_bytes())
                assert verdict.ranks == (culprit,)
    finally:
        _end(ranks)


class _Told:
    """A store in which ranks 0 to 2 beat."""

    def __init__(self) -> None:
        self.beats = {rank: Heartbeat(9, "training", 7, 1, f"node{rank}") for rank in range(3)}

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        return self.beats[int(key.removeprefix("beat/"))].to_json().encode()

    def check(self, keys: list[str]) -> bool:
        return True


@pytest.mark.parametrize("rank", [1, 2])
def test_unreachable_store(rank: int) -> None:
    store = _Told()
    watchdog = Watchdog(rank, 3, store, LIMITS, lambda verdict: None)
    watchdog.enter("training", 7)
    if rank == 1:
        watchdog._read_heartbeats(store)
    assert watchdog.silent() == []
    watchdog._contact -= 1.8
    watchdog._seen = {each: replace(seen, beaten=seen.beaten - 5) for each, seen in watchdog._seen.items()}
    assert watchdog.silent() == [0]
    now = time.monotonic()
    assert watchdog._diagnose(now) is None, "it knows nothing of the others"
    watchdog._contact -= 2
    found = watchdog._diagnose(now)
    assert found is not None and found.ranks == (0,) and "rank 0, which holds the store" in found.why


def test_unreachable_store_of_agent() -> None:
    watchdog = Watchdog(2, 3, _Told(), LIMITS, lambda verdict: None, agent_store=True)
    watchdog._contact -= 3
    found = watchdog._diagnose(time.monotonic())
    assert found is not None and found.why.startswith("torchrun's agent on the host of rank 0, which holds the store")


def test_host_of() -> None:
    store = _Told()
    hosts = []
    for rank in (1, 2):
        watchdog = Watchdog(rank, 3, store, LIMITS, lambda verdict: None, "here")
        watchdog._stop.set()
        store.check = lambda keys: keys not in (["verdict"], ["beat/1"])  # type: ignore[method-assign]
        watchdog._send_heartbeats(store)
        hosts.append([watchdog.host_of(each) for each in range(3)])
    assert hosts == [["node0", "here", "node2"], ["node0", "an unknown host", "here"]]


def test_seen_heartbeats_are_replaced_not_changed() -> None:
    store = _Told()
    watchdog = Watchdog(0, 3, store, LIMITS, lambda verdict: None)
    watchdog._read_heartbeats(store)
    before, first = watchdog._seen, watchdog._seen[1].beaten
    store.beats[2] = Heartbeat(10, "ended", 7, 2)
    watchdog._read_heartbeats(store)
    watchdog._add_time(3.0)
    assert sorted(before) == [0, 1, 2] and before[1].beaten == first
    assert sorted(watchdog._seen) == [0, 1] and watchdog._seen[1].beaten == first + 3.0


def test_without_store() -> None:
    before = threading.enumerate()
    with Watchdog(0, 1, None, LIMITS, lambda verdict: None) as watchdog:
        assert threading.enumerate() == before and watchdog.silent() == []


def test_part_of_phase_is_progress() -> None:
    watchdog = Watchdog(0, 1, None, LIMITS, lambda verdict: None)
    watchdog.enter("evaluation", 7)
    before = watchdog.here
    watchdog.report_progress()
    assert watchdog.here == replace(before, progress=before.progress + 1)


def test_judge_names_silent_rank() -> None:
    store = _Told()
    watchdog = Watchdog(1, 3, store, LIMITS, lambda verdict: None)
    watchdog._read_heartbeats(store)
    watchdog._seen = {**watchdog._seen, 2: replace(watchdog._seen[2], progressed=0.0, beaten=0.0)}
    assert watchdog.silent() == [2]
    found = watchdog._diagnose(time.monotonic())
    assert found is not None and found.ranks == (2,)


def test_ended_rank_is_ignored() -> None:
    store = _Told()
    watchdog = Watchdog(0, 3, store, LIMITS, lambda verdict: None)
    watchdog._read_heartbeats(store)
    store.beats[2] = Heartbeat(10, "ended", 7, 2)
    watchdog._read_heartbeats(store)
    assert sorted(watchdog._seen) == [0, 1]


def test_rank_without_heartbeat() -> None:
    store = _Told()
    store.check = lambda keys: keys != ["beat/2"]  # type: ignore[method-assign]
    watchdog = Watchdog(0, 3, store, Limits(2.0, {}), lambda verdict: None)
    watchdog._read_heartbeats(store)
    long_ago = time.monotonic() - 3
    watchdog._seen = {rank: replace(seen, progressed=long_ago) for rank, seen in watchdog._seen.items()}
    found = watchdog._diagnose(time.monotonic())
    assert found is not None and (found.ranks, found.phase, found.hosts) == ((2,), "starting", ("an unknown host",))


def _blocked(code: int) -> None:
    leave_now(code, lambda: time.sleep(60), 0.3)


def test_leave_now_has_a_time_limit() -> None:
    process = fork_context.Process(target=_blocked, args=(4,), daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode == 4


def _failure(rank: int, follows: bool, time: float) -> Failure:
    return Failure(rank, f"node{rank}", 12, "training", "RuntimeError", f"m{rank}", 1, follows, "trace", time)


def test_cause_is_first_despite_clocks(tmp_path: Path) -> None:
    for failure in (_failure(2, True, 1.0), _failure(0, True, 2.0), _failure(3, False, 5.0)):
        record(tmp_path, failure)
    assert [failure.rank for failure in read_failures(tmp_path)] == [3, 2, 0]
    text = summary(read_failures(tmp_path))
    assert text.startswith("rank 3 on node3 failed first (code 1), at step 12, training: RuntimeError: m3\n")
    assert text.endswith("others failed because of it, or after it: 2, 0")


def test_first_record_is_kept_until_restart(tmp_path: Path) -> None:
    record(tmp_path, _failure(1, False, 1.0))
    record(tmp_path, _failure(1, True, 2.0))
    assert [failure.follows for failure in read_failures(tmp_path)] == [False]
    assert not list(tmp_path.glob("**/*.tmp"))
    clear_failures(tmp_path)
    assert not list(tmp_path.iterdir())
    clear_failures(tmp_path)


def test_own_record_replaces_inferred(tmp_path: Path) -> None:
    for rank in (1, 2):
        record(tmp_path, replace(_failure(rank, False, float(rank)), kind="lost", guessed=True))
    record(tmp_path, replace(_failure(2, False, 9.0), kind="hang", guessed=True))
    assert [(each.rank, each.kind) for each in read_failures(tmp_path)] == [(1, "lost"), (2, "lost")]
    record(tmp_path, _failure(1, True, 3.0))
    report = json.loads((tmp_path / "FAILED.json").read_text())
    assert report["cause"]["rank"] == 2 and [other["rank"] for other in report["others"]] == [1]
    record(tmp_path, _failure(0, False, 4.0))
    record(tmp_path, replace(_failure(0, False, 5.0), guessed=True))
    found = [(each.rank, each.guessed) for each in read_failures(tmp_path)]
    assert found == [(0, False), (2, True), (1, False)], "what is known comes before what is guessed"


def test_first_record_is_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    record(tmp_path, _failure(1, False, 1.0))
    record(tmp_path, _failure(1, True, 2.0))
    assert [failure.follows for failure in read_failures(tmp_path)] == [False]
    assert not list(tmp_path.glob("**/*.tmp"))


def test_report_includes_concurrent_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = failures.read_failures

    def overtaken(folder: Path) -> list[Failure]:
        found = read(folder)
        monkeypatch.setattr(failures, "read_failures", read)
        record(folder, _failure(0, True, 2.0))
        return found

    monkeypatch.setattr(failures, "read_failures", overtaken)
    record(tmp_path, _failure(1, False, 1.0))
    report = json.loads((tmp_path / "FAILED.json").read_text())
    assert report["cause"]["rank"] == 1 and [other["rank"] for other in report["others"]] == [0]


def test_concurrently_cleared_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = failures.read_failures

    def cleared(folder: Path) -> list[Failure]:
        found = read(folder)
        clear_failures(folder)
        return found

    monkeypatch.setattr(failures, "read_failures", cleared)
    record(tmp_path, _failure(1, False, 1.0))
    assert not list(tmp_path.iterdir())


def test_damaged_record_is_skipped(tmp_path: Path) -> None:
    record(tmp_path, _failure(1, False, 1.0))
    (tmp_path / "failed" / "rank-00002.json").write_text("{")
    assert [failure.rank for failure in read_failures(tmp_path)] == [1]
