"""A job that stands still is found out: who keeps it, where, and what ends. Real processes, a real store."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from internlm_lite.faults import failure as failures
from internlm_lite.faults.beats import Beat, Limits, Verdict, judge
from internlm_lite.faults.failure import Failure, clear_failures, read_failures, record, summary
from internlm_lite.faults.watchdog import Watchdog, write_stacks
from internlm_lite.runtime.start import leave_now
from tests.ports import free_port
from tests.world import fork_context

LIMITS = Limits(2.0, {"building": math.inf})


def _table(*beats: tuple[int, str]) -> dict[int, Beat]:
    return {rank: Beat(progress, phase, 7, 1) for rank, (progress, phase) in enumerate(beats)}


def test_progress_within_the_limit_is_no_hang() -> None:
    assert judge(_table((5, "training"), (5, "training")), {0: (1.9, 0), 1: (0, 0)}, LIMITS, 0.5) is None


def test_the_rank_behind_is_named_and_where_it_is() -> None:
    table = _table((9, "training"), (8, "data"), (9, "training"))
    found = judge(table, dict.fromkeys(range(3), (3.0, 0.1)), LIMITS, 0.5)
    assert found is not None and found.ranks == (1,)
    assert found.why == "rank 1 made no progress for 3 s, in phase 'data' of step 7 (the others wait for it)"


def test_a_silent_rank_is_named_before_one_that_is_behind() -> None:
    found = judge(_table((8, "data"), (9, "training")), {0: (3.0, 0.1), 1: (3.0, 3.0)}, LIMITS, 0.5)
    assert found is not None and found.ranks == (1,) and "no sign of life" in found.why


def test_one_that_may_take_its_time_is_waited_for() -> None:
    assert judge(_table((3, "building"), (4, "training")), {0: (99, 0), 1: (99, 0)}, LIMITS, 0.5) is None


def test_silence_is_excused_by_no_phase() -> None:
    found = judge(_table((3, "building"), (4, "training")), {0: (2.6, 2.6), 1: (2.1, 0)}, LIMITS, 0.5)
    assert found is not None and found.ranks == (0,) and "no sign of life" in found.why


def test_nobody_stands_out() -> None:
    found = judge(_table((4, "training"), (4, "training")), {0: (3, 0), 1: (3, 0)}, LIMITS, 0.5)
    assert found is not None and found.ranks == () and "all 2 ranks made no progress" in found.why


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
    with Watchdog(rank, size, store, LIMITS, end) as watchdog:
        for step in range(2000):
            watchdog.enter("data", step)
            if step == 20 and trouble == f"hang {rank}":
                time.sleep(60)
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


def test_a_sound_job_ends_unharmed(tmp_path: Path) -> None:
    ranks = _start(tmp_path, "none")
    try:
        for rank in ranks:
            rank.join(30)
        assert [rank.exitcode for rank in ranks] == [0, 0, 0]
        assert not list(tmp_path.iterdir())
    finally:
        _end(ranks)


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_a_hanging_rank_ends_the_job_and_is_named_by_all(tmp_path: Path, guilty: int) -> None:
    ranks = _start(tmp_path, f"hang {guilty}")
    try:
        for rank in ranks:
            rank.join(30)
        assert [rank.exitcode for rank in ranks] == [4, 4, 4]
        for rank in range(3):
            verdict = Verdict.from_json((tmp_path / f"verdict-{rank}").read_bytes())
            assert verdict.ranks == (guilty,) and (verdict.phase, verdict.step) == ("data", 20)
            assert "test_watchdog.py" in (tmp_path / f"stacks-{rank}").read_text()
    finally:
        _end(ranks)


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path, guilty: int) -> None:
    ranks = _start(tmp_path, "stop")
    try:
        time.sleep(2.5)
        pid = ranks[guilty].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        others = [rank for number, rank in enumerate(ranks) if number != guilty]
        for rank in others:
            rank.join(30)
        assert [rank.exitcode for rank in others] == [4, 4]
        for number in range(3):
            if number != guilty:
                verdict = Verdict.from_json((tmp_path / f"verdict-{number}").read_bytes())
                assert verdict.ranks == (guilty,)
    finally:
        _end(ranks)


class _Told:
    """A store in which ranks 0 to 2 beat."""

    def __init__(self) -> None:
        self.beats = {rank: Beat(9, "training", 7, 1) for rank in range(3)}

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        return self.beats[int(key.removeprefix("beat/"))].to_json().encode()

    def check(self, keys: list[str]) -> bool:
        return True


@pytest.mark.parametrize("rank", [1, 2])
def test_without_the_store_only_the_rank_that_held_it_is_known_to_be_silent(rank: int) -> None:
    store = _Told()
    watchdog = Watchdog(rank, 3, store, LIMITS, lambda verdict: None)
    watchdog.enter("training", 7)
    if rank == 1:
        watchdog._look(store)
    assert watchdog.silent() == []
    watchdog._heard -= 1.8
    watchdog._changed = {each: (told - 5, told - 5) for each, (told, _) in watchdog._changed.items()}
    assert watchdog.silent() == [0]
    now = time.monotonic()
    assert watchdog._judge(now, watchdog._mine, now) is None, "it knows nothing of the others"
    watchdog._heard -= 2
    found = watchdog._judge(now, watchdog._mine, now)
    assert found is not None and found.ranks == (0,) and "holds the store" in found.why


def test_a_judge_that_hears_the_store_names_who_is_silent() -> None:
    store = _Told()
    watchdog = Watchdog(1, 3, store, LIMITS, lambda verdict: None)
    watchdog._look(store)
    watchdog._changed[2] = (0.0, 0.0)
    assert watchdog.silent() == [2]
    found = watchdog._judge(time.monotonic(), watchdog._mine, 0.0)
    assert found is not None and found.ranks == (2,)


def test_a_rank_that_has_ended_is_not_missed() -> None:
    store = _Told()
    watchdog = Watchdog(0, 3, store, LIMITS, lambda verdict: None)
    watchdog._look(store)
    store.beats[2] = Beat(10, "ended", 7, 2)
    watchdog._look(store)
    assert sorted(watchdog._table) == sorted(watchdog._changed) == [0, 1]


def test_a_rank_that_never_beat_is_named() -> None:
    store = _Told()
    store.check = lambda keys: keys != ["beat/2"]  # type: ignore[method-assign]
    watchdog = Watchdog(0, 3, store, Limits(2.0, {}), lambda verdict: None)
    watchdog._look(store)
    long_ago = time.monotonic() - 3
    watchdog._changed = {rank: (long_ago, time.monotonic()) for rank in range(3)}
    found = watchdog._judge(time.monotonic(), watchdog._mine, long_ago)
    assert found is not None and (found.ranks, found.phase) == ((2,), "starting")


def _blocked(code: int) -> None:
    leave_now(code, lambda: time.sleep(60), 0.3)


def test_last_words_that_block_do_not_keep_a_process_alive() -> None:
    process = fork_context.Process(target=_blocked, args=(4,), daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode == 4


def _failure(rank: int, follows: bool, time: float) -> Failure:
    return Failure(rank, f"node{rank}", 12, "training", "RuntimeError", f"m{rank}", 1, follows, "trace", time)


def test_the_cause_stands_first_whatever_the_clocks_say(tmp_path: Path) -> None:
    for failure in (_failure(2, True, 1.0), _failure(0, True, 2.0), _failure(3, False, 5.0)):
        record(tmp_path, failure)
    assert [failure.rank for failure in read_failures(tmp_path)] == [3, 2, 0]
    text = summary(read_failures(tmp_path))
    assert text.startswith("rank 3 on node3 failed first, at step 12, training: RuntimeError: m3\n")
    assert text.endswith("others failed because of it, or after it: 2, 0")


def test_the_first_word_of_a_rank_stays_and_a_restart_clears_it(tmp_path: Path) -> None:
    record(tmp_path, _failure(1, False, 1.0))
    record(tmp_path, _failure(1, True, 2.0))
    assert [failure.follows for failure in read_failures(tmp_path)] == [False]
    assert not list(tmp_path.glob("**/*.tmp"))
    clear_failures(tmp_path)
    assert not list(tmp_path.iterdir())
    clear_failures(tmp_path)


def test_a_file_system_without_links_keeps_the_first_word_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    record(tmp_path, _failure(1, False, 1.0))
    record(tmp_path, _failure(1, True, 2.0))
    assert [failure.follows for failure in read_failures(tmp_path)] == [False]
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_report_that_is_overtaken_by_another_record_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_damaged_record_explains_nothing(tmp_path: Path) -> None:
    record(tmp_path, _failure(1, False, 1.0))
    (tmp_path / "failed" / "rank-00002.json").write_text("{")
    assert [failure.rank for failure in read_failures(tmp_path)] == [1]
