"""Saves in the background: what the main thread hands over, what happens when storage is slow or fails."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.checkpoint.local import LocalStorage
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.saver import Saved, Saver
from internlm_lite.checkpoint.staging import Staging
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


def gated(folder: Path | str, mesh: Mesh) -> tuple[CheckpointManager, Saver, Gate]:
    saver = Saver(mesh, {}, vote_timeout_seconds=20)
    manager = CheckpointManager(str(folder), mesh, saver=saver)
    gate = manager._target.storage = Gate(Path(folder))
    return manager, saver, gate


def ended(saver: Saver) -> Saved:
    saved = saver.wait()
    assert saved is not None
    return saved


def test_a_save_holds_what_was_true_when_it_began(tmp_path: Path) -> None:
    manager, saver, gate = gated(tmp_path, single_process_mesh())
    pieces = pieces_of(0, fill=True)
    name = manager.save(3, "snapshot", pieces, {"step": 3}, {"cpu": torch.get_rng_state()}, wait=False)
    assert saver.finished() is None and manager.latest() is None
    for piece in pieces:
        piece.tensor.fill_(-1)
    gate.open.set()
    saved = ended(saver)
    assert (str(saved.name), saved.kind, saved.error) == (name, "snapshot", None)
    assert saver.finished() is None, "told once"
    fresh = pieces_of(0, fill=False)
    restored = CheckpointManager(str(tmp_path), single_process_mesh()).resume(fresh)
    assert restored is not None and restored.state == {"step": 3}
    assert_true_values(fresh)


def test_a_save_while_one_is_written_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager, saver, gate = gated(tmp_path, single_process_mesh())
    first = manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    with caplog.at_level(logging.WARNING):
        assert manager.save(2, "snapshot", pieces_of(0, fill=True), {}, wait=False) is None
    assert saver.skipped == 1 and "no checkpoint at step 2" in caplog.text and "1 skipped so far" in caplog.text
    gate.open.set()
    assert str(ended(saver).name) == first
    assert manager.save(3, "snapshot", pieces_of(0, fill=True), {}, wait=False) is not None
    assert ended(saver).error is None


def test_one_that_must_wait_first_lets_the_other_end(tmp_path: Path) -> None:
    manager, _, gate = gated(tmp_path, single_process_mesh())
    manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    threading.Timer(0.2, gate.open.set).start()
    manager.save(2, "final", pieces_of(0, fill=True), {})
    found = manager.latest()
    assert found is not None and found.step == 2 and len(os.listdir(tmp_path / "commits")) == 2


@pytest.mark.parametrize("refused", ["safetensors", "vote", "manifest"])
def test_a_failure_is_told_and_leaves_nothing_once_the_next_save_begins(tmp_path: Path, refused: str) -> None:
    manager, saver, gate = gated(tmp_path, single_process_mesh())
    gate.open.set()
    gate.refuses = refused
    failed = manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    saved = ended(saver)
    assert isinstance(saved.error, StorageError) and "the disk is full" in str(saved.error)
    assert manager.latest() is None
    gate.refuses = ""
    name = manager.save(2, "snapshot", pieces_of(0, fill=True), {}, wait=False)
    assert ended(saver).error is None
    assert os.listdir(tmp_path / "data") == [name] and name != failed


def fail_on_one_rank(mesh: Mesh, folder: str) -> list[Any]:
    manager, saver, gate = gated(folder, mesh)
    pieces = pieces_of(mesh.rank, zero=2, fill=True)
    answers: list[Any] = []
    gate.open.set()
    gate.refuses = "rank-00001.safetensors"
    manager.save(1, "snapshot", pieces, {}, wait=False)
    answers.append(str(ended(saver).error))
    gate.refuses = ""
    if mesh.rank == 1:
        gate.open.clear()
        threading.Timer(0.5, gate.open.set).start()
    manager.save(2, "snapshot", pieces, {}, wait=False)
    answers.append(manager.save(3, "snapshot", pieces, {}, wait=False))
    answers.append(ended(saver).error)
    return answers


def test_a_rank_that_cannot_write_is_named_by_rank_0_and_one_that_is_slow_makes_all_skip(tmp_path: Path) -> None:
    zero, one = run_world(fail_on_one_rank, 2, (str(tmp_path),))
    assert "rank 1 could not write its part: cannot write data/" in zero[0] and "the disk is full" in one[0]
    assert zero[1:] == one[1:] == [None, None]
    assert [name.split("-")[0] for name in os.listdir(tmp_path / "commits")] == ["0000000002"]


def die_before_the_vote(mesh: Mesh, folder: str) -> str:
    saver = Saver(mesh, {}, vote_timeout_seconds=1)
    manager = CheckpointManager(folder, mesh, saver=saver)
    gate = manager._target.storage = Gate(Path(folder))
    if mesh.rank == 0:
        gate.open.set()
    manager.save(1, "snapshot", pieces_of(mesh.rank, zero=2, fill=True), {}, wait=False)
    return str(ended(saver).error) if mesh.rank == 0 else ""


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
        copies = staging.hold(tensors)
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
        (copy,) = Staging(tmp_path, CPU).hold([tensor])
    assert torch.equal(copy, tensor) and "No space left on device" in caplog.text and not os.listdir(tmp_path)
