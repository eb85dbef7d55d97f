"""Where a run starts from when that is not simply its own newest checkpoint, and what is said when it cannot."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.initialise import initialise
from internlm_lite.train import trainer
from internlm_lite.train.build import Run, build_run
from internlm_lite.train.changes import data_changes
from tests.corpus import write_corpus
from tests.train.runs import STEPS, curve, run_training, tiny

MESH = single_process_mesh()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a run with a milestone at step 4 and a final checkpoint."""
    room = tmp_path_factory.mktemp("origin")
    write_corpus(room / "corpus")
    run_training(MESH, config(room, enable_save_ckpt=True), room / "first")
    return room


def config(room: Path, **ckpt: Any) -> Any:
    ckpt = {"save_ckpt_folder": f"local:{room}/saves", "checkpoint_every": 4, "async_upload": False, **ckpt}
    return tiny(room / "corpus", ckpt=ckpt)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(metrics: list[dict[str, Any]]) -> list[int]:
    return [step["step"] for step in metrics]


@pytest.fixture
def damaged(room: Path, tmp_path: Path) -> Path:
    """A copy of the save folder whose final checkpoint only loading shows to be damaged."""
    saves = shutil.copytree(room / "saves", tmp_path / "saves")
    (path,) = saves.glob(f"data/{STEPS:010d}-*/rank-00000.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return saves


def test_a_run_without_saves_resumes_from_its_folder(room: Path, damaged: Path, tmp_path: Path):
    before = files(damaged)
    quiet = config(room, enable_save_ckpt=False, save_ckpt_folder=f"local:{damaged}")
    again = run_training(MESH, quiet, tmp_path / "quiet")
    assert steps(again) == list(range(4, STEPS)) and files(damaged) == before, "no lock, no probe, nothing"
    anew = run_training(MESH, quiet, tmp_path / "anew", resume="none")
    assert steps(anew) == list(range(STEPS)) and curve(anew)[4:] == curve(again)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The seeds with which weights were drawn. Memory that nobody writes is NaN."""
    seeds: list[int] = []
    monkeypatch.setattr(trainer, "initialise", lambda model, seed: seeds.append(seed) or initialise(model, seed))
    torch.use_deterministic_algorithms(True)
    yield seeds
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("how", "drawn"),
    [("auto", 0), ("4", 0), ("load_ckpt_folder", 0), ("load_model_only_folder", 0), ("nothing there", 1), ("none", 1)],
)
@pytest.mark.parametrize("dtype", ["torch.float64", "torch.bfloat16"])
def test_weights_are_drawn_only_where_no_checkpoint_is_loaded(
    how: str, drawn: int, dtype: str, room: Path, tmp_path: Path, draws: list[int]
):
    ckpt = {} if how in ("auto", "4", "none") else {"save_ckpt_folder": None, "enable_save_ckpt": False}
    ckpt |= {how: f"local:{room}/saves"} if how.startswith("load") else {}
    wanted = config(room, **ckpt)
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"dtype": dtype})})
    run = build_run(wanted, MESH, tmp_path / "run", how if how in ("4", "none") else "auto")
    run.checkpoints.close(wait=True)
    assert draws == [wanted.seed] * drawn and run.trainer.optimizer.problem() is None
    fresh, ours = (
        [param for stage in one.stages.values() for param in stage.parameters()]
        for one in (trainer.Trainer(wanted, MESH), run.trainer)
    )
    assert all(param.isfinite().all() for param in ours)
    assert all(torch.equal(a, b) for a, b in zip(fresh, ours, strict=True)) == bool(drawn)


def test_no_weights_are_drawn_for_a_start_whose_checkpoints_are_damaged(
    room: Path, damaged: Path, tmp_path: Path, draws: list[int]
):
    for shard in damaged.glob("data/*/rank-00000.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        build_run(config(room, save_ckpt_folder=f"local:{damaged}"), MESH, tmp_path / "run", "auto")
    assert draws == []


def test_a_run_without_saves_rolls_back_to_its_origin(room: Path, damaged: Path, tmp_path: Path):
    nowhere = build_run(config(room, save_ckpt_folder=None), MESH, tmp_path / "nowhere", "auto")
    assert nowhere.checkpoints.roll_back(nowhere.start, spiked_step=40) is None
    nowhere.checkpoints.close(wait=True)
    weights_alone = config(room, save_ckpt_folder=None, load_ckpt_folder=str(damaged), load_optimizer=False)
    run = build_run(weights_alone, MESH, tmp_path / "run", "auto")
    begun = held(run)
    for piece in run.trainer.optimizer.pieces():
        piece.tensor.fill_(7.0)
    assert run.checkpoints.roll_back(replace(run.start, step=9), spiked_step=7) == run.start
    assert held(run) == begun and not any(sum(begun[role]) for role in ("exp_avg", "exp_avg_sq")), (
        "no moments of before"
    )
    run.checkpoints.close(wait=True)


def held(run: Run) -> dict[str, list[float]]:
    """Masters and moments."""
    found: dict[str, list[float]] = defaultdict(list)
    for piece in run.trainer.optimizer.pieces():
        found[piece.role] += piece.tensor.flatten().tolist()
    return found


@pytest.mark.parametrize("how", ["resume", "load_ckpt_folder", "load_model_only_folder"])
def test_from_a_damaged_checkpoint_of_another_folder_to_the_one_before(
    how: str, room: Path, damaged: Path, tmp_path: Path
):
    other = {"save_ckpt_folder": None} | ({} if how == "resume" else {how: str(damaged)})
    resume = str(damaged) if how == "resume" else "auto"
    found = run_training(MESH, config(room, **other), tmp_path / "run", resume=resume)
    assert steps(found) == list(range(0 if "only" in how else 4, STEPS))
    (newest,) = damaged.glob(f"commits/{STEPS:010d}-*.json")
    with pytest.raises(CheckpointError, match="damaged in bytes"):
        run_training(MESH, config(room, save_ckpt_folder=None), tmp_path / "one", resume=str(newest))


def test_weights_alone_are_named_as_such(room: Path, tmp_path: Path):
    run = build_run(config(room), MESH, tmp_path / "run", "none")
    weights = [piece for piece in run.trainer.optimizer.pieces() if piece.role == "master"]
    CheckpointManager(str(tmp_path / "hf"), MESH).save(0, "final", weights, {"converted_from": "llama"})
    with pytest.raises(CheckpointError, match=r"holds weights alone.*ckpt\.load_model_only_folder"):
        run.checkpoints.restore(str(tmp_path / "hf"))
    run.checkpoints.close(wait=True)


def test_changed_data_is_named_before_anything_is_loaded(room: Path, tmp_path: Path):
    copy = shutil.copytree(room, tmp_path / "room")
    file = sorted((copy / "corpus").rglob("*.bin"))[0]
    name = file.parent.relative_to(copy / "corpus").as_posix()
    for path in file.parent.glob(f"{file.stem}.*"):
        path.rename(path.with_name("moved" + path.suffix))
    (payload,) = (copy / "saves").glob(f"data/{STEPS:010d}-*/rank-00000.safetensors")
    payload.write_bytes(payload.read_bytes()[:-1] + b"?")  # whoever reads it would find that first
    with pytest.raises(CheckpointError) as caught:
        run_training(MESH, config(copy), tmp_path / "run")
    text = str(caught.value)
    assert f"\n  data folder {name}: " in text and f"gone: {file.name}" in text and "new: moved.bin" in text
    assert "ckpt.allow_changed_data=True" in text


def test_what_changed_is_said_folder_by_folder():
    def folder(name: str, tokens: int, *files: str) -> dict[str, Any]:
        named = [{"name": file.strip("!"), "index_sha256": file} for file in files]
        return {"name": name, "documents": 10, "tokens": tokens, "files": named}

    old = {"seq_len": 32, "folders": [folder("en", 100, "a", "b"), folder("cn", 50, "c"), folder("x", 1, "d")]}
    new = {"seq_len": 64, "folders": [folder("en", 120, "a!", "e"), folder("cn", 50, "c"), folder("y", 1, "d")]}
    assert data_changes(old, old) == []
    assert data_changes(old, new) == [
        "seq_len: 32 then, 64 now",
        "data folder x: gone",
        "data folder y: new",
        "data folder en: gone: b; new: e; changed: a; 10 documents of 100 tokens then, 10 documents of 120 tokens now",
    ]
    turned = {"seq_len": 32, "folders": old["folders"][::-1]}
    assert data_changes(old, turned) == ["data folders: en, cn, x then, x, cn, en now"]


@pytest.mark.parametrize(("every", "reserved"), [(None, False), (4, True)])
def test_memory_for_copies_is_taken_where_something_will_be_copied(
    every: int | None, reserved: bool, room: Path, tmp_path: Path
):
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path}/saves", "async_upload": True}
    run = build_run(config(room, checkpoint_every=every, **saves), MESH, tmp_path / "run", "none")
    assert (run.checkpoints.manager._staging._buffer.numel() > 0) == reserved
    run.checkpoints.close(wait=True)
