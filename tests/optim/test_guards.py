"""Spikes in loss and gradient norm, and ranks that differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from internlm_lite.config.schema import GuardConfig
from internlm_lite.errors import NumericsError
from internlm_lite.mesh.layout import parameter, whole
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.replicas import ReplicaMismatch, check_replicas, checksum, mismatches
from internlm_lite.optim.spikes import SpikeGuard, nanmedians
from internlm_lite.optim.zero import HybridZeroOptimizer
from tests.optim.test_zero import Unit, config
from tests.world import run_world

CPU = torch.device("cpu")


def _curve(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """A loss that falls and a norm that follows, both with noise of a few percent."""
    noise = torch.randn(steps, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.05
    return [
        (8 * math.exp(-step / 400 + noise[step, 0].item()), 3 * math.exp(noise[step, 1].item()))
        for step in range(steps)
    ]


def _judge(guard: SpikeGuard, loss: float, norm: float) -> tuple[list[float], bool]:
    scores, skip = guard.judge(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm, dtype=torch.float64))
    return scores.tolist(), bool(skip)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_falling_curve_has_no_spike(seed: int) -> None:
    guard = SpikeGuard(GuardConfig(), CPU)
    assert all(_judge(guard, *point) == ([0.0, 0.0], False) for point in _curve(600, seed))


@pytest.mark.parametrize(("loss", "norm", "which"), [(30.0, 3.0, [True, False]), (5.0, 60.0, [False, True])])
def test_spikes_are_found_in_loss_and_in_norm(loss: float, norm: float, which: list[bool]) -> None:
    for policy in ("note", "skip", "rollback"):
        guard = SpikeGuard(GuardConfig(spike=policy), CPU)
        for point in _curve(200):
            _judge(guard, *point)
        scores, skip = _judge(guard, loss, norm)
        assert [score > 12 for score in scores] == which and skip is (policy != "note")
        assert _judge(guard, 5.0, 3.0) == ([0.0, 0.0], False)  # one outlier does not move the median


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_no_spike(loss: float) -> None:
    guard = SpikeGuard(GuardConfig(spike="note"), CPU)
    assert _judge(guard, loss, 3.0) == ([0.0, 0.0], False)
    assert _judge(guard, 0.0, 3.0) == ([0.0, 0.0], False), "a loss of 0 is finite"


def test_a_rollback_drops_the_history_of_undone_steps() -> None:
    guard, fresh = SpikeGuard(GuardConfig(), CPU), SpikeGuard(GuardConfig(), CPU)
    for point in _curve(40):
        _judge(guard, *point)
    saved = guard.state_dict()
    for _ in range(60):
        _judge(guard, 900.0, 900.0)
    for each in (guard, fresh):
        each.load_state_dict(saved)
    assert _judge(guard, 30.0, 60.0) == _judge(fresh, 30.0, 60.0)


def test_a_lasting_new_level_is_no_spike_any_more() -> None:
    guard = SpikeGuard(GuardConfig(spike="skip", spike_window=32), CPU)
    for point in _curve(100):
        _judge(guard, *point)
    skips = [_judge(guard, 60.0, 3.0)[1] for _ in range(40)]
    assert skips[0] and not skips[-1]


def test_a_step_that_is_not_finite_is_not_in_the_history() -> None:
    guard = SpikeGuard(GuardConfig(spike="skip"), CPU)
    for point in _curve(50):
        _judge(guard, *point)
    before = guard.state_dict()
    assert _judge(guard, math.nan, math.inf) == ([0.0, 0.0], False), "no spike: skips.py skips it"
    assert guard.state_dict() == before


@pytest.mark.parametrize("seed", range(20))
def test_medians_are_those_of_torch(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 1 + seed, generator=draw, dtype=torch.float64)
    rows[torch.rand(rows.shape, generator=draw) < 0.3] = math.nan
    rows[2] = math.nan
    assert torch.equal(nanmedians(rows).nan_to_num(7), rows.nanmedian(dim=1).values.nan_to_num(7))


def test_no_spikes_without_history() -> None:
    guard = SpikeGuard(GuardConfig(spike="skip"), CPU)
    assert [_judge(guard, 10.0**step, 1.0)[1] for step in range(31)] == [False] * 31


@pytest.mark.parametrize("steps", [5, 200])
def test_a_resumed_detector_decides_the_same(steps: int) -> None:
    first, second = (SpikeGuard(GuardConfig(), CPU) for _ in range(2))
    curve = _curve(steps + 50)
    for point in curve[:steps]:
        _judge(first, *point)
    second.load_state_dict(first.state_dict())
    assert [_judge(first, *p) for p in curve[steps:]] == [_judge(second, *p) for p in curve[steps:]]
    assert first.state_dict() == second.state_dict()


def test_any_flipped_bit_changes_the_check_sum() -> None:
    for dtype, integers in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32), (torch.float64, torch.int64)):
        values = torch.randn(100, generator=torch.Generator().manual_seed(1)).to(dtype)
        before = checksum([values], CPU)
        for bit in range(8 * dtype.itemsize):
            flipped = values.clone()
            flipped.view(integers)[17] ^= torch.tensor(1, dtype=integers) << bit
            assert checksum([flipped], CPU) != before


def test_the_rank_that_differs_is_named() -> None:
    def told(*values: int) -> list[dict[Any, int]]:
        return [{("weights", 0, 0): value} for value in values]

    assert mismatches(told(1, 1, 1)) == []
    named = "weights of rank 2 differ from those of 3 other ranks"
    assert mismatches(told(1, 1, 2, 1)) == [ReplicaMismatch(named, culprit_ranks=(2,))]
    named = "weights of ranks 2, 3 differ from those of 3 other ranks"
    assert mismatches(told(1, 1, 2, 3, 1)) == [ReplicaMismatch(named, culprit_ranks=(2, 3))]
    named = "weights of ranks 0, 2 and ranks 1, 3 differ, and no majority says which is wrong"
    assert mismatches(told(1, 2, 1, 2)) == [ReplicaMismatch(named)]
    assert mismatches([{("weights", 0, 0): 1}, {("weights", 0, 1): 2}]) == []


class _Tied(nn.Module):
    """A copy of a tied weight on the first and on the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(whole("head.weight", (24, 8), partial_over=("ends",)), torch.float64, "cpu")
        nn.init.ones_(self.weight)


