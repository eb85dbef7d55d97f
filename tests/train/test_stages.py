"""Stages change mix, lengths, rotary base and learning rate in the middle: in any layout, and after a resume on both
sides of a border in another one, as in one process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from internlm_lite.config.schema import Config, StageConfig
from internlm_lite.errors import CheckpointError
from internlm_lite.faults.signals import StopSignals
from internlm_lite.generate.load_model import load_model
from internlm_lite.layers.flash import packed
from internlm_lite.mesh.mesh import Mesh, build_mesh, single_process_mesh
from internlm_lite.monitor.flops import internlm_flops_per_token
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.train.build import build_run
from internlm_lite.train.loop import train
from internlm_lite.train.trainer import Trainer
from tests.corpus import write_corpus
from tests.steps import read_metrics
from tests.torches import HAS_ZBV
from tests.train.layouts import LIMIT, Layout, config_of
from tests.train.runs import curve
from tests.world import TIMEOUT, run_world

STEPS = 6
STAGES: list[dict[str, Any]] = [
    {"until": 2},
    {"until": 4, "seq_len": 48, "rope_base": 5e4, "lr": 5e-3},
    {"seq_len": 16, "micro_bsz": 2, "rope_base": 1e3, "weights": {"code": 2.0, "docs": 1.0}},
]
ONE = Layout()
LAYOUTS = [
    Layout(dp=2, pp=2, schedule="interleaved", chunks=2, zero1=2, bucket=1500),
    Layout(dp=2, tp=2, sp=True, split_hidden=False, zero1=1),
    Layout(pp=2, dp=2, schedule="zbv", chunks=2, bucket=1500) if HAS_ZBV else Layout(dp=2, pp=2),
]


class Part(NamedTuple):
    """A start of a run: in a layout, up to a step, with the folder of its checkpoints."""

    layout: Layout
    steps: int
    folder: str


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("stages") / "corpus")


def staged(layout: Layout, corpus: Path, stages: list[dict[str, Any]] | None = None, **changes: Any) -> Config:
    """Dropout, too, whose masks must follow the rows of another length."""
    config = config_of(
        layout,
        corpus,
        data={"total_steps": STEPS, **changes.pop("data", {})},
        ckpt=changes.pop("ckpt", {}),
        **changes,
    )
    dropped = config.model.model_copy(update={"residual_dropout": 0.1, "embedding_dropout": 0.1})
    given = [StageConfig(**stage) for stage in (STAGES if stages is None else stages)]
    curve = config.lr_scheduler.model_copy(update={"total_steps": STEPS})
    return config.model_copy(update={"stages": given, "model": dropped, "lr_scheduler": curve})


def run(mesh: Mesh, config: Config, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    built = build_run(config, mesh, folder)
    try:
        train(built, StopSignals())
    finally:
        built.checkpoints.close(wait=True)
        built.reporter.close()
    return read_metrics(folder / "metrics.jsonl") if mesh.is_main else []


def run_part(mesh: Mesh, part: Part, corpus: Path, root: Path) -> list[dict[str, Any]]:
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{root / part.folder}", "async_upload": False}
    config = staged(part.layout, corpus, ckpt=saves)
    data = config.data.model_copy(update={"total_steps": part.steps})
    return run(mesh, config.model_copy(update={"data": data}), root / f"{part.folder}-run")


def run_parts(world: Mesh, parts: list[Part], corpus: Path, root: Path) -> list[list[dict[str, Any]]]:
    logging.disable(logging.WARNING)
    meshes = {layout.sizes: build_mesh(layout.sizes, world.rank, world.device, TIMEOUT) for layout in LAYOUTS}
    return [run_part(meshes[part.layout.sizes], part, corpus, root) for part in parts]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_part(single_process_mesh(), Part(ONE, STEPS, "alone"), corpus, tmp_path_factory.mktemp("alone"))


def test_layouts_and_resumes_across_borders_equal_one_process(
    corpus: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Every border is resumed before, at and after, in another layout; in the same layout bits are the same."""
    first, second, third = LAYOUTS
    whole = [Part(layout, STEPS, f"whole {i}") for i, layout in enumerate(LAYOUTS)]
    other, same = [], []
    for stop, before, after in ((1, first, second), (2, second, third), (3, third, first), (4, first, second)):
        other += [Part(before, stop, f"other {stop}"), Part(after, STEPS, f"other {stop}")]
    for stop in (2, 3):
        same += [Part(second, stop, f"same {stop}"), Part(second, STEPS, f"same {stop}")]
    found = run_world(run_parts, 4, (parts := [*whole, *other, *same], corpus, tmp_path), timeout_seconds=500)[0]
    expected = curve(alone)
    for part, metrics in zip(parts, found, strict=True):
        tokens = [step["num_consumed_tokens"] for step in metrics]
        assert tokens == [step["num_consumed_tokens"] for step in alone][: len(tokens)], part
        for ours, theirs in zip(curve(metrics), expected, strict=False):
            assert ours == pytest.approx(theirs, rel=LIMIT), part
    for metrics in found[len(whole) + len(other) + 1 :: 2]:
        assert curve(metrics) == curve(found[1])
    assert len({len(metrics) for metrics in found[:3]}) == 1 and len(found[0]) == STEPS


