"""DeepSpeed as an engine: the same curve as ours, and a run that moves between the engines.

Worlds import DeepSpeed (seconds), so all comparisons of one kind share one.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from internlm_lite.config.cross import cross_problems
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError, MissingPackageError
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.deepspeed_engine import DeepSpeedOptimizer
from internlm_lite.optim.deepspeed_settings import require_deepspeed
from internlm_lite.train.build import Run, build_run
from internlm_lite.train.loop import train
from tests.steps import read_metrics
from tests.train.runs import tiny
from tests.world import run_world

STEPS = 6
Curve = list[tuple[float, float]]
State = dict[tuple[str, str], torch.Tensor]


def engine(stage: int, offload: str = "none", **others: Any) -> dict[str, Any]:
    return {"name": "deepspeed", "stage": stage, "offload": offload, **others}


NATIVE: dict[str, Any] = {"name": "native"}
ENGINES = {
    "ours": NATIVE,
    "1": engine(1),
    "2": engine(2),
    "3": engine(3),
    "1 cpu": engine(1, "cpu"),
    "2 cpu": engine(2, "cpu"),
    "3 cpu": engine(3, "cpu"),
}


def config_of(chosen: dict[str, Any], ckpt: dict[str, Any] | None = None, **model: Any) -> Config:
    """Two micro-batches a step, several groups of parameters, a gradient that is clipped."""
    groups = [{"pattern": "*norm*", "lr": 3e-3, "betas": [0.8, 0.9]}]
    return tiny(
        None,
        engine=chosen,
        ckpt=ckpt or {},
        optimizer={"groups": groups},
        data={"total_steps": STEPS, "micro_num": 2, "valid_every": 3, "valid_batches": 1},
        lr_scheduler={"total_steps": STEPS},
        model={"dtype": "torch.float32", **model},
    )


def whole_state(run: Run) -> State:
    """Every tensor of the checkpoint, put together from the pieces of all ranks."""
    found: State = {}
    mine = [(p.name, p.role, p.shape, p.flat_range, p.tensor.detach().clone()) for p in run.trainer.optimizer.pieces()]
    for pieces in comm.gather_objects(mine, run.mesh.world):
        for name, role, shape, span, values in pieces:
            whole = found.setdefault((name, role), torch.full(shape, torch.nan))
            start, stop = span or (0, whole.numel())
            whole.view(-1)[start:stop] = values.view(-1)
    assert not any(tensor.isnan().any() for tensor in found.values()), "pieces leave gaps"
    return found


def go_on(mesh: Mesh, config: Config, folder: Path, resume: str = "none") -> tuple[Curve, State, State]:
    """(curve, state before the first step, state at the end)"""
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(config, mesh, folder, resume)
    before = whole_state(run)
    try:
        train(run, StopSignals())
    finally:
        run.checkpoints.close(wait=True)
        run.reporter.close()
    steps = read_metrics(folder / "metrics.jsonl") if mesh.is_main else []
    return [(step["loss"], step["grad_norm"]["0_default"]) for step in steps], before, whole_state(run)


def compared(mesh: Mesh, engines: dict[str, dict[str, Any]], folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    return {
        name: go_on(mesh, config_of(chosen, **model), folder / name.replace(" ", "-"))
        for name, chosen in engines.items()
    }


def furthest(found: Curve, expected: Curve) -> float:
    """Largest relative difference of losses and norms."""
    assert len(found) == len(expected) > 0
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def largest_difference(found: State, expected: State, role: str) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in found if key[1] == role)


def test_all_stages_and_offload_to_the_host_agree_with_ours(tmp_path: Path) -> None:
    """Six updates on two ranks: weights drawn to the same bits, loss and norm within 1e-6.

    Blocks call methods of layers besides `forward`, before which stage 3 gathers nothing, so a block is gathered as a
    whole; a tied head reads the weight of another module; nothing frees the embedding's weight, whose input needs no
    gradient.
    """
    model = {"tie_word_embeddings": True, "checkpoint": 0.5, "residual_dropout": 0.1}
    results = run_world(compared, 2, (ENGINES, tmp_path, model), timeout_seconds=500)[0]
    curve, drawn, trained = results["ours"]
    for name, (theirs, before, after) in results.items():
        assert all(torch.equal(before[key], drawn[key]) for key in drawn), name
        assert furthest(theirs, curve) < 1e-6, name
        assert largest_difference(after, trained, "master") < 1e-5, name  # of weights up to 1, by updates of 1e-2


def test_half_precision_adds_gradients_in_fp32(tmp_path: Path) -> None:
    """Stage 1 of a bf16 model is another class of DeepSpeed's."""
    some = {name: ENGINES[name] for name in ("ours", "1", "2", "3", "1 cpu")}
    results = run_world(compared, 2, (some, tmp_path, {"dtype": "torch.bfloat16"}), timeout_seconds=500)[0]
    curve, *_ = results["ours"]
    for name, (theirs, *_) in results.items():
        assert furthest(theirs, curve) < 2e-3, name
        assert theirs == results["1"][0] or name == "ours" or furthest(theirs, results["1"][0]) < 1e-6, name


