"""What the planner says of Muon, against the rule itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm_lite.apps.planner.components import components_of
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group, Mesh, Sizes, sizes_of
from internlm_lite.models.stages import meta_model
from internlm_lite.optim.muon import matrix_shapes
from internlm_lite.optim.newton_schulz import iteration_flops
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.steps import random_batch, run_step, small
from tests.world import run_world

MUON = {"optimizer": {"name": "muon"}, "model": {"num_attention_heads": 8, "num_kv_attention_heads": 4}}


def _exchanged(mesh: Mesh, config: Config) -> int:
    """Bytes that this rank sends to others for whole parameters in a step."""
    total, call = 0, comm.all_to_all

    def counting(received: torch.Tensor, sent: torch.Tensor, group: Group, counts: Any = None) -> comm.Work:
        nonlocal total
        if counts is not None:
            total += sum(n for rank, n in enumerate(counts[1]) if rank != group.rank) * sent.itemsize
        return call(received, sent, group, counts)

    comm.all_to_all = counting  # in this rank's own process
    run_step(Trainer(config, mesh), random_batch(config, mesh), 0)
    return total


def _planned(config: Config) -> int:
    """Bytes that all ranks send over `tp` in a step."""
    return sum(rank.traffic_bytes["tp"] for rank in make_plan(config, 4, None, "cpu").ranks)


def test_what_is_exchanged_for_whole_matrices_is_planned() -> None:
    """Parts go to who iterates, and parts of the result come back."""
    config = small(parallel={"tensor": 4}, **MUON)
    found = run_world(_exchanged, 4, (config,), tensor=4)
    plain = Config.model_validate({**config.model_dump(), "optimizer": {"name": "adamw"}})
    assert sum(found) == _planned(config) - _planned(plain) > 0


@pytest.mark.parametrize("sizes", [Sizes(), sizes_of(8, 2, 1, -1)], ids=["one process", "zero 4, tp 2"])
def test_state_and_operations(sizes: Sizes) -> None:
    """One state tensor of matrices, two of the others; the operations of the iteration, which ranks share evenly."""
    config = small(parallel={"tensor": sizes.tp}, **MUON)
    params = list(meta_model(config.model).parameters())
    matrices = [param for param in params if param.matrix_rows is not None]  # type: ignore[attr-defined]
    flops = sum(iteration_flops(*shape, 5) for param in matrices for shape in matrix_shapes(param))  # type: ignore[arg-type]
    ((held,), _) = holdings(config, sizes, AttentionBackend.SDPA)
    by_rank = [sum(column) for column in zip(*(bucket.product_flops for bucket in held.buckets), strict=True)]
    assert sum(by_rank) == flops and max(by_rank) <= 2 * flops / sizes.zero
    found = components_of(config, [8])
    n_matrices, n_others = (sum(param.numel() for param in some) for some in (matrices, set(params) - set(matrices)))
    assert sum(group.state for group in found.groups) == pytest.approx((n_matrices + 2 * n_others) * 4, rel=0.01)
    assert found.update_flops is not None and found.update_flops > flops
