"""The real training step at the true 20B layout, on the meta device and a fake process group: one rank of 16, alone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import stage as torch_stage
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.testing._internal.distributed.fake_pg import FakeStore

from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.memory import row_shape
from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.apps.planner.report import RankPlan
from internlm_lite.apps.planner.traffic import messages
from internlm_lite.config.load import load_config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import build_mesh, sizes_of
from internlm_lite.optim.rules import AdamW
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.counting import Calls, expected, sent
from tests.apps.planner.steps import random_batch, run_step

WORLD = 16
CONFIG = Path(__file__).parents[3] / "configs" / "20B_sft.py"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp 4, dp 4": (0, []),
    "sp 4, zero 2 of dp 4, recomputed": (
        5,
        ["parallel.sequence_parallel=True", "parallel.zero1=2", "model.checkpoint=0.5"],
    ),
    "tp 4, pp 2, last stage": (15, ["parallel.pipeline.size=2", "parallel.sequence_parallel=True"]),
}
"""(rank, overrides) by name."""


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Iterator[tuple[int, list[str]]]:
    rank, overrides = LAYOUTS[request.param]
    dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=WORLD, store=FakeStore())
    yield rank, overrides
    dist.destroy_process_group()


def test_a_20b_step_holds_and_sends_what_is_planned(layout: tuple[int, list[str]], monkeypatch: Any) -> None:
    rank, overrides = layout
    config = load_config(CONFIG, overrides).config
    parallel = config.parallel
    sizes = sizes_of(WORLD, parallel.tensor, parallel.pipeline.size, parallel.zero1)
    mesh = build_mesh(sizes, rank, torch.device("meta"), timedelta(seconds=60))
    trainer = Trainer(config, mesh)
    # The fused kernel knows no meta tensors; what it computes sends nothing.
    monkeypatch.setattr(AdamW, "_update", lambda *_: None)
    monkeypatch.setattr(_PipelineSchedule, "_warmup_p2p", agree_without_words, raising=False)
    monkeypatch.setattr(torch_stage._PipelineStageBase, "_get_init_p2p_neighbors_ops", lambda _: [], raising=False)
    with Calls(mesh) as calls:
        run_step(trainer, random_batch(config, mesh))
    held, _ = holdings(config, sizes, AttentionBackend.SDPA)
    own = held[mesh.pp.rank]
    # The chunks of the loss on the meta device are those of the CPU.
    planned = messages(row_shape(config, AttentionBackend.SDPA, "cpu"), sizes, own, config.data.micro_num)
    of_axis = {axis: mesh.axis(axis).size for axis in ("dp", "tp", "pp", "zero", "replica", "ends")} | {"world": WORLD}
    assert calls.counted == expected(planned, of_axis)
    totals = sent(calls.counted, of_axis)
    for device in ("cpu", "cuda"):  # fewer and larger messages on a GPU, the same bytes
        plan = make_plan(config, WORLD, None, device).ranks[rank]
        assert plan.rank == rank
        assert {axis: round(totals.get(axis, 0)) for axis in plan.traffic_bytes} == plan.traffic_bytes
        assert plan.traffic_bytes["tp"] > 10**10 and plan.traffic_bytes["zero"] > 10**9
        check_storages(trainer, plan)


def agree_without_words(schedule: Any, stages: list[Any], has_backward: bool, done: bool) -> None:
    """torch 2.13's greeting reads the neighbours' votes back; a tensor on the meta device holds nothing to read."""
    for stage in stages:
        stage._inference_mode = torch_stage.InferenceMode.STATIC


def check_storages(trainer: Trainer, plan: RankPlan) -> None:
    """Weights, gradients and optimizer state of the real optimizer, against the plan."""
    optimizer = trainer.optimizer
    assert plan.bytes.weights == sum(bucket.weights.nbytes for bucket in optimizer.buckets)
    assert plan.bytes.gradients == sum(bucket.grads.nbytes for bucket in optimizer.buckets)
    assert plan.zero_elements == optimizer.elements_on_zero_ranks()[trainer.mesh.zero.rank]
    assert plan.parameters == sum(param.numel() for stage in trainer.stages.values() for param in stage.parameters())
    assert plan.bytes.optimizer == sum(tensor.nbytes for _, state in optimizer.shards() for tensor in state.values())