def freed(mesh: Mesh, folder: Path) -> tuple[int, int]:
    """(weights at hand after a step of stage 3, of how many)"""
    logging.disable(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(config_of(ENGINES["3"]), mesh, folder, "none")
    train(run, StopSignals())
    optimizer = run.trainer.optimizer
    assert isinstance(optimizer, DeepSpeedOptimizer)
    params = list(optimizer._root.parameters())
    return sum(param.numel() for param in params), len(params)


def test_stage_3_frees_all_weights_after_a_step(tmp_path: Path) -> None:
    """Also those of modules whose input needs no gradient, or whose outputs are no plain tuples."""
    assert [left for left, _ in run_world(freed, 2, (tmp_path,), timeout_seconds=300)] == [0, 0]


MOVES = [("3", "ours"), ("ours", "2"), ("1 cpu", "3")]
if os.environ.get("DEEPSPEED_MOVES") == "all":
    MOVES += [(first, second) for first in ENGINES for second in ENGINES if first != second]


def moved(mesh: Mesh, folder: Path) -> list[tuple[str, str, Curve, Curve, bool]]:
    """Half of a run with one engine, the rest with another: (first, second, curve, curve of the first alone, whether
    the state that the second began with is that of the checkpoint to the bit)"""
    logging.disable(logging.WARNING)
    found = []
    for number, (first, second) in enumerate(MOVES):
        saves = {
            "enable_save_ckpt": True,
            "save_ckpt_folder": str(folder / f"{number}-saves"),
            "checkpoint_every": 3,
            "async_upload": False,
        }
        alone, *_ = go_on(mesh, config_of(ENGINES[first], saves), folder / f"{number}-first")
        same, saved, _ = go_on(mesh, config_of(ENGINES[first], saves), folder / f"{number}-same", "3")
        curve, loaded, _ = go_on(mesh, config_of(ENGINES[second], saves), folder / f"{number}-second", "3")
        if mesh.is_main:
            assert same == alone[3:], f"{first}: a resumed run has other bits"
        equal = all(torch.equal(saved[key], loaded[key]) for key in saved) and saved.keys() == loaded.keys()
        found.append((first, second, curve, alone, equal))
    return found


def test_a_run_moves_between_the_engines(tmp_path: Path) -> None:
    """Checkpoints know nothing of DeepSpeed's shards: what another engine, stage or number of ranks loads is equal to
    the bit, and losses go on. With the same engine the resumed run has the same bits."""
    for first, second, curve, alone, equal in run_world(moved, 2, (tmp_path,), timeout_seconds=800)[0]:
        assert equal, (first, second)
        assert furthest(curve, alone[3:]) < 1e-6, (first, second)


def resumed_alone(mesh: Mesh, saves: dict[str, Any], folder: Path, chosen: str) -> tuple[Curve, State, State]:
    logging.disable(logging.WARNING)
    return go_on(mesh, config_of(ENGINES[chosen], {**saves, "enable_save_ckpt": False}), folder / chosen, "3")


def saved_by_two(mesh: Mesh, saves: dict[str, Any], folder: Path) -> tuple[Curve, State, State]:
    logging.disable(logging.WARNING)
    go_on(mesh, config_of(ENGINES["3"], saves), folder / "two")
    return go_on(mesh, config_of(ENGINES["3"], {**saves, "enable_save_ckpt": False}), folder / "again", "3")


def test_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    """DeepSpeed's own checkpoints are tied to the number of ranks."""
    folder = str(tmp_path / "saves")
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": folder, "checkpoint_every": 3, "async_upload": False}
    _, saved, _ = run_world(saved_by_two, 2, (saves, tmp_path), timeout_seconds=300)[0]
    for name in ("3", "1"):
        _, loaded, _ = run_world(resumed_alone, 1, (saves, tmp_path, name), timeout_seconds=300)[0]
        assert all(torch.equal(saved[key], loaded[key]) for key in saved), name


def skipping(mesh: Mesh, folder: Path) -> list[tuple[int, bool]]:
    """For each stage: (updates skipped, whether a skipped one left weights and state as they were)"""
    logging.disable(logging.WARNING)
    found = []
    for name in ("1", "2", "3", "3 cpu"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        run = build_run(config_of(ENGINES[name]), mesh, folder / name, "none")
        batches: Iterator[Any] = run.data.batches(run.start.position)
        first, second = (next(batches) for _ in range(2))
        run.trainer.step(first, 0)
        before = whole_state(run)
        if mesh.rank == 1:  # on one rank alone
            for unit in run.trainer.stages[0].units():
                unit.register_full_backward_pre_hook(lambda _, grads: tuple(grad * torch.inf for grad in grads))
                break
        outcome = run.trainer.step(second, 1)
        after = whole_state(run)
        found.append((int(outcome.skips.skipped_steps), all(torch.equal(before[key], after[key]) for key in before)))
    return found


def test_an_overflow_on_one_rank_skips_the_update_on_all(tmp_path: Path) -> None:
    assert run_world(skipping, 2, (tmp_path,), timeout_seconds=300)[0] == [(1, True)] * 4


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"tensor": 2}}, "parallel.tensor: found 2 .* expected 1, because it splits no layers"),
        (
            {"parallel": {"pipeline": {"size": 2}}},
            "parallel.pipeline.size: found 2 .* expected 1, because its pipeline",
        ),
        ({"parallel": {"zero1": 2}}, "parallel.zero1: found 2 .* expected -1, because it shards over all"),
        ({"ema": {}}, "ema: found dict.* expected None, because its optimizer keeps no average"),
        ({"optimizer": {"name": "muon"}}, "optimizer.name: found .muon. .* expected .adamw."),
        ({"optimizer": {"moments": "bf16"}}, "optimizer.moments: found .bf16. .* expected .fp32."),
        ({"model": {"dtype": "torch.float16"}, "grad_scaler": {}}, "model.dtype: .* second one beside grad_scaler"),
        ({"model": {"dtype": "torch.float64"}}, "model.dtype: .* because its master weights are fp32"),
        ({"model": {"dtype": "torch.bfloat16", "use_fp32_norm": True}}, "model.use_fp32_norm: found True"),
        ({"hybrid_zero_optimizer": {"grad_dtype": "torch.bfloat16"}}, "hybrid_zero_optimizer.grad_dtype: found"),
        ({"engine": {"offload": "nvme", "nvme_path": "x"}}, 'engine.offload: found "nvme" with engine.stage 1'),
        ({"engine": {"stage": 3, "offload": "nvme"}}, 'engine.offload: found "nvme" without engine.nvme_path'),
        ({"engine": {"nvme_path": "x"}}, "engine.nvme_path: found .x. with engine.offload .none."),
        ({"engine": {"name": "native", "stage": 2}}, 'engine.stage: found 2 with engine.name "native"'),
        ({"engine": {"name": "native", "offload": "cpu"}}, 'engine.offload: found .cpu. with engine.name "native"'),
        (
            {"engine": {"stage": 3}, "monitor": {"sample_prompts": ["a"]}, "data": {"tokenizer": "t.model"}},
            "monitor.sample_prompts: .* engine.stage 3: ranks that generate or score alone",
        ),
    ],
)
def test_what_it_cannot_serve_is_refused(sections: dict[str, Any], words: str) -> None:
    values = config_of(engine(1)).model_dump()
    for section, changes in sections.items():
        values[section] = {**(values[section] or {}), **changes}
    lines = [f"{problem.keys[0]}: {problem.text}" for problem in cross_problems(Config.model_validate(values), None)]
    assert len(lines) == 1, lines
    with pytest.raises(ConfigError, match=words):
        raise ConfigError(lines[0])


