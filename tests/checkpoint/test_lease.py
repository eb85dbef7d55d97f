"""One run per save folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from internlm_lite.checkpoint.lease import KEY, Lease, _world, holder
from internlm_lite.checkpoint.local import LocalStorage
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.errors import StorageError
from internlm_lite.mesh.mesh import single_process_mesh


def lock(storage: LocalStorage, **facts: object) -> None:
    storage.put(KEY, [json.dumps({"owner": "x", "host": "elsewhere", "pid": 7, "beat": 0, **facts}).encode()])


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    first = Lease(storage, lease_seconds=1, renew_seconds=0.1)
    first.acquire()
    with pytest.raises(StorageError, match=rf"in use by host {socket.gethostname()}, pid {os.getpid()}: expected"):
        Lease(storage, lease_seconds=1, renew_seconds=0.1).acquire()
    first.check()
    first.release()
    assert holder(storage) is None
    third = Lease(storage, 1, 0.1)
    third.acquire()
    third.release()


def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    storage = LocalStorage(tmp_path)
    lock(storage, host=socket.gethostname(), pid=process.pid, world=_world())
    begin = time.monotonic()
    lease = Lease(storage, lease_seconds=30)
    lease.acquire()
    assert time.monotonic() - begin < 5
    lease.release()


def test_a_pid_of_another_boot_or_namespace_means_nothing_here(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    gone = multiprocessing.get_context("spawn").Process(target=int)
    gone.start()
    gone.join()
    lock(storage, host=socket.gethostname(), pid=gone.pid, world=f"{_world()} of another container")
    beats = threading.Timer(0.3, lambda: lock(storage, host=socket.gethostname(), pid=gone.pid, beat=1))
    beats.start()
    with pytest.raises(StorageError, match="in use by host"):
        Lease(storage, lease_seconds=2).acquire()
    beats.join()


def test_a_lock_that_was_deleted_is_written_anew_where_the_folder_is_still_there(tmp_path: Path) -> None:
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
    lock(storage)
    threading.Timer(0.3, lock, (storage,), {"beat": 1}).start()
    with pytest.raises(StorageError, match="in use by host elsewhere, pid 7"):
        Lease(storage, lease_seconds=5).acquire()


def test_a_run_that_lost_its_lease_commits_no_more(tmp_path: Path) -> None:
    from tests.checkpoint.pieces import pieces_of

    manager = CheckpointManager(str(tmp_path), single_process_mesh(), exclusive=True)
    manager.save(1, "snapshot", pieces_of(0, fill=True), {})
    lock(LocalStorage(tmp_path))
    with pytest.raises(StorageError, match="this run does not write there any more"):
        manager.save(2, "snapshot", pieces_of(0, fill=True), {})
    assert len(os.listdir(tmp_path / "commits")) == 1
    manager.release()
    assert holder(LocalStorage(tmp_path)) == {"owner": "x", "host": "elsewhere", "pid": 7, "beat": 0}, "not ours"


@pytest.mark.parametrize("text", [b"", b"not json", b"[1, 2]", b'{"pid": "text"}'])
def test_a_damaged_lock_is_watched_like_any_other(tmp_path: Path, text: bytes) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(KEY, [text])
    lease = Lease(storage, lease_seconds=0.2)
    lease.acquire()
    lease.release()
