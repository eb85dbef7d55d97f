"""One run per save folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage import run_lock as lease_module
from internlm_lite.checkpoint.storage.base import RUN_LOCK_KEY as KEY
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.checkpoint.storage.run_lock import LEASE_SECONDS, Lease, _pid_namespace, acquire, holder
from internlm_lite.errors import StorageError
from internlm_lite.mesh.mesh import single_process_mesh


def lock(storage: LocalStorage, **facts: object) -> None:
    storage.put(KEY, [json.dumps({"owner": "x", "host": "elsewhere", "pid": 7, "beat": 0, **facts}).encode()])


@contextmanager
def beating(storage: LocalStorage, **facts: object) -> Iterator[None]:
    """A lock that is renewed all the time."""
    ended = threading.Event()

    def beat() -> None:
        for number in count(1):
            if ended.wait(0.05):
                return
            lock(storage, beat=number, **facts)

    lock(storage, **facts)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    first = Lease(storage, lease_seconds=30, renew_seconds=0.1)
    first.acquire()
    with pytest.raises(StorageError, match=rf"in use by host {socket.gethostname()}, pid {os.getpid()}: expected"):
        Lease(storage, lease_seconds=30).acquire()
    first.check()
    first.release()
    assert holder(storage) is None
    third = Lease(storage, 1, 0.1)
    third.acquire()
    third.release()


@pytest.fixture(scope="module")
def gone() -> int | None:
    """The pid of a process of this host that has ended."""
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    return process.pid


def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(
    tmp_path: Path, gone: int | None, clock: Clock
) -> None:
    storage = LocalStorage(tmp_path)
    lock(storage, host=socket.gethostname(), pid=gone, world=_pid_namespace())
    lease = Lease(storage)
    lease.acquire()
    lease.release()
    assert clock.now == 0


@pytest.mark.parametrize("world", ["this container", ""])
def test_a_pid_of_another_boot_or_namespace_means_nothing_here(
    tmp_path: Path, gone: int | None, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system without /proc, of which nobody knows whether it is the same."""
    monkeypatch.setattr(lease_module, "_pid_namespace", lambda: world)
    storage = LocalStorage(tmp_path)
    there = {"host": socket.gethostname(), "pid": gone, "world": world and "another container"}
    with beating(storage, **there), pytest.raises(StorageError, match="in use by host"):
        Lease(storage, lease_seconds=30).acquire()