def test_a_missing_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm_lite.optim.deepspeed_settings.find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"is not installed: .*pip install internlm_lite\[deepspeed\]"):
        require_deepspeed(config_of(engine(1)), torch.device("cpu"))
    require_deepspeed(config_of(NATIVE), torch.device("cpu"))


def test_an_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm_lite.optim.deepspeed_settings.version", lambda _: "0.14.5")
    with pytest.raises(MissingPackageError, match=r"found deepspeed 0\.14\.5, expected 0\.19 or newer: "):
        require_deepspeed(config_of(engine(1)), torch.device("cpu"))


class _DoesNotLoad(MetaPathFinder, Loader):
    """A finder of a deepspeed whose import fails."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "deepspeed" else None

    def exec_module(self, module: ModuleType) -> None:
        raise RuntimeError("CUDA_HOME does not exist\nunable to compile")


def test_a_package_that_does_not_load_is_named_before_there_are_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_DoesNotLoad(), *sys.meta_path])
    with pytest.raises(
        MissingPackageError, match=r"does not load: RuntimeError: CUDA_HOME does not exist; DS_BUILD_OPS"
    ):
        require_deepspeed(config_of(engine(1)), torch.device("cpu"))


def test_overlap_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"engine.overlap: found True on a CPU, .* set it to False"):
        require_deepspeed(config_of(engine(1, overlap=True)), torch.device("cpu"))
