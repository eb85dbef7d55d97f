"""Saves in the background: what the main thread hands over, what happens when storage is slow or fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save import saver as saver_module
from internlm_lite.checkpoint.save import staging as staging_module
from internlm_lite.checkpoint.save import write_job as write
from internlm_lite.checkpoint.save.saver import Saved, SaveOptions
from internlm_lite.checkpoint.save.staging import Staging
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.errors import StorageError
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.checkpoint.pieces import assert_true_values, pieces_of
from tests.world import run_world

CPU = torch.device("cpu")


class Gate(LocalStorage):
    """Storage that waits before it writes, or refuses."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open = threading.Event()
        self.refuses = ""

    def put(self, key: str, chunks: Iterable[Any]) -> int:
        assert self.open.wait(30)
        if self.refuses and self.refuses in key:
            raise StorageError(f"cannot write {key}: the disk is full")
        return super().put(key, chunks)


def gated(folder: Path | str, mesh: Mesh) -> tuple[CheckpointManager, Gate]:
    manager = CheckpointManager(str(folder), mesh, saving=SaveOptions(vote_timeout_seconds=20))
    gate = manager.folders[0].storage = Gate(Path(folder))
    return manager, gate


def ended(manager: CheckpointManager) -> Saved:
    saved = manager.wait()
    assert saved is not None
    return saved


def test_a_save_holds_what_was_true_when_it_began(tmp_path: Path) -> None:
    manager, gate = gated(tmp_path, single_process_mesh())
    pieces = pieces_of(0, fill=True)
    name = manager.save(3, "snapshot", pieces, {"step": 3}, {"cpu": torch.get_rng_state()}, wait=False)
    assert manager.finished() is None and manager.latest() is None
    for piece in pieces:
        piece.tensor.fill_(-1)
    gate.open.set()
    saved = ended(manager)
    assert (str(saved.name), saved.kind, saved.error) == (name, "snapshot", None)
    assert manager.finished() is None, "told once"
    fresh = pieces_of(0, fill=False)
    restored = CheckpointManager(str(tmp_path), single_process_mesh()).resume(fresh)
    assert restored is not None and restored.state == {"step": 3}
    assert_true_values(fresh)


def test_a_save_while_one_is_written_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager, gate = gated(tmp_path, single_process_mesh())
    first = manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    with caplog.at_level(logging.WARNING):
        assert manager.save(2, "snapshot", pieces_of(0, fill=True), {}, wait=False) is None
    assert manager.skipped == 1 and "no checkpoint at step 2" in caplog.text and "1 skipped so far" in caplog.text
    gate.open.set()
    assert str(ended(manager).name) == first
    assert manager.save(3, "snapshot", pieces_of(0, fill=True), {}, wait=False) is not None
    assert ended(manager).error is None


def test_one_that_must_wait_first_lets_the_other_end(tmp_path: Path) -> None:
    manager, gate = gated(tmp_path, single_process_mesh())
    manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    threading.Timer(0.2, gate.open.set).start()
    manager.save(2, "final", pieces_of(0, fill=True), {})
    found = manager.latest()
    assert found is not None and found.step == 2 and len(os.listdir(tmp_path / "commits")) == 2