def test_one_process_resumes_to_the_bit(corpus: Path, alone: list[dict[str, Any]], tmp_path: Path) -> None:
    for stop in (2, 3):
        parts = [Part(ONE, steps, f"same {stop}") for steps in (stop, STEPS)]
        metrics = [run_part(single_process_mesh(), part, corpus, tmp_path) for part in parts]
        assert curve(metrics[1]) == curve(alone)


def test_what_is_told_of_a_stage(corpus: Path, tmp_path: Path) -> None:
    """An event at each border; a line does not mix stages, and its figures are by the stage's length at once."""
    config = staged(ONE, corpus, monitor={"log_every": 5})
    built = build_run(config, single_process_mesh(), tmp_path)
    try:
        train(built, StopSignals())
    finally:
        built.reporter.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 4, 5]
    events = [event for event in read_objects(tmp_path / "events.jsonl") if event["event"] == "stage"]
    assert [(event["step"], event["stage"]) for event in events] == [(2, 1), (4, 2)]
    assert events[0]["changed"] == {"seq_len": 48, "rope_base": 5e4, "lr": 5e-3}
    assert events[1]["changed"]["weights"] == {"code": 2.0, "docs": 1.0} and events[1]["micro_bsz"] == 2
    assert [line["stage"] for line in lines] == [0, 1, 2, 2]
    assert [line["num_consumed_tokens"] for line in lines] == [256, 640, 768, 896]
    for line, length in zip(lines, (32, 48, 16, 16), strict=True):
        per_token = internlm_flops_per_token(config.model, length)
        assert line["tflops"] * 1e12 / line["last_tgs_1"] == pytest.approx(per_token, rel=0.01)


def test_the_peak_learning_rate_is_that_of_the_stage(corpus: Path, tmp_path: Path) -> None:
    """The warm-up and decay of the whole run, at another height; groups keep their ratio to adam.lr."""
    flat = {"total_steps": STEPS, "warmup_ratio": 0.0, "eta_min": 0.0}
    stages = [{"until": 3}, {"lr": 2e-3}]
    rates = []
    for given in (stages, []):
        config = staged(ONE, corpus, given).model_copy(
            update={"lr_scheduler": type(staged(ONE, corpus).lr_scheduler).model_validate(flat)}
        )
        built = build_run(config, single_process_mesh(), tmp_path / str(len(given)))
        updates = built.trainer.optimizer._updates
        rates.append([updates.rates.after(torch.tensor(step))[0].item() for step in range(STEPS)])
        built.reporter.close()
    with_stages, without = rates
    assert with_stages[:3] == without[:3]
    assert with_stages[3:] == pytest.approx([rate * 2e-3 / 1e-2 for rate in without[3:]], rel=1e-12)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}])
