"""Training states that differ in every element from step to step, so that a mixture of two is seen; and the look at a
folder after a fault: which of them is there, is it whole, and does the next save leave nothing else behind.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from internlm_lite.checkpoint.admin.verify import damages_of
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh
from tests.checkpoint.pieces import pieces_of

AGE_SECONDS = 7200.0
"""Older than what a save that may still be alive can have left."""


def state_at(step: int, rank: int = 0, ranks: int = 1) -> list[LocalShard]:
    """What one of `ranks` ranks holds at `step`."""
    pieces = pieces_of(rank, zero=ranks, fill=True)
    for piece in pieces:
        piece.tensor.add_(1000.0 * step)
    return pieces


def random_at(step: int) -> dict[str, torch.Tensor]:
    return {"cpu": torch.full((64,), step, dtype=torch.uint8)}


def assert_state_at(
    step: int, pieces: list[LocalShard], state: dict, rank_state: dict[str, torch.Tensor] | None
) -> None:
    """Everything of one process is that of `step`, bit for bit."""
    assert state == {"step": step}
    for found, expected in zip(pieces, state_at(step), strict=True):
        assert torch.equal(found.tensor, expected.tensor), f"{found.role} of {found.name} is not that of step {step}"
    assert rank_state is not None and torch.equal(rank_state["cpu"], random_at(step)["cpu"])


def save_at(manager: CheckpointManager, step: int, kind: str = "snapshot", wait: bool = True) -> str | None:
    return manager.save(step, kind, state_at(step), {"step": step}, random_at(step), wait=wait)


def loaded_step(folder: Path) -> int:
    """The step of the checkpoint that a fresh process resumes from, once it proved whole. Nothing may look damaged."""
    pieces = pieces_of(0, fill=False)
    manager = CheckpointManager(str(folder), single_process_mesh(), saving=None)
    restored = manager.resume(pieces)
    assert restored is not None, "no checkpoint is found"
    assert restored.found.rejected == (), restored.found.rejected
    assert_state_at(restored.found.step, pieces, restored.state, restored.rank_state)
    storage = LocalStorage(folder)
    damages = [str(damage) for name in committed(storage) for damage in damages_of(storage, name)]
    assert not damages, "\n".join(damages)
    return restored.found.step


def age(folder: Path) -> None:
    """Let two hours pass for everything that lies there."""
    then = time.time() - AGE_SECONDS
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.utime(Path(parent) / name, (then, then), follow_symlinks=False)


def assert_next_run_saves_and_cleans(folder: Path, step: int) -> None:
    """The next run, some hours later, takes the folder over, saves, and leaves whole checkpoints and nothing else."""
    age(folder)
    manager = CheckpointManager(str(folder), single_process_mesh())
    manager.lock()
    save_at(manager, step)
    manager.release()
    manager.close(wait=True)
    assert loaded_step(folder) == step
    assert_nothing_else(folder)


def assert_next_run_removes_abandoned_data(folder: Path, before: set[str]) -> None:
    """The next start on this machine removes at once what the killed run, whose lock it finds, has not committed.
    `before`: what was in the data folder already."""
    manager = CheckpointManager(str(folder), single_process_mesh())
    manager.lock()
    left = set(os.listdir(folder / "data")) - before
    assert left <= {str(name) for name in committed(manager.storage)}, left
    manager.release()
    manager.close(wait=True)


def assert_nothing_else(folder: Path) -> None:
    """Only committed checkpoints lie in the folder, no file and no folder besides."""
    names = {str(name) for name in committed(LocalStorage(folder))}
    assert set(os.listdir(folder)) == {"commits", "data"}, os.listdir(folder)
    assert set(os.listdir(folder / "commits")) == {f"{name}.json" for name in names}
    assert set(os.listdir(folder / "data")) == names, (os.listdir(folder / "data"), names)
    for data in (folder / "data").iterdir():
        odd = [name for name in os.listdir(data) if name.startswith(".") or "refused" in name]
        assert not odd, odd
