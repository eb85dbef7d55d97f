"""Parameter groups against torch.optim.AdamW's, in every layout and after a resume; their errors, and what is shown."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.planner.components import components_of
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh, Sizes, plan_mesh, single_process_mesh
from internlm_lite.models.stages import build_stages, units_of
from internlm_lite.optim.lr_schedule import learning_rate
from internlm_lite.optim.zero import HybridZeroOptimizer
from tests.cli import ROOT, run
from tests.optim.test_zero import MICRO, ROWS, STEPS, Unit, assert_same_training, config, loss_of, rows, train
from tests.train.resumed import LAYOUTS, check_layouts
from tests.train.runs import run_training, tiny
from tests.world import run_world

FIRST, BIASES = "layers.0.*", "*.bias"
GROUPS: list[dict[str, Any]] = [
    {"pattern": FIRST, "lr": 3e-3, "weight_decay": 0.4},
    {"pattern": BIASES, "betas": [0.8, 0.9]},
    {"pattern": "layers.3.*", "lr": 0.0},
]
"""Of the model of `tests.optim.test_zero`; layers.0.bias is in the first group, layers.3.bias in the second."""


def grouped(cfg: Config, groups: list[dict[str, Any]], **adam: Any) -> Config:
    values = cfg.model_dump()
    values["optimizer"]["groups"] = groups
    values["adam"] |= adam
    return Config.model_validate(values)


def by_torch(cfg: Config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The training of `tests.optim.test_zero.train` by torch's AdamW, each group with a schedule of its own."""
    units = [Unit(f"layers.{i}", torch.float64) for i in range(4)]
    adam, common = cfg.adam, (cfg.adam.adam_beta1, cfg.adam.adam_beta2)
    first, *middle, last = units
    groups = [
        {"params": [first.weight, first.bias], "peak": 3e-3, "weight_decay": 0.4, "betas": common},
        {"params": [u.bias for u in (*middle, last)], "peak": adam.lr, "weight_decay": 0.0, "betas": (0.8, 0.9)},
        {"params": [last.weight], "peak": 0.0, "weight_decay": adam.weight_decay, "betas": common},
        {"params": [u.weight for u in middle], "peak": adam.lr, "weight_decay": adam.weight_decay, "betas": common},
    ]
    optimizer = torch.optim.AdamW(groups, eps=adam.adam_eps, foreach=False)
    params, norms = [param for unit in units for param in (unit.weight, unit.bias)], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, adam.lr, cfg.lr_scheduler) * group["peak"] / adam.lr
        optimizer.zero_grad()
        (torch.stack([loss_of(units, rows(step, m)) for m in range(MICRO)]).sum() / (MICRO * ROWS / 2)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params, 0.5).item())
        optimizer.step()
    return {param.shard_spec.name: param.detach() for param in params}, norms


def _train(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    return train(mesh, cfg)


@pytest.mark.parametrize("world", [1, 2])
def test_groups_equal_those_of_torch(world: int) -> None:
    """One norm clips the gradients of all groups; the step line has the rate of adam.lr."""
    cfg = grouped(config(), GROUPS)
    for result in run_world(partial(_train, cfg=cfg), world):
        assert_same_training(result, by_torch(cfg))
        assert result["rates"] == [learning_rate(step + 1, cfg.adam.lr, cfg.lr_scheduler) for step in range(STEPS)]


def peaks(cfg: Config) -> dict[str, tuple[float, float]]:
    """Group -> learning rates of the first update and at the end of the warm-up."""
    units = [Unit(f"layers.{i}", torch.float64) for i in range(4)]
    updates = HybridZeroOptimizer(list(units), cfg, single_process_mesh(), torch.float64)._updates
    first, top = (updates.rates.after(torch.tensor(step)) for step in (0, 3))
    names = [rule._group.name for rule in updates.rules]
    return {name: (first[row].item(), top[row].item()) for name, row in zip(names, updates._rows, strict=True)}


def test_another_adam_lr_does_not_change_the_rates_of_groups() -> None:
    """A value that is given for all, on the command line or by a sweep, must not flatten what groups say."""
    for lr in (1e-2, 2e-2, 0.0):
        found = peaks(grouped(config(), GROUPS, lr=lr))
        assert found["decay"] == (pytest.approx(lr / 4), lr)
        assert found[f"{FIRST} (decay)"] == (pytest.approx(3e-3 / 4), pytest.approx(3e-3))
        assert found["layers.3.* (decay)"] == (0.0, 0.0)


def test_groups_with_one_learning_rate_share_its_row() -> None:
    units = [Unit(f"layers.{i}", torch.float64) for i in range(4)]
    plain = HybridZeroOptimizer(list(units), config(), single_process_mesh(), torch.float64)._updates
    assert plain.rates.after(torch.tensor(0)).shape == (1,) and len(plain.rules) == 2


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (
            ["*nrom*"],
            r"groups\[0\].pattern: '\*nrom\*' matches no parameter, .*near names: norm.weight, layers.0.ffn_norm",
        ),
        (
            ["*", "*norm*"],
            r"groups\[1\].pattern: '\*norm\*' has no parameter left, .*attention_norm.* and 4 more; the fir",
        ),
        (["norm"], r"groups\[0\].pattern: 'norm' matches no parameter, expected a pattern of whole names"),
    ],
)
def test_a_pattern_without_a_parameter_is_refused(patterns: list[str], words: str, tmp_path: Path) -> None:
    cfg = grouped(tiny(None), [{"pattern": pattern} for pattern in patterns])
    with pytest.raises(ConfigError, match=words):
        components_of(cfg, [32])
    with pytest.raises(ConfigError, match=words):
        run_training(single_process_mesh(), cfg, tmp_path / "run")


