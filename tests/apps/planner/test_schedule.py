"""The pipeline played through, against closed forms and against what the trainer's schedules keep alive."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.apps.planner.schedule import StageCost, actions_of, bubble_fraction, moments, stage_cost
from internlm_lite.config.schema import LossConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import StageSpec, Transformer, tensor_parallel_context
from tests.apps.planner.kept import config

EVEN = StageCost(forward=1, backward_input=1, backward_weight=1)


@pytest.mark.parametrize(("size", "micro_num"), [(1, 3), (2, 2), (4, 4), (4, 8), (8, 9), (3, 2)])
def test_the_bubble_of_1f1b_is_the_known_one(size: int, micro_num: int) -> None:
    """(p - 1) / (m + p - 1), also with fewer micro-batches than ranks (arXiv:2104.04473, section 2.2.1)."""
    ranks = actions_of("1f1b", size, 1, micro_num)
    assert bubble_fraction(ranks, [EVEN] * size) == pytest.approx((size - 1) / (micro_num + size - 1))


@pytest.mark.parametrize(("size", "chunks", "micro_num"), [(2, 2, 4), (4, 2, 8), (4, 3, 4)])
def test_chunks_divide_the_bubble(size: int, chunks: int, micro_num: int) -> None:
    """(p - 1) / (v m + p - 1), section 2.2.2."""
    ranks = actions_of("interleaved", size, chunks, micro_num)
    expected = (size - 1) / (chunks * micro_num + size - 1)
    assert bubble_fraction(ranks, [EVEN] * size * chunks) == pytest.approx(expected)


def test_zero_bubble_idles_least() -> None:
    interleaved, zbv = (bubble_fraction(actions_of(s, 4, 2, 16), [EVEN] * 8) for s in ("interleaved", "zbv"))
    assert 0 < zbv < interleaved / 2


def test_uneven_stages_make_the_others_wait() -> None:
    ranks = actions_of("1f1b", 2, 1, 64)
    slow = StageCost(2, 2, 2)
    assert bubble_fraction(ranks, [EVEN, slow]) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_every_micro_batch_passes_every_stage_once(schedule: str) -> None:
    size, chunks, micro_num = 4, 1 if schedule == "1f1b" else 2, 8
    ranks = actions_of(schedule, size, chunks, micro_num)
    done = [(action.kind, action.stage, action.micro) for rank in ranks for action in rank]
    assert len(done) == len(set(done))
    for kinds in ("F", "BI", "BW"):
        passed = sorted((stage, micro) for kind, stage, micro in done if kind in kinds)
        assert passed == [(stage, micro) for stage in range(size * chunks) for micro in range(micro_num)]


def test_1f1b_keeps_one_micro_batch_per_remaining_stage() -> None:
    for rank, actions in enumerate(actions_of("1f1b", 4, 1, 8)):
        assert max(sum(kept.values()) for kept, _ in moments(actions)) == 4 - rank
        assert moments(actions)[-1] == ({rank: 0}, {rank: 0})


def stage(spec: StageSpec, **changes: object) -> Transformer:
    model = config(num_layers=4, **changes).model
    tp_ctx = tensor_parallel_context(model, single_process_mesh(torch.device("meta")), by_sequence=False)
    return Transformer(model, LossConfig(), tp_ctx, AttentionBackend.SDPA, spec)


def test_costs_follow_the_layers_of_the_stage() -> None:
    first, last = StageSpec(range(0, 3), first=True, last=False), StageSpec(range(3, 4), first=False, last=True)
    plain, again = (stage_cost(stage(first, checkpoint=recomputed), 16) for recomputed in (0, 0.5))
    assert again.forward == plain.forward
    assert again.backward_input == pytest.approx(plain.backward_input * 5 / 3)
    assert plain.of("B") == plain.of("I") + plain.of("W") == pytest.approx(2 * plain.forward, rel=1e-3)
    head = 3 * 2 * 32 * 96
    assert stage_cost(stage(last), 16).forward == pytest.approx(plain.backward_weight / 3 + head)
