"""Several ranks: any layout is read into any other bit for bit, and whatever fails on one rank ends on all of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.checkpoint.format.regions import Region
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.checkpoint.pieces import ROLES, assert_true_values, pieces_of
from tests.world import run_world

# name -> (tp, zero, uneven cut) of a world of that size
LAYOUTS: dict[int, list[tuple[int, int, bool]]] = {
    1: [(1, 1, False)],
    2: [(2, 1, False), (1, 2, False), (1, 2, True)],
    4: [(4, 1, False), (2, 2, False), (1, 4, False), (1, 2, True)],
}


def _pieces(rank: int, layout: tuple[int, int, bool], fill: bool) -> list[LocalShard]:
    tp, zero, uneven = layout
    return pieces_of(rank, tp=tp, zero=zero, uneven=uneven, fill=fill)


def _folders(size: int, root: str) -> list[str]:
    return [f"{root}/{size}-{index}" for index in range(len(LAYOUTS[size]))]


def _save_all(mesh: Mesh, root: str) -> list[str]:
    """Save every layout of this world's size into its own folder; two saves reuse one exchange."""
    names = []
    for folder, layout in zip(_folders(mesh.world.size, root), LAYOUTS[mesh.world.size], strict=True):
        manager = CheckpointManager(folder, mesh)
        private = {"rng": torch.full((5,), mesh.rank, dtype=torch.uint8)}
        for step in (1, 2):
            names.append(manager.save(step, "milestone", _pieces(mesh.rank, layout, True), {"step": step}, private))
    return names


def _load_all(mesh: Mesh, folders: list[str]) -> list[list[int] | None]:
    """Load every folder into every layout of this size; what rank state came back."""
    states: list[list[int] | None] = []
    for folder in folders:
        manager = CheckpointManager(folder, mesh, saving=None)
        for layout in LAYOUTS[mesh.world.size]:
            pieces = _pieces(mesh.rank, layout, False)
            restored = manager.resume(pieces)
            assert restored is not None and restored.state == {"step": 2}
            assert_true_values(pieces)
            states.append(restored.rank_state and restored.rank_state["rng"].tolist())
    return states


def test_any_layout_to_any_layout(tmp_path: Path) -> None:
    root = str(tmp_path)
    _save_all(single_process_mesh(), root)
    for size in (2, 4):
        names = run_world(_save_all, size, (root,))
        assert all(theirs == names[0] for theirs in names)
    folders = [folder for size in LAYOUTS for folder in _folders(size, root)]
    for size in (2, 4):
        for rank, states in enumerate(run_world(_load_all, size, (folders,))):
            from_size = [saved for saved in LAYOUTS for _ in LAYOUTS[saved] for _ in LAYOUTS[size]]
            assert states == [[rank] * 5 if rank < saved else None for saved in from_size]
    _load_all(single_process_mesh(), folders)


def _save_replicas(mesh: Mesh, folder: str) -> int:
    CheckpointManager(folder, mesh).save(1, "final", pieces_of(mesh.rank, fill=True), {})
    return os.path.getsize(next(Path(folder).glob(f"data/*/rank-{mesh.rank:05d}.safetensors")))


def test_replicas_write_every_byte_once(tmp_path: Path) -> None:
    sizes = run_world(_save_replicas, 4, (str(tmp_path),))
    single = _save_replicas(single_process_mesh(), f"{tmp_path}/single")
    assert sum(sizes) < single + 4 * 4096 and max(sizes) < 0.5 * single


def _error_of(work: Any) -> tuple[str, str]:
    try:
        work()
    except InternLMError as error:
        return type(error).__name__, str(error)
    return "no error", ""


def _fail_on_one_rank(mesh: Mesh, folder: str) -> list[tuple[str, str]]:
    """Trouble of several kinds, each on one rank only; afterwards the folder works."""
    manager = CheckpointManager(folder, mesh)
    layout = (1, 4, False)
    manager.save(1, "snapshot", _pieces(mesh.rank, layout, True), {})
    answers = []

    class Full(LocalStorage):
        bad = ""

        def put(self, key: str, chunks: Any) -> int:
            if self.bad in key:
                raise StorageError(f"cannot write {key}: the disk is full")
            return super().put(key, chunks)

    good = manager.storage
    for bad in ("rank-00002.safetensors", "rank-00001.vote", "manifest"):
        full = Full(Path(folder))
        full.bad = bad
        manager.folders[0].storage = full
        answers.append(_error_of(lambda: manager.save(2, "snapshot", _pieces(mesh.rank, layout, True), {})))
    manager.folders[0].storage = good
    state = {"bad": float("nan")} if mesh.rank == 3 else {}
    answers.append(_error_of(lambda: manager.save(3, "snapshot", _pieces(mesh.rank, layout, True), state)))
    pieces = _pieces(mesh.rank, layout, False)
    if mesh.rank == 1:
        pieces.append(LocalShard("extra", "master", (1,), ((0, 1),), None, torch.zeros(1)))
    answers.append(_error_of(lambda: manager.resume(pieces)))
    manager.save(4, "snapshot", _pieces(mesh.rank, layout, True), {})
    pieces = _pieces(mesh.rank, layout, False)
    restored = manager.resume(pieces)
    assert restored is not None and restored.found.step == 4
    assert_true_values(pieces)
    return answers