def _flip(mesh: Mesh, rank: int, what: str, tied: bool = False) -> tuple[str, tuple[int, ...]] | None:
    unit: nn.Module = _Tied() if tied else Unit("layers.0", torch.float64)
    optimizer = HybridZeroOptimizer([unit], config(), mesh, torch.float64)
    check_replicas(optimizer, mesh, 6)
    if mesh.rank == rank and what == "weights":
        optimizer.buckets[0].weights.view(torch.int64)[5] ^= 1
    if mesh.rank == rank and what == "state":
        next(piece for piece in optimizer.pieces() if piece.role == "exp_avg").tensor.view(torch.int64)[0] ^= 1
    try:
        check_replicas(optimizer, mesh, 7)
    except NumericsError as error:
        return str(error), error.culprit_ranks
    return None


@pytest.mark.parametrize(
    ("layout", "what"), [({}, "weights"), ({"zero1": 1}, "weights"), ({"zero1": 1}, "state"), ({"tensor": 3}, "state")]
)
def test_one_flipped_bit_names_its_rank_on_all_ranks(layout: dict[str, int], what: str) -> None:
    """Tensor-parallel ranks have copies of what is not split over them."""
    first, *others = run_world(_flip, 3, (1, what), **layout)
    wanted = "optimizer state" if what == "state" else "weights"
    assert first is not None and others == [first, first]
    assert f"step 7: ranks that must hold the same numbers do not: {wanted} of rank 1 differ from" in first[0]
    assert first[0].count("those of 2 other ranks") == first[0].count(" differ ") and first[1] == (1,)


def test_a_flipped_bit_of_one_copy_of_a_tied_weight_is_found() -> None:
    first, second = run_world(_flip, 2, (1, "weights", True), pipeline=2)
    assert first == second and first[1] == ()
    assert "weights of rank 0 and rank 1 differ, and no majority says which is wrong" in first[0]


def test_stages_hold_different_weights() -> None:
    assert run_world(_flip, 2, (1, "weights"), pipeline=2) == [None, None]