def test_a_deleted_lock_is_restored_while_the_folder_is_there(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    lease = Lease(storage)
    lease.acquire()
    storage.put("commits/0000000001-00002.abcdef.json", [b"{}"])
    storage.delete(KEY)
    lease.check()
    assert holder(storage) is not None
    storage.delete(KEY)
    storage.delete_folder("commits")
    with pytest.raises(StorageError, match=r"this run's lock run\.lock is gone"):
        lease.check()  # as under the mount point of a file system that was unmounted
    lease.release()


def test_a_lock_of_another_host_is_watched_and_then_taken(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    lock(storage)
    lease = Lease(storage, lease_seconds=0.5)
    lease.acquire()
    lease.check()
    lease.release()


def test_a_sign_of_life_keeps_the_lock(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with beating(storage), pytest.raises(StorageError, match="in use by host elsewhere, pid 7"):
        Lease(storage, lease_seconds=30).acquire()


def test_a_run_that_lost_its_lease_commits_no_more(tmp_path: Path) -> None:
    from tests.checkpoint.pieces import pieces_of

    manager = CheckpointManager(str(tmp_path), single_process_mesh())
    manager.lock()
    manager.save(1, "snapshot", pieces_of(0, fill=True), {})
    lock(LocalStorage(tmp_path))
    with pytest.raises(StorageError, match="this run does not write there any more"):
        manager.save(2, "snapshot", pieces_of(0, fill=True), {})
    assert len(os.listdir(tmp_path / "commits")) == 1
    manager.release()
    assert holder(LocalStorage(tmp_path)) == {"owner": "x", "host": "elsewhere", "pid": 7, "beat": 0}, "not ours"


def odd(**facts: object) -> bytes:
    here = {"owner": "x", "host": socket.gethostname(), "pid": 7, "world": _pid_namespace(), "beat": 0}
    return json.dumps({**here, **facts}).encode()


ODD = [
    *(b"", b"not json", b"[1, 2]", b'{"pid": "text"}', b"\xff\x00", b"[" * 2000 + b"]" * 2000),
    *(odd(pid=2**70), odd(pid=-1), odd(pid=0), odd(pid=True, host=3), odd(host="\x1b[31m\n"), odd(owner=["x"])),
]


@pytest.mark.parametrize("text", ODD)
def test_an_odd_lock_is_told_watched_and_taken(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(KEY, [text])
    lease = Lease(storage)
    with caplog.at_level("INFO"):
        lease.acquire()
    assert "an odd run.lock" in caplog.text and "remove it if no run uses this folder" in caplog.text
    assert "\x1b" not in caplog.text and clock.now == LEASE_SECONDS
    lease.release()


@pytest.mark.parametrize("kind", ["long", "folder", "fifo", "link"])
def test_what_no_run_can_have_written_as_a_lock_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / KEY
    {
        "long": lambda: path.write_bytes(b" " * 5000),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path / "x"),
    }[kind]()
    with pytest.raises(StorageError, match=r"run\.lock.*an odd lock, .*remove it if no run uses this folder"):
        Lease(LocalStorage(tmp_path)).acquire()


class Clock:
    """Time that passes only while somebody sleeps, and what others do meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


def test_several_locks_are_watched_side_by_side(tmp_path: Path, clock: Clock) -> None:
    storages = [LocalStorage(tmp_path / name) for name in "ab"]
    for storage in storages:
        lock(storage)
    leases = [Lease(storage) for storage in storages]
    acquire(leases)
    assert clock.now == LEASE_SECONDS
    for lease in leases:
        lease.check()
        lease.release()


def test_all_leases_are_taken_or_none(tmp_path: Path, clock: Clock) -> None:
    dead, alive = (LocalStorage(tmp_path / name) for name in "ab")
    lock(dead)
    lock(alive)
    clock.meanwhile = lambda: lock(alive, beat=clock.now)
    with pytest.raises(StorageError, match="b is in use by host elsewhere"):
        acquire([Lease(dead), Lease(alive)])
    assert holder(dead) is None and holder(alive) is not None


def test_a_lock_that_is_another_one_by_now_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    lock(storage)

    def is_dead(_: object) -> bool:
        lock(storage, owner="a run that came first")
        return True

    monkeypatch.setattr(lease_module, "_is_dead", is_dead)
    with pytest.raises(StorageError, match="in use by host elsewhere"):
        Lease(storage).acquire()
    assert (holder(storage) or {})["owner"] == "a run that came first"


@pytest.mark.parametrize("is_dead", [False, True], ids=["of another host", "of a process that is gone"])
def test_of_two_runs_that_take_over_one_lock_one_wins(
    tmp_path: Path, clock: Clock, is_dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen the lock of a dead run; the first has written its own before the second replaces it."""
    monkeypatch.setattr(lease_module, "_is_dead", lambda found: is_dead)
    lock(LocalStorage(tmp_path))

    class Overtaken(LocalStorage):
        def replace(self, key: str, old: bytes, new: bytes) -> bool:
            first.acquire()
            return super().replace(key, old, new)

    first, second = Lease(LocalStorage(tmp_path)), Lease(Overtaken(tmp_path))
    with pytest.raises(StorageError, match=f"in use by host {socket.gethostname()}, pid {os.getpid()}"):
        second.acquire()
    assert (holder(LocalStorage(tmp_path)) or {})["owner"] == first._owner
    first.check()
    first.release()


def test_a_bit_flipped_while_a_lock_is_read_ends_no_run(tmp_path: Path, clock: Clock) -> None:
    class Flipping(LocalStorage):
        times = 0

        def read(self, key: str, limit_bytes: int) -> bytes:
            found = super().read(key, limit_bytes)
            self.times += 1
            return found.replace(b"owner", b"ovner") if self.times % 2 == 0 else found

    storage = Flipping(tmp_path)
    lock(storage)
    lease = Lease(storage)
    lease.acquire()
    lease.check()
    lease.check()
    lease.release()


def test_abandoned_data_of_a_dead_run_goes_at_once(tmp_path: Path, gone: int | None) -> None:
    """That of the lock's owner, whatever its age; of others, which may live elsewhere, nothing."""
    from tests.checkpoint.pieces import pieces_of

    def manager() -> CheckpointManager:
        opened = CheckpointManager(str(tmp_path), single_process_mesh())
        opened.lock()
        return opened

    first = manager()
    kept = first.save(1, "snapshot", pieces_of(0, fill=True), {})
    assert kept is not None
    storage, digits = LocalStorage(tmp_path), kept.rpartition(".")[2]
    facts = holder(storage)
    first.release()
    assert facts is not None and facts["owner"].startswith(digits)
    left = [f"0000000002-00002.{digits}", f"0000000003-00003.{digits}", "0000000002-00002.0dd0dd"]
    for name in left[1:]:
        storage.put(f"data/{name}/rank-00000.vote.json", [b"left"])
    (tmp_path / "data" / left[0]).mkdir()
    (tmp_path / "data" / left[0] / ".tmp-1").write_bytes(b"left")
    lock(storage, **{**facts, "pid": gone, "world": "another boot"})
    watching = Lease(storage, lease_seconds=0.1)
    watching.acquire()
    watching.release()
    assert not watching.dead_digits
    lock(storage, **{**facts, "pid": gone})
    second = manager()
    assert set(os.listdir(tmp_path / "data")) == {kept, left[2]}
    second.release()


def test_a_lock_is_renewed_and_seen_to_be_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = LocalStorage(tmp_path)
    lease = Lease(storage, renew_seconds=0.01)
    lease.acquire()
    wait_until(lambda: (holder(storage) or {})["beat"] > 2)
    lock(storage)
    wait_until(lambda: "could not be renewed" in caplog.text)
    assert (holder(storage) or {})["owner"] == "x", "a renewal replaces no other run's lock"
    lease.release()
    assert holder(storage) is not None


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("10 seconds passed")