def test_failing_ranks_end_on_all_ranks(tmp_path: Path) -> None:
    answers = run_world(_fail_on_one_rank, 4, (str(tmp_path),))
    assert all(theirs == answers[0] for theirs in answers)
    full, vote, manifest, state, extra = answers[0]
    assert full[0] == "StorageError" and full[1].startswith("rank 2: cannot write data/")
    assert vote[0] == "StorageError" and vote[1].startswith("rank 1: cannot write data/")
    assert manifest[0] == "StorageError" and "manifest.json: the disk is full" in manifest[1]
    assert state == ("CheckpointError", state[1]) and "rank 3: state.bad: nan" in state[1]
    assert extra[0] == "CheckpointError" and "only in the model (1):\n    extra [1]" in extra[1]
    assert len(os.listdir(tmp_path / "data")) == 2


def _resume_damaged(mesh: Mesh, folder: str) -> tuple[str, tuple[str, ...]]:
    pieces = _pieces(mesh.rank, (2, 2, False), False)
    restored = CheckpointManager(folder, mesh).resume(pieces)
    assert restored is not None
    assert_true_values(pieces)
    return restored.found.name, restored.found.rejected


@pytest.mark.parametrize("file", ["rank-00003.safetensors", "rank-00002.vote.json"])
def test_damage_that_one_rank_sees_makes_all_ranks_fall_back(tmp_path: Path, file: str) -> None:
    folder = str(tmp_path / "2")
    names = run_world(_save_once, 4, (folder, (1, 4, False)))[0]
    path = Path(folder) / "data" / names[1] / file
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    for name, rejected in run_world(_resume_damaged, 4, (folder,)):
        assert name == names[0] and len(rejected) == 1 and file in rejected[0]


def _save_once(mesh: Mesh, folder: str, layout: tuple[int, int, bool]) -> list[str]:
    manager = CheckpointManager(folder, mesh)
    return [manager.save(step, "snapshot", _pieces(mesh.rank, layout, True), {}) for step in (1, 2)]


def _own_folders(mesh: Mesh, root: str) -> tuple[str, str]:
    return _error_of(lambda: CheckpointManager(f"{root}/node{mesh.rank}", mesh))


def test_folders_that_ranks_do_not_share_are_found_at_construction(tmp_path: Path) -> None:
    for kind, text in run_world(_own_folders, 2, (str(tmp_path),)):
        assert kind == "StorageError" and "is not one folder for all ranks" in text and "rank 1: " in text


def _agree(mesh: Mesh) -> list[Any]:
    def bug() -> None:
        if mesh.rank == 1:
            raise ZeroDivisionError("a bug")

    answers: list[Any] = [on_main(mesh, lambda: mesh.rank), on_all(mesh, lambda: mesh.rank)]
    try:
        on_all(mesh, bug)
    except (ZeroDivisionError, CheckpointError) as error:
        answers.append((type(error).__name__, str(error)))
    return answers


def test_agree() -> None:
    one, two = run_world(_agree, 2)
    assert one == [0, 0, ("CheckpointError", "rank 1: ZeroDivisionError: a bug")]
    assert two == [0, 1, ("ZeroDivisionError", "a bug")]


def _same_layout_reads(mesh: Mesh, folder: str) -> list[str]:
    manager = CheckpointManager(folder, mesh)
    manager.save(1, "final", _pieces(mesh.rank, (1, 4, False), True), {})
    found = manager.latest()
    assert found is not None
    read: set[str] = set()

    class Watching(LocalStorage):
        def read_into(self, key: str, start: int, buffer: memoryview) -> None:
            read.add(key.rsplit("/", 1)[1])
            super().read_into(key, start, buffer)

    object.__setattr__(found, "storage", Watching(Path(folder)))
    pieces = _pieces(mesh.rank, (1, 4, False), False)
    manager.load(found, pieces)
    assert {Region(piece.box, piece.flat_range).count > 0 for piece in pieces} == {True, False} and len(ROLES) == 3
    return sorted(read)


def test_same_layout_reads_only_its_own_file(tmp_path: Path) -> None:
    for rank, read in enumerate(run_world(_same_layout_reads, 4, (str(tmp_path),))):
        assert read == [f"rank-{rank:05d}.safetensors"]