@pytest.mark.parametrize("refused", ["safetensors", "vote", "manifest"])
def test_a_failure_is_told_and_leaves_nothing_once_the_next_save_begins(tmp_path: Path, refused: str) -> None:
    manager, gate = gated(tmp_path, single_process_mesh())
    gate.open.set()
    gate.refuses = refused
    failed = manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    saved = ended(manager)
    assert isinstance(saved.error, StorageError) and "the disk is full" in str(saved.error)
    assert manager.latest() is None
    gate.refuses = ""
    name = manager.save(2, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    assert ended(manager).error is None
    assert os.listdir(tmp_path / "data") == [name] and name != failed


def fail_on_one_rank(mesh: Mesh, folder: str) -> list[Any]:
    manager, gate = gated(folder, mesh)
    pieces = pieces_of(mesh.rank, zero=2, fill=True)
    answers: list[Any] = []
    gate.open.set()
    gate.refuses = "rank-00001.safetensors"
    manager.save(1, "snapshot", pieces, {}, wait=False)
    answers.append(str(ended(manager).error))
    gate.refuses = ""
    if mesh.rank == 1:
        gate.open.clear()
    manager.save(2, "snapshot", pieces, {}, wait=False)
    answers.append(manager.save(3, "snapshot", pieces, {}, wait=False))
    gate.open.set()
    answers.append(ended(manager).error)
    return answers


def test_a_rank_that_cannot_write_is_named_by_rank_0_and_one_that_is_slow_makes_all_skip(tmp_path: Path) -> None:
    zero, one = run_world(fail_on_one_rank, 2, (str(tmp_path),))
    assert "rank 1 could not write its part: cannot write data/" in zero[0] and "the disk is full" in one[0]
    assert zero[1:] == one[1:] == [None, None]
    assert [name.split("-")[0] for name in os.listdir(tmp_path / "commits")] == ["0000000002"]


def test_every_rank_that_refused_is_named_with_its_reason(tmp_path: Path) -> None:
    storage, name = LocalStorage(tmp_path), Name(1, 1, "abcdef")
    for rank in range(12):
        commit.refuse(storage, name, rank, "the disk is full" if rank < 3 else f"cannot write rank-{rank:05d}")
    with pytest.raises(StorageError) as caught:
        commit.await_votes(storage, name, 13, 60, threading.Event())
    text = str(caught.value)
    assert text.startswith(f"checkpoint {name}: rank 0, 1, 2 could not write its part: the disk is full; rank 3 could")
    assert text.endswith("rank 9 could not write its part: cannot write rank-00009; nor could rank 10, 11")


def die_before_the_vote(mesh: Mesh, folder: str) -> str:
    manager = CheckpointManager(folder, mesh, saving=SaveOptions(vote_timeout_seconds=1))
    gate = manager.folders[0].storage = Gate(Path(folder))
    if mesh.rank == 0:
        gate.open.set()
    manager.save(1, "snapshot", pieces_of(mesh.rank, zero=2, fill=True), {}, wait=False)
    return str(ended(manager).error) if mesh.rank == 0 else ""


def test_a_rank_that_never_votes_is_named_after_the_deadline(tmp_path: Path) -> None:
    answer = run_world(die_before_the_vote, 2, (str(tmp_path),))[0]
    assert "no vote from rank 1 after 1 s; nothing was committed" in answer
    assert os.listdir(tmp_path) == ["data"] or not os.listdir(tmp_path / "commits")


def test_staging_copies_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.arange(4), torch.tensor(2.5), torch.empty(0)]
    for folder in (None, tmp_path / "deep" / "folder"):
        staging = Staging(folder, CPU)
        staging.reserve(tensors)
        memory = staging._buffer.data_ptr()
        copies = staging.copy(tensors)
        assert staging._buffer.data_ptr() == memory, "made once"
        for copy, tensor in zip(copies, tensors, strict=True):
            assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.shape == tensor.shape
    assert os.listdir(tmp_path / "deep" / "folder") == [], "nothing to be left behind"


def test_staging_without_room_uses_ordinary_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor = torch.randn(100)
    with caplog.at_level(logging.WARNING):
        (copy,) = Staging(tmp_path, CPU).copy([tensor])
    assert torch.equal(copy, tensor) and "No space left on device" in caplog.text and not os.listdir(tmp_path)