def test_a_new_base_at_the_same_length_is_a_fresh_model(corpus: Path, scaling: dict[str, Any] | None) -> None:
    """Cosines kept by shape, or a length kept from before, would leave the old rotation."""
    config = staged(ONE, corpus, [{"until": 1}, {"rope_base": 7e5}])
    if scaling is not None:
        shape = config.model.model_validate({**config.model.model_dump(), "rope_scaling": scaling})
        config = config.model_copy(update={"model": shape})
    mesh = single_process_mesh()
    entered = Trainer(config, mesh)
    fresh = Trainer(config.model_copy(update={"model": config.model.model_copy(update={"rope_base": 7e5})}), mesh)
    tokens, positions = torch.arange(32) % 96, torch.arange(32)

    def logits(trainer: Trainer) -> torch.Tensor:
        model = trainer.stages[0]
        attend = packed(model.backend, torch.tensor([0, 32]), (0, 32), 32)
        with torch.no_grad():
            return model.logits(model.hidden(tokens, positions, attend))

    before = logits(entered)
    entered.enter_stage(1)
    assert torch.equal(logits(entered), logits(fresh)) and not torch.equal(before, logits(fresh))
    entered.enter_stage(0)
    assert torch.equal(logits(entered), before)


def test_a_checkpoint_is_read_with_the_values_of_its_stage(corpus: Path, tmp_path: Path) -> None:
    run_part(single_process_mesh(), Part(ONE, 3, "saved"), corpus, tmp_path)
    model, config = load_model(f"local:{tmp_path / 'saved'}", single_process_mesh())
    assert (config.model.rope_base, config.data.seq_len, config.stages) == (5e4, 48, [])
    assert model.any_stage.config.rope_base == 5e4


CHANGES = [
    pytest.param([*STAGES[:2], {"seq_len": 24}], "", id="later stage"),
    pytest.param([{"until": 2}, {**STAGES[1], "until": 5}, STAGES[2]], "", id="later border"),
    pytest.param([{"until": 1}, *STAGES[1:]], "seq_len: 32 then, 48 now from batch 1 on", id="border moved back"),
    pytest.param([{"until": 2, "seq_len": 16}, *STAGES[1:]], "seq_len: 32 then, 16 now", id="past length"),
    pytest.param([{"until": 2}, {**STAGES[1], "rope_base": 1e4}, STAGES[2]], "rope_base: 50000.0 then", id="past base"),
    pytest.param([], "rope_base: 50000.0 then, None now from batch 2 on", id="no stages"),
]


@pytest.mark.parametrize(("stages", "refused"), CHANGES)
def test_stages_ahead_may_change_and_those_behind_may_not(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stages: list[dict[str, Any]], refused: str
) -> None:
    run_part(single_process_mesh(), Part(ONE, 3, "saved"), corpus, tmp_path)
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path / 'saved'}", "async_upload": False}
    config = staged(ONE, corpus, stages, ckpt=saves)
    if refused:
        with pytest.raises(CheckpointError, match=refused):
            run(single_process_mesh(), config, tmp_path / "again")
        return
    with caplog.at_level(logging.WARNING, logger="internlm_lite"):
        run(single_process_mesh(), config, tmp_path / "again")
    assert sum("the stages after batch 3 are not those of" in record.getMessage() for record in caplog.records) == 1


def test_a_run_without_stages_goes_on_with_some(corpus: Path, tmp_path: Path) -> None:
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path / 'saved'}", "async_upload": False}
    plain = staged(ONE, corpus, [], ckpt=saves)
    run(
        single_process_mesh(),
        plain.model_copy(update={"data": plain.data.model_copy(update={"total_steps": 2})}),
        tmp_path / "first",
    )
    metrics = run(single_process_mesh(), staged(ONE, corpus, ckpt=saves), tmp_path / "first")
    whole = run(single_process_mesh(), staged(ONE, corpus), tmp_path / "whole")
    assert curve(metrics) == curve(whole)


@pytest.mark.slow
def test_compiled_steps_follow_the_rows_of_a_stage(corpus: Path, tmp_path: Path) -> None:
    """A graph of each length, and the same losses as without a compiler."""
    curves = []
    for compiled in (False, True):
        config = staged(ONE, corpus, [STAGES[0], {"seq_len": 48, "rope_base": 5e4}])
        changes = {"compile": compiled, "dtype": "torch.float32", "num_layers": 1, "residual_dropout": 0.0}
        shape = config.model.model_copy(update={**changes, "embedding_dropout": 0.0})
        curves.append(
            curve(run(single_process_mesh(), config.model_copy(update={"model": shape}), tmp_path / str(compiled)))
        )
    for eager, fast in zip(*curves, strict=True):
        assert fast == pytest.approx(eager, rel=1e-4)
