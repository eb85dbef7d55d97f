"""The rooms of the package: which may import which, and how many of our frames lie between a save and the storage."""

from __future__ import annotations

import ast
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.config.schema import S3Config
from internlm_lite.mesh.mesh import single_process_mesh
from tests.checkpoint.pieces import pieces_of
from tests.test_imports import Trees, imports, read_trees
from tests.train.runs import run_training, tiny

PACKAGE = "internlm_lite.checkpoint"
FLOORS = {"storage": 1, "format": 2, "save": 3, "load": 3, "admin": 4, "manager": 5}
"""admin/ looks at checkpoints with the reader of load/, which knows nothing of it; nothing else crosses a floor."""
FRAMES = 6
"""In this package; two more are the training loop and `Checkpoints.save`."""


def direction_problems(trees: Trees) -> list[str]:
    problems = []
    for module, tree in trees.items():
        here = module.removeprefix(f"{PACKAGE}.").split(".")[0]
        if not module.startswith(f"{PACKAGE}.") or here not in FLOORS:
            continue
        for line, target in imports(tree, set(trees)):
            there = target.removeprefix(f"{PACKAGE}.").split(".")[0]
            if target.startswith(f"{PACKAGE}.") and there != here and FLOORS[there] >= FLOORS[here]:
                problems.append(f"{module}:{line} imports {target}: {here}/ may not import {there}/")
    return problems


def test_rooms_import_only_lower_ones() -> None:
    trees = read_trees()
    rooms = {module.split(".")[2] for module in trees if module.startswith(f"{PACKAGE}.")} - {"__init__"}
    assert rooms == set(FLOORS)
    assert direction_problems(trees) == []


@pytest.mark.parametrize(("module", "target"), [("storage.s3", "format.manifest"), ("save.saver", "load.loader")])
def test_an_import_upwards_or_sideways_is_seen(module: str, target: str) -> None:

    trees = {f"{PACKAGE}.{module}": ast.parse(f"import {PACKAGE}.{target}"), f"{PACKAGE}.{target}": ast.parse("")}
    assert len(direction_problems(trees)) == 1


class Frames:
    """Counts our own frames, over the threads that hand the work on to each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deepest: list[str] = []
        self._above: dict[int, list[str]] = {}
        submit = ThreadPoolExecutor.submit

        def counted(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
            above = self._stack()

            def run() -> Any:
                self._above[threading.get_ident()] = above
                return work(*args, **options)

            return submit(pool, run)

        monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)

    def _stack(self) -> list[str]:
        own = [f for f in traceback.extract_stack() if "/internlm_lite/" in f.filename]
        names = [f"{Path(frame.filename).stem}.{frame.name}" for frame in own]
        return self._above.get(threading.get_ident(), []) + names

    def look(self) -> None:
        self.deepest = max(self.deepest, self._stack(), key=len)


@pytest.mark.parametrize("in_background", [True, False])
def test_few_frames_from_the_loop_to_the_disk(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = Frames(monkeypatch)
    put = LocalStorage.put

    def watched(storage: LocalStorage, key: str, chunks: Any) -> int:
        if key.startswith("data/"):  # not the probe at the start
            frames.look()
        return put(storage, key, chunks)

    monkeypatch.setattr(LocalStorage, "put", watched)
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path}/saves", "async_upload": in_background}
    run_training(single_process_mesh(), tiny(None, ckpt={"checkpoint_every": 4, **saves}), tmp_path / "run")
    assert frames.deepest[:3] == ["loop.train", "saving.do", "checkpoints.save"], frames.deepest
    assert len(frames.deepest) + 1 <= FRAMES + 3, frames.deepest  # and LocalStorage.put itself


def test_few_frames_from_a_save_to_the_server(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = Frames(monkeypatch)
    manager = CheckpointManager(s3_folder, single_process_mesh(), s3=S3Config(insecure=True))
    storage: Any = manager.storage
    storage._part_bytes = 1000
    events = storage._client.meta.events
    for request in ("UploadPart", "PutObject"):
        events.register(f"before-call.s3.{request}", lambda **_: frames.look())
    try:
        manager.save(1, "snapshot", pieces_of(0, fill=True), {}, wait=False)
        manager.wait()
    finally:
        manager.close(wait=True)
    assert "s3_multipart.write" in frames.deepest and len(frames.deepest) <= FRAMES, frames.deepest