class Cudart:
    """CUDA's page-locking, which refuses more than `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert flags == 0
        if size > self.room:
            return 2
        self.locked[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0


@pytest.mark.parametrize("folder", [None, "staging"])
def test_staging_for_a_gpu_is_page_locked_as_it_is_and_given_back(
    tmp_path: Path, folder: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cudart, forgotten = Cudart(room=3000), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(staging_module, "_forget_error", forgotten.append)
    staging = Staging(tmp_path / folder if folder else None, torch.device("cuda"))
    for n in (100, 50, 600):
        staging.reserve([torch.randn(n)])
        assert cudart.locked == {staging._buffer.data_ptr(): staging._buffer.numel()}
    assert staging._buffer.numel() == 2432, "no power of two"
    staging.reserve([torch.randn(800)])
    assert cudart.locked == {} and staging._buffer.numel() == 3200 and forgotten
    assert "CUDA refuses to page-lock 3.12 KiB" in caplog.text and "(error 2)" in caplog.text
    cudart.room = 10_000
    staging.reserve([torch.randn(1000)])
    staging.close()
    assert cudart.locked == {} and staging._buffer.numel() == 0


def test_the_copys_memory_is_given_back_at_the_end(tmp_path: Path) -> None:
    manager, gate = gated(tmp_path, single_process_mesh())
    gate.open.set()
    manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    assert manager._staging._buffer.numel()
    manager.close(wait=True)
    assert not manager._staging._buffer.numel()


def test_an_error_that_nobody_thought_of_is_an_alarm_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise MemoryError("no room")

    manager, gate = gated(tmp_path, single_process_mesh())
    gate.open.set()
    with monkeypatch.context() as patch:
        patch.setattr(write.commit, "write_rank", fail)
        manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
        assert "could not be written: MemoryError: no room" in str(ended(manager).error)
        assert any(record.exc_info and record.exc_info[0] is MemoryError for record in caplog.records)
        with pytest.raises(StorageError, match="MemoryError: no room"):
            manager.save(2, "final", pieces_of(0, fill=True), {})
    with monkeypatch.context() as patch:
        patch.setattr(write.commit, "write_rank", fail)
        patch.setattr(LocalStorage, "size", fail)  # while it looks at what the failed ones have left
        with pytest.raises(StorageError, match="MemoryError"):
            manager.save(3, "final", pieces_of(0, fill=True), {})
    assert "what failed saves left stays for now: no room" in caplog.text
    name = manager.save(4, "final", pieces_of(0, fill=True), {})
    assert os.listdir(tmp_path / "data") == [name]


def test_without_a_thread_the_save_fails_before_ranks_count_on_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    manager, gate = gated(tmp_path, single_process_mesh())
    gate.open.set()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(StorageError, match="can't start new thread"):
            manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    assert manager.save(2, "snapshot", pieces_of(0, fill=True), {}) is not None


def test_without_memory_for_a_copy_training_waits_for_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Staging, size: int) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(Staging, "_allocate", fail)
    manager, gate = gated(tmp_path, single_process_mesh())
    threading.Timer(0.2, gate.open.set).start()
    pieces = pieces_of(0, fill=True)
    manager.prepare(pieces)
    assert manager.save(1, "snapshot", pieces, {}, wait=False) is not None
    assert list(tmp_path.glob("data/*/rank-00000.safetensors")) and "training waits" in caplog.text
    for piece in pieces:
        piece.tensor.fill_(-1)
    assert ended(manager).error is None and not manager.write_in_progress
    fresh = pieces_of(0, fill=False)
    assert manager.resume(fresh) is not None
    assert_true_values(fresh)


def test_hanging_storage_is_reported_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saver_module, "_HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(saver_module, "_END_SECONDS", 0.05)
    manager, gate = gated(tmp_path, single_process_mesh())
    manager._vote_timeout_seconds = 0.1
    name = manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    with pytest.raises(StorageError, match=f"checkpoint {name} is still being written .* --timeout"):
        manager.save(2, "final", pieces_of(0, fill=True), {})
    assert f"checkpoint {name} is still being written: waiting for it since" in caplog.text
    assert manager.wait() is None and not manager.write_in_progress, "it has a copy of its own"
    gate.open.set()
    manager._vote_timeout_seconds = 20
    assert str(ended(manager).name) == name
    gate.open.clear()
    manager._vote_timeout_seconds = 0.1
    with pytest.raises(StorageError, match="is still being written"):
        manager.save(3, "milestone", pieces_of(0, fill=True), {})
    assert manager.write_in_progress, "nothing may change the tensors"
    manager.close(wait=True)
    gate.open.set()
    manager._thread.shutdown(wait=True)  # or it writes into the folder while that is removed


def wait_for_a_slow_rank(mesh: Mesh, folder: str) -> list[str]:
    manager, gate = gated(folder, mesh)
    pieces = pieces_of(mesh.rank, zero=2, fill=True)
    manager._vote_timeout_seconds = 1
    if mesh.rank == 0:
        gate.open.set()
    threading.Timer(1.5, gate.open.set).start()  # longer than rank 0 waits for a vote of a save in the background
    answers = [str(manager.save(1, "final", pieces, {}) is not None)]
    if mesh.rank == 1:
        gate.open.clear()
    manager._vote_timeout_seconds = 0.3
    try:
        manager.save(2, "final", pieces, {})
    except StorageError as error:
        answers.append(str(error))
    gate.open.set()
    return answers


def test_a_slow_rank_is_waited_for_and_one_that_hangs_is_named_on_all(tmp_path: Path) -> None:
    zero, one = run_world(wait_for_a_slow_rank, 2, (str(tmp_path),))
    assert zero == one and zero[0] == "True"
    assert "rank 1: checkpoint 0000000002-" in zero[1] and "is still being written" in zero[1]


def test_a_process_ends_though_its_writer_hangs(tmp_path: Path) -> None:
    program = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from internlm_lite.runtime.start import end_process\n"
        "ThreadPoolExecutor(1).submit(threading.Event().wait, 100)\n"
        "end_process(6)\n"
    )
    begin = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 6
    assert time.monotonic() - begin < 60
