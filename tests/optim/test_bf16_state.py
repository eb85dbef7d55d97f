"""Moments in bf16: rounded without bias, alike in every layout and after a resume, exact where nothing is to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.planner.components import components_of
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import parameter, split, whole
from internlm_lite.mesh.mesh import Group, Sizes, plan_mesh, single_process_mesh
from internlm_lite.models.stages import build_stages, units_of
from internlm_lite.optim.bf16_state import _places, random_bits, rounded
from internlm_lite.optim.update_rule import Piece
from internlm_lite.optim.zero import HybridZeroOptimizer
from tests.cli import ROOT, run
from tests.optim.test_zero import Unit, config, loss_of, rows
from tests.train.resumed import LAYOUTS, check_layouts
from tests.train.runs import tiny

RULES = [{"name": "adamw"}, {"name": "adamw_cs336"}, {"name": "lion"}, {"name": "sgd", "momentum": 0.9}]
NAMES = [rule["name"] for rule in RULES]


def bf16(cfg: Config, rule: dict[str, Any] = RULES[0], **adam: Any) -> Config:
    values = cfg.model_dump()
    values["optimizer"] |= {**rule, "moments": "bf16"}
    values["adam"] |= adam
    if "adam_beta2" in adam:
        values["beta2_scheduler"]["init_beta2"] = adam["adam_beta2"]
    return Config.model_validate(values)


def optimizer_of(cfg: Config, dtype: torch.dtype = torch.float32) -> tuple[HybridZeroOptimizer, list[Unit]]:
    units = [Unit("layers.0", dtype)]
    return HybridZeroOptimizer(list(units), cfg, single_process_mesh(), dtype), units


def bits_of(n: int, updates: int) -> torch.Tensor:
    return random_bits(torch.arange(n), 12345, torch.tensor(updates))


def test_random_bits_are_even_and_new_for_every_place_and_update() -> None:
    bits = bits_of(1 << 16, 7)
    assert bits.min() >= 0 and bits.max() < 1 << 16
    assert bits.double().mean().item() == pytest.approx(32767.5, rel=0.01)
    assert torch.bincount(bits >> 12, minlength=16).double().std().item() < 4 * (1 << 16) ** 0.5 / 4
    for other in (bits_of(1 << 16, 8), random_bits(torch.arange(1 << 16) + (1 << 32), 12345, torch.tensor(7))):
        pair = torch.stack([bits.double(), other.double()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.02


def test_rounding_has_no_bias_and_leaves_what_bf16_holds() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, float("inf"), float("-inf")])
    for update in range(20):
        assert torch.equal(rounded(values, bits_of(7, update)).view(torch.int16), values.bfloat16().view(torch.int16))
    assert rounded(torch.tensor([float("nan")]), bits_of(1, 0)).isnan().all()
    third = torch.full((1 << 16,), 1 + 2.0**-7 / 3)
    drawn = rounded(third, bits_of(1 << 16, 1))
    assert set(drawn.tolist()) == {1.0, 1 + 2.0**-7}
    assert (drawn.float() - 1).mean().item() == pytest.approx(2.0**-7 / 3, rel=0.02)
    assert torch.equal(rounded(-third, bits_of(1 << 16, 1)), -drawn)


def test_places_are_those_of_the_whole_tensor() -> None:
    """A part of columns, and of it a part in the middle."""
    group = Group("tp", (0, 1, 2), 1, None)
    param = parameter(split("w", (4, 9), 1, group), torch.float32, "cpu")
    expected = torch.arange(36).view(4, 9)[:, 3:6].flatten()
    assert _places(Piece(param, 10, 20, 1), 12, 17).tolist() == expected[3:8].tolist()
    flat = parameter(whole("b", (7,)), torch.float32, "cpu")
    assert _places(Piece(flat, 0, 7, 0), 2, 7).tolist() == [2, 3, 4, 5, 6]


def test_a_slow_second_moment_is_right_on_average() -> None:
    """A beta2 of 0.999 is 0.996 in bf16, and an average rounded to the nearest stops where a step is less than half a
    digit: it would be wrong by more than a tenth."""
    cfg = bf16(config(reduce_bucket_size=10**6, clip_grad_norm=0), adam_beta2=0.999, lr=0.0)
    optimizer, _ = optimizer_of(cfg)
    piece = next(p for p in optimizer.pieces() if (p.role, p.name) == ("exp_avg_sq", "layers.0.weight"))
    exact = torch.zeros(piece.tensor.shape, dtype=torch.float64)
    nearest = torch.zeros(piece.tensor.shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for step in range(1500):
        grads = [torch.randn(bucket.grads.shape, generator=generator) for bucket in optimizer.buckets]
        for bucket, grad in zip(optimizer.buckets, grads, strict=True):
            bucket.grads.copy_(grad)
        optimizer.begin(1)
        optimizer.step(step, num_labels=8, global_tokens=8)
        (square,) = (grad[:576].double().square() for grad in grads if len(grad) > 576)
        exact.lerp_(square, 1 - 0.999)
        nearest.copy_(nearest.double().lerp(square, 1 - 0.999))
    ratio = (piece.tensor.double() / exact).mean().item()
    assert piece.tensor.dtype == torch.bfloat16
    assert ratio == pytest.approx(1, abs=0.01)
    assert abs((nearest.double() / exact).mean().item() - 1) > 0.1, "rounding to the nearest fails here"


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_what_has_no_gradient_does_not_move(rule: dict[str, Any]) -> None:
    """0 is exactly 0, so rows that are never looked up stay, without weight decay, to the bit."""
    optimizer, units = optimizer_of(bf16(config(), rule, weight_decay=0.0))
    before = units[0].weight.detach().clone()
    for step in range(50):
        optimizer.begin(1)
        loss = loss_of(units, rows(step, 0).float())
        loss.backward()
        units[0].weight.grad[3] = 0.0
        optimizer.step(step, num_labels=8, global_tokens=8)
    optimizer.wait_weights()
    assert torch.equal(units[0].weight[3], before[3])
    assert not torch.equal(units[0].weight[4], before[4])


def test_bf16_weights_decay() -> None:
    """Each decay is far below half a digit of bf16: the fp32 masters take it in."""
    optimizer, units = optimizer_of(bf16(config(), lr=1e-2, weight_decay=0.1), torch.bfloat16)
    before = units[0].weight.detach().float().clone()
    left = 1.0
    for step in range(20):
        left *= 1 - optimizer._updates.rates.after(torch.tensor(step))[0].item() * 0.1
    for step in range(20):
        optimizer.begin(1)
        optimizer.step(step, num_labels=8, global_tokens=8)
    (master,) = (p.tensor for p in optimizer.pieces() if (p.role, p.name) == ("master", "layers.0.weight"))
    torch.testing.assert_close(master.view_as(before), before * left, rtol=1e-5, atol=0)
    assert 0.98 < left < 0.99


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_skipped_step_changes_no_bit(rule: dict[str, Any]) -> None:
    optimizer, units = optimizer_of(bf16(config(), rule))
    for step in range(3):
        optimizer.begin(1)
        (loss_of(units, rows(step, 0).float()) * (float("nan") if step == 2 else 1.0)).backward()
        if step == 2:
            before = {(p.role, p.name): p.tensor.clone() for p in optimizer.pieces()}
        optimizer.step(step, num_labels=8, global_tokens=8)
    state = {(p.role, p.name): p.tensor for p in optimizer.pieces()}
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.items())
    assert {tensor.dtype for (role, _), tensor in state.items() if role != "master"} == {torch.bfloat16}


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_every_layout_rounds_alike_and_a_resume_goes_on_to_the_bit(rule: str, tmp_path: Path) -> None:
    """Random bits depend on where an element is in the whole tensor, not on who holds it; the checkpoint keeps bf16."""
    optimizer = {"moments": "bf16", **RULES[NAMES.index(rule)]}
    sections = {"optimizer": optimizer, "adam": {"lr": 1e-3, "weight_decay": 0.1}}
    names = [name for name in LAYOUTS if name != "pp2"]
    check_layouts(names if rule == "adamw" else names[:2], sections, tmp_path)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_planner_counts_bf16_state_and_its_copy(rule: dict[str, Any]) -> None:
    cfg = bf16(tiny(None, model={"dtype": "torch.bfloat16"}, grad_scaler={}), rule)
    mesh = plan_mesh(Sizes(), 0, torch.device("meta"))
    optimizer = HybridZeroOptimizer(units_of(build_stages(cfg, mesh, AttentionBackend.SDPA)), cfg, mesh, torch.bfloat16)
    ((held,), _) = holdings(cfg, Sizes(), AttentionBackend.SDPA)
    tensors = [tensor for _, state in optimizer.shards() for tensor in state.values()]
    assert held.optimizer == sum(tensor.nbytes for tensor in tensors)
    n = len(optimizer._updates.rules[0].roles)
    assert max(bucket.expanded for bucket in held.buckets) == n * 4 * max(b.shard_size for b in optimizer.buckets)
    assert sum(share.state for share in components_of(cfg, [32]).groups) == 2 * n * held.parameters


def test_bf16_moments_are_refused_for_muon(tmp_path: Path) -> None:
    args = ("--config", str(ROOT / "configs" / "tiny.py"), "optimizer.name=muon", "optimizer.moments=bf16", "--dry-run")
    ended = run("train.py", *args, folder=tmp_path)
    assert ended.code != 0 and "Traceback" not in ended.output
    assert 'optimizer.moments: found "bf16" with "muon", whose momentum is fp32; leave moments out' in ended.output
