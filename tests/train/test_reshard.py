"""What one layout saves, any other loads bit by bit, and goes on as the first would have."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from internlm_lite.config.schema import Config
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.layout import Box
from internlm_lite.mesh.mesh import Mesh, Sizes, build_mesh, single_process_mesh
from internlm_lite.optim.training_optimizer import TrainingOptimizer
from internlm_lite.runtime.device import torch_dtype
from internlm_lite.train.build import Run, build_run
from internlm_lite.train.loop import train
from tests.corpus import write_corpus
from tests.steps import read_metrics
from tests.torches import HAS_ZBV
from tests.train.layouts import LIMIT, Layout, config_of
from tests.train.runs import curve
from tests.world import TIMEOUT, run_world

SAVED = 3
"""Steps done when the first layout saves; it goes on for two more."""

LAYOUTS = {
    "dp": Layout(dp=2, zero1=1),
    "zero1": Layout(dp=4, zero1=2, bucket=1500),
    "tp": Layout(tp=2, split_hidden=False),
    "tp sp": Layout(tp=4, sp=True, split_hidden=False, bucket=1500),
    "pp 1f1b": Layout(pp=2),
    "pp interleaved": Layout(pp=2, schedule="interleaved", chunks=2),
    **({"zbv": Layout(pp=2, schedule="zbv", chunks=2, bucket=1500)} if HAS_ZBV else {}),
    "mix": Layout(dp=2, pp=2, schedule="interleaved", chunks=2, zero1=2, bucket=1500),
}


class Held(NamedTuple):
    """A copy of a piece of a whole tensor."""

    role: str
    name: str
    shape: tuple[int, ...]
    box: Box
    span: tuple[int, int] | None
    values: torch.Tensor


Whole = dict[tuple[str, str], torch.Tensor]
"""(role, name) -> whole tensor."""


def held_by(optimizer: TrainingOptimizer) -> list[Held]:
    return [Held(p.role, p.name, p.shape, p.box, p.flat_range, p.tensor.clone()) for p in optimizer.pieces()]


def assemble(pieces: Iterable[Held]) -> Whole:
    """Whole tensors from the pieces of all ranks; NaN, unequal to everything, where nobody holds anything."""
    found: Whole = {}
    for piece in pieces:
        tensor = found.setdefault((piece.role, piece.name), torch.full(piece.shape, torch.nan, dtype=torch.float64))
        region = tensor[tuple(slice(*side) for side in piece.box)]
        values = region.flatten()
        part = values[slice(*piece.span)] if piece.span else values
        assert ((part == piece.values.view(-1)) | part.isnan()).all(), f"copies of {piece.role} {piece.name} differ"
        part.copy_(piece.values.view(-1))
        region.copy_(values.view(region.shape))
    return found


def assert_same(found: Whole, expected: Whole) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def saving(folder: Path) -> dict[str, Any]:
    """Section `ckpt` of a run that saves."""
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": str(folder)}
    return {**saves, "checkpoint_every": SAVED, "async_upload": False}


def loading(folder: Path) -> dict[str, Any]:
    """That of one which goes on from the checkpoint in `folder`."""
    (commit,) = (folder / "commits").glob(f"{SAVED:010d}-*.json")
    return {"load_ckpt_folder": str(commit)}


def job(layout: Layout, tied: bool, corpus: Path, ckpt: dict[str, Any]) -> Config:
    """With an average of the weights."""
    return config_of(replace(layout, tied=tied), corpus, ckpt=ckpt, ema={"every": 2})


def watch(run: Run) -> list[Held]:
    """What the optimizer holds when the milestone is saved, once it is."""
    held: list[Held] = []
    save = run.checkpoints.save

    def watched(state: Any, kind: Any, *, blocking: bool) -> None:
        if kind == "milestone":
            held.extend(held_by(run.trainer.optimizer))
        save(state, kind, blocking=blocking)

    run.checkpoints.save = watched  # type: ignore[method-assign]
    return held


Ran = tuple[list[Held], list[tuple[float, float]]]
"""What a rank held at the checkpoint, and on rank 0 the curve."""


def run_one(mesh: Mesh, config: Config, folder: Path) -> Ran:
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(config, mesh, folder, "auto")
    held = watch(run) if config.ckpt.enable_save_ckpt else held_by(run.trainer.optimizer)
    try:
        train(run, StopSignals())
    finally:
        run.checkpoints.close(wait=True)
        run.reporter.close()
    return held, curve(read_metrics(folder / "metrics.jsonl")) if mesh.is_main else []


def run_in_world(world: Mesh, jobs: list[tuple[Sizes, Config]], folder: Path) -> list[Ran]:
    logging.disable(logging.WARNING)
    meshes: dict[Sizes, Mesh] = {}
    found = []
    for number, (sizes, config) in enumerate(jobs):
        if sizes not in meshes:
            meshes[sizes] = build_mesh(sizes, world.rank, world.device, TIMEOUT)
        found.append(run_one(meshes[sizes], config, folder / str(number)))
    return found


def run_all(jobs: Sequence[tuple[Layout, Config]], folder: Path) -> list[tuple[Whole, list[tuple[float, float]]]]:
    """For each job whole tensors at the checkpoint, and the curve. One world of each size."""
    found = {}
    for size in {layout.world for layout, _ in jobs}:
        mine = [number for number, (layout, _) in enumerate(jobs) if layout.world == size]
        work = [(jobs[number][0].sizes, jobs[number][1]) for number in mine]
        ranks = run_world(run_in_world, size, (work, folder / str(size)), timeout_seconds=800)
        for number, ran in zip(mine, zip(*ranks, strict=True), strict=True):
            found[number] = assemble(piece for held, _ in ran for piece in held), ran[0][1]
    return [found[number] for number in range(len(jobs))]


@pytest.mark.parametrize("tied", [False, True])
def test_every_pair_of_layouts_reshards_and_goes_on(tied: bool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=200)
    saves = tmp_path / "saves"
    sources = [(layout, job(layout, tied, corpus, saving(saves / name))) for name, layout in LAYOUTS.items()]
    saved = dict(zip(LAYOUTS, run_all(sources, tmp_path / "sources"), strict=True))
    pairs = list(permutations(LAYOUTS, 2))
    assert len(pairs) == 56
    targets = [(LAYOUTS[other], job(LAYOUTS[other], tied, corpus, loading(saves / name))) for name, other in pairs]
    for (name, _), (tensors, went_on) in zip(pairs, run_all(targets, tmp_path / "targets"), strict=True):
        held, whole_curve = saved[name]
        assert_same(tensors, held)
        assert len(went_on) == 2
        for ours, expected in zip(went_on, whole_curve[SAVED:], strict=True):
            assert ours == pytest.approx(expected, rel=LIMIT)


SCALER = {"fp16": {"initial_scale": 256.0, "growth_interval": 2}}
SCALES = {
    ("float16", "float16"): [512.0, 1024.0],  # kept: one good step of two was done
    ("bfloat16", "bfloat16"): [1.0, 1.0],
    ("float16", "bfloat16"): [1.0, 1.0],
    ("bfloat16", "float16"): [256.0, 256.0],  # begun anew
    ("float32", "float16"): [256.0, 256.0],
}


@pytest.mark.parametrize(("saved", "loaded"), SCALES)
def test_another_dtype_takes_the_fp32_masters(saved: str, loaded: str, tmp_path: Path) -> None:
    corpus, mesh = write_corpus(tmp_path / "corpus", documents=200), single_process_mesh()

    def config(dtype: str, **ckpt: Any) -> Config:
        return config_of(Layout(bucket=1500), corpus, f"torch.{dtype}", grad_scaler=SCALER, ckpt=ckpt)

    saves = f"local:{tmp_path}/saves"
    first = config(saved, enable_save_ckpt=True, save_ckpt_folder=saves, checkpoint_every=SAVED, async_upload=False)
    held, whole_curve = run_one(mesh, first, tmp_path / "first")
    (commit,) = (tmp_path / "saves" / "commits").glob(f"{SAVED:010d}-*.json")
    second = config(loaded, load_ckpt_folder=str(commit))
    (tmp_path / "second").mkdir()
    run = build_run(second, mesh, tmp_path / "second", "auto")
    found = held_by(run.trainer.optimizer)
    assert {piece.values.dtype for piece in (*held, *found)} == {torch.float32}
    masters = assemble(found)
    assert_same(masters, assemble(held))
    for stage in run.trainer.stages.values():
        for param in stage.parameters():
            master = masters["master", param.shard_spec.name]  # type: ignore[attr-defined]
            assert param.dtype == torch_dtype(f"torch.{loaded}") and torch.equal(param, master.to(param.dtype))
    train(run, StopSignals())
    run.reporter.close()
    rest = read_metrics(tmp_path / "second" / "metrics.jsonl")
    assert [step["loss_scale"] for step in rest] == SCALES[saved, loaded]
    if saved == loaded:
        assert curve(rest) == whole_curve[SAVED:]
    else:  # 2^-8, the rounding of bf16, in single weights; a loss is a mean
        assert [loss for loss, _ in curve(rest)] == pytest.approx([loss for loss, _ in whole_curve[SAVED:]], rel=2**-8)
