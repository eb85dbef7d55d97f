"""ZeRO stages 2 and 3 against torch.optim.AdamW on one process, in fp64; what they send, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group, Mesh, build_mesh, single_process_mesh, sizes_of
from internlm_lite.models.stages import build_stages
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.train.trainer import Trainer
from tests.optim.test_zero import (
    MICRO,
    ROWS,
    STEPS,
    Unit,
    assert_same_training,
    config,
    loss_of,
    reference,
    rows,
)
from tests.train.layouts import Layout, config_of
from tests.world import TIMEOUT, run_world

LAYERS = 4


def shared(stage: int, *, reshard: bool = True, **zero: object) -> Config:
    cfg = config(**zero)
    parallel = {"zero_stage": stage, "reshard_after_forward": reshard}
    return cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=parallel)})


@dataclass
class Counts:
    """Collectives by (name, group), and the most bytes of whole weights and whole gradients at a time."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    weights: int = 0
    grads: int = 0
    left: int = 0
    """Bytes of whole weights and gradients after a step."""


@contextmanager
def counting(buckets: list[Bucket], counts: Counts) -> Iterator[None]:
    """Count until it ends; in the one process of a rank, which ends with the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reduce_scatter", "all_gather", "all_reduce"):
            original = getattr(comm, name)

            def counted(*args: Any, _name: str = name, _original: Any = original, **options: Any) -> comm.Work:
                group = next(arg for arg in args if isinstance(arg, Group))
                counts.calls[_name, group.name] += 1
                return _original(*args, **options)

            patch.setattr(comm, name, counted)
        for name, kind in (("hold_weights", "weights"), ("hold_grads", "grads")):
            original = getattr(Bucket, name)

            def held(self: Bucket, _original: Any = original, _kind: str = kind) -> None:
                _original(self)
                now = sum(getattr(bucket, _kind).untyped_storage().nbytes() for bucket in buckets)
                setattr(counts, _kind, max(now, getattr(counts, _kind)))

            patch.setattr(Bucket, name, held)
        yield


class Branch(Unit):
    """A unit that only some ranks use."""

    used = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.used else x + 0.0


def train(mesh: Mesh, cfg: Config, dtype: torch.dtype = torch.float64, **changes: Any) -> dict[str, Any]:
    """As tests.optim.test_zero.train. `bad_step`: the last rank's loss is infinite then; `branches`: every rank but the
    first leaves the third unit out."""
    units = [(Branch if i == 2 else Unit)(f"layers.{i}", dtype) for i in range(LAYERS)]
    if changes.get("branches") and mesh.dp.rank:
        units[2].used = False  # type: ignore[attr-defined]
    optimizer, norms, skipped, counts = HybridZeroOptimizer(list(units), cfg, mesh, dtype), [], [], Counts()
    for step in range(STEPS):
        with counting(optimizer.buckets, counts):
            optimizer.begin(MICRO)
            for micro in range(MICRO):
                mine = rows(step, micro).chunk(mesh.dp.size)[mesh.dp.rank].to(dtype).requires_grad_()
                loss = loss_of(units, mine) * (optimizer.loss_scale / (MICRO * ROWS)).to(dtype)
                if step == changes.get("bad_step") and mesh.dp.rank == mesh.dp.size - 1:
                    loss = loss * float("inf")
                loss.backward()
            outcome = optimizer.step(step, num_labels=MICRO * ROWS // mesh.dp.size // 2, global_tokens=MICRO * ROWS)
        norms.append((outcome.norm_model_dtype.square() + outcome.norm_fp32.square()).sqrt().item())
        skipped.append(outcome.skips.consecutive_skips.item() > 0)
    stage = cfg.parallel.zero_stage
    flats = [flat for b in optimizer.buckets for flat in ((b.grads, b.weights) if stage == 3 else (b.grads,))]
    counts.left = sum(flat.untyped_storage().nbytes() for flat in flats)
    with optimizer.whole_weights():
        weights = {p.shard_spec.name: p.detach().clone() for u in units for p in (u.weight, u.bias)}
    return {"weights": weights, "norms": norms, "skipped": skipped, "counts": counts, "buckets": len(optimizer.buckets)}


def sweep(world: Mesh) -> dict[tuple[int, int, bool], dict[str, Any]]:
    found = {}
    for zero1 in (-1, 2):
        mesh = build_mesh(sizes_of(world.world.size, 1, 1, zero1), world.rank, world.device, TIMEOUT)
        for stage, reshard in ((2, True), (3, True), (3, False)):
            found[zero1, stage, reshard] = train(mesh, shared(stage, reshard=reshard))
    found[0, 2, True] = train(world, shared(2), branches=True)
    found[0, 3, True] = train(world, shared(3), branches=True)
    found[0, 1, True] = train(world, shared(1), branches=True)
    return found


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[tuple[int, int, bool], dict[str, Any]]]:
    return run_world(sweep, 4)


@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_equals_plain_adamw(stage: int) -> None:
    assert_same_training(train(single_process_mesh(), shared(stage)), reference(config()))


def test_every_stage_equals_plain_adamw_on_every_rank(four_ranks: list[Any]) -> None:
    expected = reference(config())
    for by_case in four_ranks:
        for (zero1, *_), result in by_case.items():
            if zero1:
                assert_same_training(result, expected)


# The sum over replicas would miss the micro-batches that come after it.
def test_micro_batches_are_reduced_in_zero_and_their_sum_once_over_the_replicas(four_ranks: list[Any]) -> None:
    for stage, reshard in ((2, True), (3, True), (3, False)):
        result = four_ranks[0][2, stage, reshard]
        calls, steps = result["counts"].calls, STEPS * result["buckets"]
        assert calls["reduce_scatter", "zero"] == MICRO * steps
        assert calls["all_reduce", "replica"] == steps


def test_weights_are_gathered_for_each_pass_or_once(four_ranks: list[Any]) -> None:
    once = four_ranks[0][-1, 3, False]
    assert once["counts"].calls["all_gather", "zero"] == STEPS * once["buckets"]
    each = four_ranks[0][-1, 3, True]
    twice = 2 * MICRO * STEPS * each["buckets"]
    # The last unit's weights go when its forward pass ends, and come again at once.
    assert each["counts"].calls["all_gather", "zero"] == twice
    two = four_ranks[0][-1, 2, True]
    assert two["counts"].calls["all_gather", "zero"] == STEPS * two["buckets"]


def test_two_units_are_whole_at_a_time_and_none_between_steps(four_ranks: list[Any]) -> None:
    unit = 2 * 1024 * 8  # matrix and bias, each padded to 4 shards of 256, in fp64
    for (zero1, stage, reshard), result in four_ranks[0].items():
        counts = result["counts"]
        if zero1 == -1:
            assert counts.grads <= 2 * unit and counts.left == 0, (stage, reshard)
        if zero1 == -1 and stage == 3:
            assert counts.weights == (2 if reshard else LAYERS) * unit


# Ranks that do not use a parameter reduce zeros, in the same rounds as the others.
def test_a_unit_that_some_ranks_leave_out(four_ranks: list[Any]) -> None:
    for by_case in four_ranks:
        one = by_case[0, 1, True]
        for stage in (2, 3):
            assert by_case[0, stage, True]["norms"] == pytest.approx(one["norms"], rel=1e-12)
            for name, weight in by_case[0, stage, True]["weights"].items():
                torch.testing.assert_close(weight, one["weights"][name], rtol=1e-11, atol=1e-13)


def overflows(world: Mesh) -> list[dict[str, Any]]:
    return [train(world, shared(stage), torch.float16, bad_step=2) for stage in (2, 3)]


def test_an_overflow_on_one_rank_skips_the_step_everywhere() -> None:
    for results in run_world(overflows, 2):
        for result in results:
            assert result["skipped"] == [False, False, True, False, False, False]
            assert all(weight.isfinite().all() for weight in result["weights"].values())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_an_exception_ended_leaves_nothing(stage: int) -> None:
    units = [Unit(f"layers.{i}", torch.float64) for i in range(2)]
    optimizer = HybridZeroOptimizer(list(units), shared(stage), single_process_mesh(), torch.float64)
    for again in (False, True):
        optimizer.begin(2)
        loss_of(units, rows(0, 0).requires_grad_()).backward()
        if again:
            loss_of(units, rows(0, 1).requires_grad_()).backward()
    found = optimizer.step(0, ROWS, 1).norm_model_dtype.item()
    fresh = [Unit(f"layers.{i}", torch.float64) for i in range(2)]
    total = loss_of(fresh, rows(0, 0)) + loss_of(fresh, rows(0, 1))
    total.backward()
    squares = [p.grad.square().sum() for unit in fresh for p in (unit.weight, unit.bias) if p.grad is not None]
    assert found * ROWS == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-12)


# Rounds that are all made in the end must not count a bucket's gradients twice.
def test_gradients_that_come_late_count_once() -> None:
    for stage in (2, 3):
        unit = Unit("layers.0", torch.float64)
        optimizer = HybridZeroOptimizer([unit], shared(stage), single_process_mesh(), torch.float64)
        optimizer.begin(3)
        loss_of([unit], rows(0, 0).requires_grad_()).backward()  # the other two micro-batches have no gradients
        found = optimizer.step(0, ROWS, 1).norm_model_dtype.item()
        fresh = Unit("layers.0", torch.float64)
        loss_of([fresh], rows(0, 0)).backward()
        assert fresh.weight.grad is not None and fresh.bias.grad is not None
        expected = (fresh.weight.grad.square().sum() + fresh.bias.grad.square().sum()).sqrt().item()
        assert found * ROWS == pytest.approx(expected, rel=1e-12)


# bf16 sums of many micro-batches lose what is added late: shards are summed in fp32, whatever is sent.
def test_shards_are_summed_in_fp32_though_gradients_are_of_bf16() -> None:
    unit, mesh = Unit("layers.0", torch.bfloat16), single_process_mesh()
    cfg = shared(2, grad_dtype="torch.bfloat16")
    (matrix, bias) = build_buckets([unit.bias, unit.weight], mesh.zero, cfg, {unit.bias: 0, unit.weight: 0})
    assert {matrix.grads.dtype, bias.grads.dtype} == {torch.bfloat16}
    assert {matrix.grad_shard.dtype, bias.grad_shard.dtype} == {torch.float32}


def recompute(world: Mesh) -> dict[float, Counter[tuple[str, str]]]:
    found = {}
    for share in (0.0, 1.0):
        made = Layout(dp=2, checkpoint=share, layers=3, zero_stage=3)
        trainer, counts = Trainer(config_of(made, None), world), Counts()
        batch = random_rows(trainer, config_of(made, None), world)
        with counting(trainer.optimizer.buckets, counts):
            trainer.step(batch, 0)
        found[share] = Counter({call: times for call, times in counts.calls.items() if call[1] == "zero"})
    return found


def random_rows(trainer: Trainer, cfg: Config, mesh: Mesh) -> Any:
    from internlm_lite.apps.bench.shapes import random_batch

    return random_batch(cfg, mesh.dp.rank, trainer.mesh.device)


# A backward pass that runs a block's forward pass again must not gather its weights again.
def test_recomputation_gathers_nothing_more() -> None:
    for by_share in run_world(recompute, 2):
        assert by_share[0.0] == by_share[1.0]
        assert by_share[0.0]["all_gather", "zero"] > 0


def test_drawn_weights_leave_zeros_between_parameters() -> None:
    made = Layout(layers=2, zero_stage=3)
    buckets = Trainer(config_of(made, None), single_process_mesh()).optimizer.buckets
    assert any(bucket.shard_size > bucket.numel for bucket in buckets)
    assert not any(bucket.master[bucket.numel :].any() for bucket in buckets)


def test_a_model_of_stage_3_is_built_without_memory_for_its_weights() -> None:
    for stage in (1, 3):
        made = Layout(layers=2, zero_stage=stage)
        mesh = single_process_mesh()
        stages = build_stages(config_of(made, None), mesh, AttentionBackend.SDPA)
        params = list(stages[0].parameters())
        held = sum(param.untyped_storage().nbytes() for param in params)
        elements = len(params) if stage == 3 else sum(param.numel() for param in params)
        assert held == 8 * elements
