"""Memory of ZeRO stages 2 and 3 on four ranks, storage by storage, beside the plan.

By default of a small model; ZERO_MEMORY=1: of one of 100M parameters, some minutes."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh, sizes_of
from internlm_lite.optim.buckets import Bucket
from internlm_lite.train.trainer import Trainer
from tests.apps.planner.live import Live
from tests.apps.planner.steps import random_batch, run_step, small
from tests.world import run_world

RANKS = 4
LARGE = "ZERO_MEMORY" in os.environ
SHAPE = {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "multiple_of": 256}
SMALL = {"hidden_size": 256, "num_layers": 4, "multiple_of": 64}
VOCABULARIES = {"head smaller than a block": 9216 if LARGE else 2560, "larger": 16_000 if LARGE else 6144}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "2": (2, "head smaller than a block", {}),
    "2, larger head": (2, "larger", {}),
    "3": (3, "head smaller than a block", {}),
    "3, larger head": (3, "larger", {}),
    "3, tied, larger head": (3, "larger", {"tie_word_embeddings": True, "embed_split_hidden": False}),
    "3, fp32": (3, "head smaller than a block", {"dtype": "torch.float32"}),
}
"""(stage, vocabulary, keys of `model`)"""


class Measured(NamedTuple):
    lasting: int
    """Bytes of weights, gradients and optimizer state between steps."""
    whole: int
    """Of whole weights and gradients, at their peak in a step."""
    peak: int
    """Of everything in a step."""


def config_of(case: str) -> Config:
    stage, vocabulary, keys = CASES[case]
    model = {**(SHAPE if LARGE else SMALL), "vocab_size": VOCABULARIES[vocabulary], "dtype": "torch.bfloat16", **keys}
    data = {"seq_len": 8, "micro_bsz": 1, "micro_num": 3}
    zero = {"reduce_bucket_size": 2**30}
    return small(model=model, data=data, parallel={"zero_stage": stage}, hybrid_zero_optimizer=zero)


def scattered_as_on_a_gpu(shard: torch.Tensor, full: torch.Tensor, group: Any) -> comm.Work:
    """gloo's own, which needs no memory of torch besides, as NCCL's."""
    return comm._start(dist.reduce_scatter_tensor, group, shard, full)


def measured(mesh: Mesh, config: Config) -> Measured:
    trainer = Trainer(config, mesh)
    optimizer, batch = trainer.optimizer, random_batch(config, mesh)
    run_step(trainer, batch)
    buckets: list[Bucket] = optimizer.buckets
    state = [tensor for _, tensors in optimizer.shards() for tensor in tensors.values()]
    known = [*state, *(flat for b in buckets for flat in (b.weights, b.grads, b.grad_shard))]
    sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in known}
    passing = [b.grads for b in buckets] + [b.weights for b in buckets if b.stage == 3]

    most = 0

    def whole() -> int:
        nonlocal most
        parts = [one.part for one in optimizer._reducer._rounds if one.part is not buckets[one.bucket].grad_shard]
        now = sum(flat.untyped_storage().nbytes() for flat in passing)
        most = max(most, now + sum(part.nbytes for part in parts))
        return now

    with Live(known, whole) as live:
        run_step(trainer, batch, 1)
    lasting = sum(sizes.values())
    return Measured(lasting, most, lasting + live.most)


def all_cases(mesh: Mesh) -> dict[str, Measured]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "reduce_scatter", scattered_as_on_a_gpu)
        return {case: measured(mesh, config_of(case)) for case in CASES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Measured]]:
    return run_world(all_cases, RANKS, timeout_seconds=1800)


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_what_is_planned(ranks: list[dict[str, Measured]], case: str) -> None:
    for plan, by_case in zip(make_plan(config_of(case), RANKS, None, "cpu").ranks, ranks, strict=True):
        found, planned = by_case[case], plan.bytes
        print(case, plan.rank, found, planned, planned.peak)
        assert found.lasting == planned.weights + planned.gradients + planned.optimizer
        assert found.whole == planned.whole
        assert found.peak == pytest.approx(planned.peak, rel=0.05)


@pytest.mark.parametrize("case", [case for case, (stage, *_) in CASES.items() if stage == 3])
def test_stage_3_holds_its_share_and_two_units(ranks: list[dict[str, Measured]], case: str) -> None:
    """A fourth of weights, gradients, master weights and moments, and two units that follow one another: two blocks,
    or a block and the head, where that is larger."""
    config = config_of(case)
    (held,), parameters = holdings(config, sizes_of(RANKS, 1, 1, -1), AttentionBackend.SDPA)
    item, exact = held.buckets[0].weights // (held.buckets[0].grads // 4), 4
    bound = parameters * (item + exact + 2 * exact + (item < exact) * exact) / RANKS
    units: dict[int, int] = {}
    for bucket in held.buckets:
        units[bucket.units[0]] = units.get(bucket.units[0], 0) + bucket.weights + bucket.grads
    large = [units[unit] for unit in sorted(units) if units[unit] > 0.01 * max(units.values())]
    two = max(one + following for one, following in pairwise(large))
    for by_case in ranks:
        assert by_case[case].lasting + by_case[case].whole <= bound + two
