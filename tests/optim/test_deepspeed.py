"""DeepSpeed as an engine: the same curve as ours. Runs that move between the engines: tests/train/test_zero_reshard.py.

Worlds import DeepSpeed (seconds), so all comparisons of one kind share one.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root

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


def config_of(chosen: dict[str, Any], ckpt: dict[str, Any] | None = None, rate: float = 1e-2, **model: Any) -> Config:
    """Two micro-batches a step, several groups of parameters, a gradient that is clipped."""
    groups = [{"pattern": "*norm*", "lr": 0.3 * rate, "betas": [0.8, 0.9]}]
    return tiny(
        None,
        engine=chosen,
        ckpt=ckpt or {},
        adam={"lr": rate},
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


FILES: dict[str, Any] = {"hidden_size": 128, "vocab_size": 4096, "rate": 1e-3}
"""Of a model whose largest parts, and some gradients, are worth a file: a megabyte on each of two ranks."""
SAVED = 3
"""Steps done when a run saves."""


def in_files(mesh: Mesh, folder: Path) -> list[tuple[Curve, State, State]]:
    """What `go_on` returns of runs in memory, with files and with ours, and of those that go on from a checkpoint of
    the last two: files' by files, files' by ours, ours by ours, ours by files."""
    logging.disable(logging.WARNING)
    engines = {"files": engine(3, "nvme", nvme_path=str(folder / "disk")), "ours": NATIVE}
    whole, resumed = [go_on(mesh, config_of(ENGINES["3"], **FILES), folder / "memory")], []
    for first, others in (("files", ("files", "ours")), ("ours", ("ours", "files"))):
        saves = {"save_ckpt_folder": str(folder / first / "saves"), "checkpoint_every": SAVED, "async_upload": False}
        config = config_of(engines[first], {"enable_save_ckpt": True, **saves}, **FILES)
        whole.append(go_on(mesh, config, folder / first))
        for second in others:
            config = config_of(engines[second], {"enable_save_ckpt": False, **saves}, **FILES)
            resumed.append(go_on(mesh, config, folder / f"{first}-{second}", str(SAVED)))
    return [*whole, *resumed]


def compiled() -> bool:
    """Whether a run has compiled DeepSpeed's library of asynchronous files on this machine."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())
    return any(Path(folder).glob("**/async_io/async_io.so"))


@pytest.mark.nvme
@pytest.mark.skipif(not compiled(), reason="needs DeepSpeed's async_io, compiled: docs/limits.md says how")
def test_offload_to_files_agrees_with_ours_and_resumes(tmp_path: Path) -> None:
    memory, files, ours, *resumed = run_world(in_files, 2, (tmp_path,), timeout_seconds=500)[0]
    assert len(list((tmp_path / "disk").glob("**/rank*/*.swp"))) >= 2 * 3, "weights and moments of two ranks"
    assert all(torch.equal(files[1][key], ours[1][key]) for key in ours[1])
    assert all(torch.equal(files[2][key], memory[2][key]) for key in memory[2])
    assert furthest(files[0], ours[0]) < 1e-6
    assert largest_difference(files[2], ours[2], "master") < 1e-5
    for first, second, whole in ((resumed[0], resumed[1], files), (resumed[2], resumed[3], ours)):
        assert first[0] == whole[0][SAVED:]
        assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
        assert furthest(second[0], whole[0][SAVED:]) < 1e-6


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
        ({"model": {"num_encoder_layers": 1}}, "model.num_encoder_layers: found 1 .* expected 0, because its curve"),
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


def with_files(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., object], *, linked: bool, installed: bool = False
) -> None:
    """DeepSpeed's builder of asynchronous files: what its `load` does, whether its probe of a compiler finds libaio,
    and whether DeepSpeed was installed with the library compiled."""
    builder = SimpleNamespace(name="async_io", load=load, is_compatible=lambda verbose: linked)
    modules = {
        "deepspeed.ops.op_builder": SimpleNamespace(AsyncIOBuilder=lambda: builder),
        "deepspeed.git_version_info": SimpleNamespace(installed_ops={"async_io": installed}),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, cast(ModuleType, module))
    monkeypatch.setattr("internlm_lite.optim.deepspeed_settings.import_deepspeed", lambda _: None)


def failing(verbose: bool) -> None:
    raise RuntimeError("Error building extension 'async_io': [1/1] c++\nmore lines")


def test_asynchronous_files_are_asked_for_where_they_are_used_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_files(monkeypatch, failing, linked=False)
    for chosen in ENGINES.values():
        require_deepspeed(config_of(chosen), torch.device("cpu"))


@pytest.mark.parametrize(
    ("linked", "reason"), [(False, "found no libaio"), (True, "Error building extension 'async_io': [1/1] c++")]
)
def test_missing_asynchronous_files_are_one_line(linked: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_files(monkeypatch, failing, linked=linked)
    with pytest.raises(MissingPackageError) as raised:
        require_deepspeed(config_of(engine(3, "nvme", nvme_path="x")), torch.device("cpu"))
    assert f"{reason}: apt-get install libaio-dev g++" in str(raised.value) and "\n" not in str(raised.value)


def test_a_probe_that_finds_no_compiler_refuses_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed installed with its operations needs none."""
    with_files(monkeypatch, lambda verbose: None, linked=False, installed=True)
    require_deepspeed(config_of(engine(3, "nvme", nvme_path=str(tmp_path / "new"))), torch.device("cpu"))
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"engine.nvme_path: .* cannot be made: .*; expected a folder"):
        require_deepspeed(config_of(engine(3, "nvme", nvme_path=str(tmp_path / "file"))), torch.device("cpu"))
