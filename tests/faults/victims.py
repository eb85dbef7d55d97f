"""Processes that save and may be killed at any moment: what lies in the folder before, what they do, and which of their
threads is watched from which moment on.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.shards import describe
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.saver import SaveOptions
from internlm_lite.checkpoint.save.write_plan import plan_writes
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.mesh.mesh import single_process_mesh
from tests.faults.states import age, random_at, save_at, state_at

Ready = Callable[[int], None]
"""Called with the id of the thread to watch, when the watch begins."""
OLD, NEW = 3, 4
"""Step of the newest checkpoint before, and of the one that is being saved."""


def _open(folder: Path, exclusive: bool = False) -> CheckpointManager:
    options = SaveOptions(vote_timeout_seconds=20, staging_folder=folder.parent / "staging")
    manager = CheckpointManager(str(folder), single_process_mesh(), saving=options)
    if exclusive:
        manager.lock()
    return manager


def _writer(manager: CheckpointManager) -> int:
    """Id of the thread that writes."""
    return manager._thread.submit(threading.get_native_id).result()


def _end(manager: CheckpointManager) -> None:
    saved = manager.wait()
    assert saved is not None and saved.error is None, saved


def one_checkpoint(folder: Path) -> None:
    manager = _open(folder)
    save_at(manager, OLD, "milestone")
    manager.close(wait=True)


def several_and_leftovers(folder: Path) -> None:
    """Snapshots of which one must go, a milestone, and what a killed save left hours ago."""
    manager = _open(folder)
    for step, kind in ((0, "milestone"), (1, "snapshot"), (2, "snapshot"), (OLD, "snapshot")):
        save_at(manager, step, kind)
    manager.close(wait=True)
    for left in ("data/0000000009-00009.abcdef/rank-00000.safetensors", "data/.tmp-123", "probe-ab/rank-00000"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).write_bytes(b"left")
    age(folder)


def two_ranks_files(folder: Path) -> None:
    """The newest was saved by two ranks."""
    _save_of_two(folder, OLD)


def background(folder: Path, ready: Ready) -> None:
    """The thread that writes, the save being in the background."""
    manager = _open(folder)
    ready(_writer(manager))
    save_at(manager, NEW, wait=False)
    _end(manager)


def whole_run(folder: Path, ready: Ready) -> None:
    """The main thread from opening the folder, over its lease and the copy, to giving it free."""
    ready(threading.get_native_id())
    manager = _open(folder, exclusive=True)
    save_at(manager, NEW, wait=False)
    _end(manager)
    manager.release()
    manager.close(wait=True)


def waiting(folder: Path, ready: Ready) -> None:
    """The thread that writes, training waiting for it, with the folder's lease checked before the commit."""
    manager = _open(folder, exclusive=True)
    ready(_writer(manager))
    save_at(manager, NEW)
    manager.release()


TROUBLED = (NEW, NEW + 1, NEW + 2)


def troubled(folder: Path, ready: Ready) -> None:
    """The thread that writes, in three saves of which at most one may fail. Beside the folder: step, and its error."""
    manager = _open(folder, exclusive=True)
    save_at(manager, OLD)
    ready(_writer(manager))
    for step in TROUBLED:
        save_at(manager, step, wait=False)
        saved = manager.wait()
        assert saved is not None
        with open(folder.parent / "said", "a") as file:
            file.write(f"{step} {str(saved.error or 'saved').splitlines()[0]}\n")
    manager.release()


def two_ranks(folder: Path, ready: Ready) -> None:
    """Files, votes and the commit of two ranks, written one after another by one thread."""
    ready(threading.get_native_id())
    _save_of_two(folder, NEW)


def _save_of_two(folder: Path, step: int) -> None:
    storage, name = LocalStorage(folder), catalog.Name(step, step, f"{step:06x}")
    parts = [state_at(step, rank, ranks=2) for rank in (0, 1)]
    items = plan_writes([[describe(piece) for piece in part] for part in parts])
    for rank in (1, 0):
        mine = [(item, item.of(parts[rank][item.index])) for item in items[rank]]
        commit.write_rank(storage, name, rank, 2, commit.stream_of(mine, random_at(step)), items[rank])
    commit.await_votes(storage, name, 2, 20, threading.Event())
    layout = {"world": 2, "dp": 2, "tp": 1, "pp": 1, "zero": 2, "replica": 1}
    commit.commit_votes(storage, name, 2, commit.Facts("snapshot", layout, {}, {"step": step}))


def nothing(folder: Path) -> None:
    folder.mkdir()


@dataclass(frozen=True)
class Scenario:
    before: Callable[[Path], None]
    victim: Callable[[Path, Ready], None]


SCENARIOS = {
    "background": Scenario(one_checkpoint, background),
    "rotation and old leftovers": Scenario(several_and_leftovers, background),
    "waiting, with a lease": Scenario(one_checkpoint, waiting),
    "whole run, main thread": Scenario(several_and_leftovers, whole_run),
    "files of two ranks": Scenario(two_ranks_files, two_ranks),
}
LEASED = ("waiting, with a lease", "whole run, main thread")
"""Those that hold the folder's lock."""
TROUBLE = "three saves"
ALL_SCENARIOS = SCENARIOS | {TROUBLE: Scenario(nothing, troubled)}


def run_victim(scenario: str, folder: Path, told: int, released: int) -> None:
    """In a forked process: tell the thread's id through `told`, wait for a byte in `released`, work, and end."""
    wait = select.poll()
    wait.register(released, select.POLLIN)

    def ready(thread: int) -> None:
        os.write(told, f"{thread}\n".encode())
        # Whether strace still sees this call depends on when it attaches; so it is one that no save makes.
        assert wait.poll()[0][1] & select.POLLIN

    ALL_SCENARIOS[scenario].victim(folder, ready)
