"""Ranks killed during a save of four: any one of them, the one that commits, all at once."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.save.saver import SaveOptions
from internlm_lite.checkpoint.storage.base import StoredObject
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from tests.checkpoint.pieces import pieces_of
from tests.faults.extent import ALL, number, some
from tests.faults.states import assert_next_run_saves_and_cleans, loaded_step, random_at, state_at
from tests.faults.victims import NEW, OLD
from tests.world import run_world

RANKS = 4
MOMENTS = {0: 23, 1: 10, 2: 13, 3: 22}
"""As many as `Deadly` counts in a save of a rank; after VOTED, rank 0 waits for votes, commits and tidies."""
VOTED = 8
VOTE_SECONDS = 2.0
"""After which rank 0 gives a dead rank up."""


class Deadly(LocalStorage):
    """Kills its process at the n-th moment of a save: a put begins, a chunk is written, it ends, a look around."""

    def __init__(self, root: Path, moments: int) -> None:
        super().__init__(root)
        self._left = moments

    def _moment(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def put(self, key: str, chunks: Iterable[Any]) -> int:
        def watched() -> Iterator[Any]:
            for chunk in chunks:
                self._moment()
                yield chunk

        self._moment()
        written = super().put(key, watched())
        self._moment()
        return written

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._moment()
        done = super().put_if_absent(key, data)
        self._moment()
        return done

    def list(self, folder: str) -> list[StoredObject]:
        self._moment()
        return super().list(folder)


def save_and_die(mesh: Mesh, folder: Path, moments: dict[int, int], delay_seconds: float | None) -> None:
    """Save OLD, then NEW in the background; rank -> moment of its death, or all ranks die after a while."""
    manager = CheckpointManager(str(folder), mesh, saving=SaveOptions(vote_timeout_seconds=20))
    rank = mesh.rank
    manager.save(OLD, "snapshot", state_at(OLD, rank, RANKS), {"step": OLD}, random_at(OLD))
    manager._vote_timeout_seconds = VOTE_SECONDS
    if rank in moments:
        manager.folders[0].storage = Deadly(folder, moments[rank])
    comm.gather_objects(None, mesh.world)
    if delay_seconds is not None:
        threading.Timer(delay_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    manager.save(NEW, "snapshot", state_at(NEW, rank, RANKS), {"step": NEW}, random_at(NEW), wait=False)
    saved = manager.wait()
    assert saved is not None
    (folder.parent / f"said-{rank}").write_text(str(saved.error))
    if delay_seconds is not None:
        threading.Event().wait(5)


def go_on(mesh: Mesh, folder: Path, expected: int) -> None:
    """Another world of the same size loads and saves."""
    manager = CheckpointManager(str(folder), mesh)
    manager.lock()
    pieces = pieces_of(mesh.rank, zero=RANKS, fill=False)
    restored = manager.resume(pieces)
    assert restored is not None and restored.found.step == expected and restored.rank_state is not None
    for piece, true in zip(pieces, state_at(expected, mesh.rank, RANKS), strict=True):
        assert (piece.tensor == true.tensor).all()
    step = expected + 1
    manager.save(step, "snapshot", state_at(step, mesh.rank, RANKS), {"step": step}, random_at(step))
    manager.release()


def killed_world(folder: Path, moments: dict[int, int], delay_seconds: float | None) -> tuple[int, bool]:
    """The step that is found after such an end, and whether anybody died before the save was over."""
    shutil.rmtree(folder.parent)
    folder.parent.mkdir()
    try:
        run_world(save_and_die, RANKS, (folder, moments, delay_seconds))
        died = False
    except AssertionError as error:
        for said in re.split(r"\n(?=rank \d: )", str(error)):
            # A rank may still be in a collective with one that dies.
            assert said.endswith("died without a word") or "PeerLostError" in said, said
        died = True
    step = loaded_step(folder)
    committed = any(path.name.startswith(f"{NEW:010d}-") for path in (folder / "commits").iterdir())
    assert step == (NEW if committed else OLD)
    assert died or step == NEW
    return step, died


@pytest.mark.timeout(900)
def test_kill_one_rank(tmp_path: Path) -> None:
    rng, folder, found = random.Random(1), tmp_path / "room" / "save", Counter[int]()
    folder.parent.mkdir()
    for turn in range(number(32, 4)):
        rank = turn % RANKS
        moment = rng.randint(1, MOMENTS[rank])
        step, died = killed_world(folder, {rank: moment}, None)
        found[step if died else 0] += 1
        said = folder.parent / "said-0"
        if rank and step == OLD and said.exists():
            assert re.search(rf"no vote from rank (\d, )*{rank}\b", said.read_text())
        if ALL or turn == 0:
            run_world(go_on, RANKS, (folder, step))
            step += 1
        assert_next_run_saves_and_cleans(folder, step + 1)
    assert found[0] <= 0.2 * found.total() + 1, "most died"
    print(f"\none rank killed: step found (0: nobody died) {dict(found)}")


@pytest.mark.timeout(900)
def test_kill_committing_rank(tmp_path: Path) -> None:
    """Rank 0, from its own vote to the commit read back."""
    folder, found = tmp_path / "room" / "save", Counter[int]()
    folder.parent.mkdir()
    for moment in some(range(VOTED, MOMENTS[0] + 1), 2):
        step, died = killed_world(folder, {0: moment}, None)
        found[step if died else 0] += 1
        assert_next_run_saves_and_cleans(folder, step + 1)
    print(f"\ncommitting rank killed: {dict(found)}")


@pytest.mark.timeout(900)
def test_kill_all_ranks(tmp_path: Path) -> None:
    rng, folder, found = random.Random(2), tmp_path / "room" / "save", Counter[int]()
    folder.parent.mkdir()
    for _ in range(number(20, 2)):
        step, died = killed_world(folder, {}, rng.uniform(0, 0.1))
        assert died
        found[step] += 1
        assert_next_run_saves_and_cleans(folder, step + 1)
    print(f"\nall ranks killed: {dict(found)}")


@pytest.mark.parametrize("which", [(1, 2, 3), (0, 3)])
def test_kill_some_ranks(which: tuple[int, ...], tmp_path: Path) -> None:
    folder = tmp_path / "room" / "save"
    folder.parent.mkdir()
    assert killed_world(folder, dict.fromkeys(which, 5), None) == (OLD, True)
    assert_next_run_saves_and_cleans(folder, NEW)