def test_the_dry_run_and_the_start_show_the_groups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = "optimizer.groups=[dict(pattern='*norm*', lr=0.003, weight_decay=0.5, betas=(0.8, 0.9))]"
    planned = run("train.py", "--config", str(ROOT / "configs" / "tiny.py"), "--dry-run", given, folder=tmp_path)
    assert planned.code == 0, planned.output
    (row,) = [line.split() for line in planned.output.splitlines() if "*norm*" in line]
    assert row == ["*norm*", "(no_decay)", "adamw", "0.003", "0.5", "betas", "0.8,", "0.9", "320", "0.00", "0.01"]
    caplog.set_level("INFO")
    run_training(single_process_mesh(), grouped(tiny(None), [{"pattern": "*norm*", "lr": 5e-3}]), tmp_path / "run")
    lines = [record.message for record in caplog.records if record.message.startswith("group ")]
    (line,) = [line for line in lines if "*norm*" in line]
    assert len(lines) == 3
    assert line == (
        "group *norm* (no_decay): adamw, lr 0.005, weight decay 0, betas 0.9, by step; 160 parameters in 5 tensors"
    )


def test_groups_train_the_same_in_every_layout_and_resume_bit_for_bit(tmp_path: Path) -> None:
    """Rates of a resumed step are set from the step, not added to; a tied weight, of which two pipeline ranks hold a
    copy, is in one group and counts once in the norm."""
    groups = [{"pattern": "*norm*", "lr": 5e-3, "weight_decay": 0.2}, {"pattern": "layers.1.*", "betas": [0.8, 0.9]}]
    groups += [{"pattern": "*embed*", "lr": 1e-4}]
    sections = {"optimizer": {"groups": groups}, "adam": {"lr": 1e-3, "weight_decay": 0.1}}
    check_layouts([name for name in LAYOUTS if name != "dp2 replicas"], sections, tmp_path)


def test_the_planner_counts_what_groups_hold_and_move() -> None:
    groups = [{"pattern": "*norm*", "lr": 5e-3}, {"pattern": "layers.1.*", "weight_decay": 0.0}]
    cfg = grouped(tiny(None, model={"dtype": "torch.bfloat16"}, grad_scaler={}), groups)
    units = units_of(build_stages(cfg, plan_mesh(Sizes(), 0, torch.device("meta")), AttentionBackend.SDPA))
    optimizer = HybridZeroOptimizer(units, cfg, plan_mesh(Sizes(), 0, torch.device("meta")), torch.bfloat16)
    shares = {share.name: share for share in components_of(cfg, [32]).groups}
    elements = dict.fromkeys(shares, 0)
    for bucket in optimizer.buckets:
        elements[bucket.kind.group.name] += bucket.numel
    assert {name: share.parameters for name, share in shares.items()} == elements
    for share in shares.values():
        assert share.state == 8 * share.parameters, "two fp32 moments"
        assert share.traffic == (4 + 8 + 16) * share.parameters, "gradient read; master, moments read and written"
