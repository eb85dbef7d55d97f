"""Every update rule against a plain reimplementation, and what the optimizer asks of each of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.config.schema import AdamConfig, Config, OptimizerConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import parameter, whole
from internlm_lite.mesh.mesh import Mesh, Sizes, plan_mesh, single_process_mesh
from internlm_lite.models.stages import build_stages, units_of
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.groups import ParamGroup, ParamGroups
from internlm_lite.optim.lr_schedule import learning_rate
from internlm_lite.optim.rules import RULES, AdamW
from internlm_lite.optim.update_rule import Shard, UpdateStep
from internlm_lite.optim.updates import GroupUpdates
from internlm_lite.optim.zero import HybridZeroOptimizer
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
    train,
)
from tests.train.resumed import LAYOUTS, check_layouts
from tests.train.runs import tiny
from tests.world import run_world

ADAM = AdamConfig(lr=1e-2, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.97)
Bits = list[torch.Tensor]


STATE_TENSORS = {"adamw": 2, "adamw_cs336": 2, "lion": 1, "sgd": 0, "sgd 0.9": 1}
KINDS = list(STATE_TENSORS)
"""optimizer.name of every rule, and its momentum."""


def options_of(kind: str) -> OptimizerConfig:
    name, _, momentum = kind.partition(" ")
    return OptimizerConfig.model_validate({"name": name, "momentum": float(momentum or 0)})


def with_rule(kind: str, cfg: Config) -> Config:
    return Config.model_validate({**cfg.model_dump(), "optimizer": options_of(kind).model_dump()})


def group_of(kind: str, decays: bool = True) -> ParamGroup:
    cfg = with_rule(kind, Config.model_validate({**config().model_dump(), "adam": ADAM.model_dump()}))
    shape = (2, 2) if decays else (2,)
    return ParamGroups(cfg).of(parameter(whole("weight", shape), torch.float64, "meta"))


class TwoGroups:
    """A rule for two shards, of which the first has weight decay."""

    def __init__(self, kind: str, shards: list[Shard]) -> None:
        rule = RULES[options_of(kind).name]
        self.rules = [
            rule([shard], group_of(kind, decays)) for shard, decays in zip(shards, (True, False), strict=True)
        ]

    def update(self, grads: list[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for rule, grad in zip(self.rules, grads, strict=True):
            rule.update([grad], lr, beta2, skipped)

    def state_dict(self) -> dict[str, int]:
        first, second = (rule.state_dict() for rule in self.rules)
        assert first == second
        return first


def build(kind: str, dtype: torch.dtype = torch.float64) -> tuple[TwoGroups, list[Shard]]:
    """Zeros of both signs are among the weights."""
    rule = RULES[options_of(kind).name]
    generator = torch.Generator().manual_seed(1)
    shards = []
    for _ in range(2):
        weights = torch.randn(64, generator=generator, dtype=torch.float64).to(dtype)
        weights[:2] = torch.tensor([0.0, -0.0])
        shards.append(Shard(weights, {role: torch.zeros_like(weights) for role in rule.roles_with(group_of(kind))}))
    return TwoGroups(kind, shards), shards


def update(rule: TwoGroups, shards: list[Shard], step: int, skipped: bool = False, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(50 + step)
    grads = [torch.randn(64, generator=generator, dtype=torch.float64).to(shard.weights.dtype) for shard in shards]
    if value is not None:
        grads = [torch.full_like(grad, value) for grad in grads]
    lr = torch.tensor(1e-2 / (step + 1), dtype=torch.float64)
    rule.update(grads, lr, 0.97, torch.tensor(skipped))


def bits(shards: list[Shard]) -> Bits:
    """Of all tensors: -0.0 differs from 0.0, and nan equals itself."""
    integers = {4: torch.int32, 8: torch.int64}
    tensors = [tensor for shard in shards for tensor in (shard.weights, *shard.state.values())]
    return [tensor.view(integers[tensor.element_size()]).clone() for tensor in tensors]


def same(a: Bits, b: Bits) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def lion(cfg: Config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The training of `tests.optim.test_zero.reference` with Lion, as its paper writes it."""
    units = [Unit(f"layers.{i}", torch.float64) for i in range(4)]
    params = [param for unit in units for param in (unit.weight, unit.bias)]
    momenta = [torch.zeros_like(param) for param in params]
    adam, norms = cfg.adam, []
    for step in range(STEPS):
        total = torch.stack([loss_of(units, rows(step, m)) for m in range(MICRO)]).sum() / (MICRO * ROWS / 2)
        grads = torch.autograd.grad(total, params)
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        lr = learning_rate(step, adam.lr, cfg.lr_scheduler)
        for param, momentum, grad in zip(params, momenta, grads, strict=True):
            clipped = grad * min(1.0, 0.5 / (norms[-1] + 1e-6))
            direction = torch.sign(adam.adam_beta1 * momentum + (1 - adam.adam_beta1) * clipped)
            decay = adam.weight_decay if param.dim() > 1 else 0.0
            param.data -= lr * (direction + decay * param.data)
            momentum.copy_(cfg.beta2_scheduler.init_beta2 * momentum + (1 - cfg.beta2_scheduler.init_beta2) * clipped)
    return {p.shard_spec.name: p.detach() for p in params}, norms


def test_lion_equals_the_algorithm_of_its_paper() -> None:
    cfg = with_rule("lion", config())
    result = train(single_process_mesh(), cfg)
    assert_same_training(result, lion(cfg))
    assert {role for _, role in result["pieces"]} == {"master", "exp_avg"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sgd_equals_torchs(momentum: float, dtype: torch.dtype) -> None:
    """A step that is skipped in between counts neither in the weights nor in the momentum. torch's decay is part of the
    momentum, and so is compared without one."""
    rule, ours = build(f"sgd {momentum}", dtype)
    compared = [
        (shard, torch.nn.Parameter(shard.weights.clone())) for shard in ours if shard is ours[1] or not momentum
    ]
    theirs = [
        torch.optim.SGD([param], momentum=momentum, weight_decay=ADAM.weight_decay if shard is ours[0] else 0)
        for shard, param in compared
    ]
    for step in range(8):
        if step == 3:
            update(rule, ours, step, skipped=True, value=float("nan"))
            continue
        update(rule, ours, step)
        generator = torch.Generator().manual_seed(50 + step)
        grads = [torch.randn(64, generator=generator, dtype=torch.float64).to(dtype) for _ in ours]
        for (shard, param), optimizer in zip(compared, theirs, strict=True):
            param.grad = grads[0 if shard is ours[0] else 1]
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for shard, param in compared:
        torch.testing.assert_close(shard.weights, param.detach())
    assert [len(shard.state) for shard in ours] == [bool(momentum)] * 2


def _train_lion(mesh: Mesh) -> dict[str, Any]:
    return train(mesh, with_rule("lion", config()))


def test_lion_on_shards_equals_lion_on_one_process() -> None:
    for result in run_world(_train_lion, 2):
        assert_same_training(result, lion(with_rule("lion", config())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_has_the_bits_of_torchs_optimizer(dtype: torch.dtype) -> None:
    """A step that is skipped in between does not count."""
    rule, ours = build("adamw", dtype)
    _, theirs = build("adamw", dtype)
    params = [torch.nn.Parameter(shard.weights) for shard in theirs]
    groups = [
        {"params": [param], "weight_decay": decay}
        for param, decay in zip(params, (ADAM.weight_decay, 0.0), strict=True)
    ]
    torch_rule = torch.optim.AdamW(groups, betas=(0.9, 0.97), eps=ADAM.adam_eps, fused=True)
    for step in range(8):
        if step == 3:
            update(rule, ours, step, skipped=True, value=float("nan"))
            continue
        update(rule, ours, step)
        generator = torch.Generator().manual_seed(50 + step)
        for param in params:
            param.grad = torch.randn(64, generator=generator, dtype=torch.float64).to(dtype)
        for group in torch_rule.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        torch_rule.step()
    for shard, param in zip(ours, params, strict=True):
        assert torch.equal(shard.weights, param.detach())
        assert all(torch.equal(shard.state[role], torch_rule.state[param][role]) for role in AdamW.roles)
    assert rule.state_dict() == {"adam_steps": 7}


def handout(weights: list[float], grads: list[list[float]], lr: list[float], decay: float, eps: float) -> list[float]:
    """The algorithm of the CS336 handout, number by number, with the betas of `ADAM`."""
    m, v = [0.0] * len(weights), [0.0] * len(weights)
    for t, (step, rate) in enumerate(zip(grads, lr, strict=True), 1):
        for i, g in enumerate(step):
            m[i] = 0.9 * m[i] + (1 - 0.9) * g
            v[i] = 0.97 * v[i] + (1 - 0.97) * g * g
            now = rate * math.sqrt(1 - 0.97**t) / (1 - 0.9**t)
            weights[i] -= now * m[i] / (math.sqrt(v[i]) + eps)
            weights[i] -= rate * decay * weights[i]
    return weights


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adamw_cs336_is_the_algorithm_of_the_handout(eps: float) -> None:
    """A skipped step counts in no moment and not in t. A large eps shows that it is outside the bias correction."""
    group = replace(group_of("adamw_cs336"), eps=eps)
    start = torch.linspace(-1, 1, 8, dtype=torch.float64)
    state = {role: torch.zeros_like(start) for role in RULES["adamw_cs336"].roles}
    rule = RULES["adamw_cs336"]([Shard(start.clone(), state)], group)
    steps = [torch.randn(8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(20)]
    rates = [1e-2 / (n + 1) for n in range(20)]
    for n, grad in enumerate(steps):
        if n in (0, 7):
            nan = torch.full_like(grad, math.nan)
            rule.update([nan], torch.tensor(1.0, dtype=torch.float64), 0.97, torch.tensor(True))
        rule.update([grad.clone()], torch.tensor(rates[n], dtype=torch.float64), 0.97, torch.tensor(False))
    expected = handout(start.tolist(), [grad.tolist() for grad in steps], rates, group.weight_decay, eps)
    assert rule._shards[0].weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert rule.state_dict() == {"adam_steps": 20}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_skipped_update_changes_no_bit(name: str, value: float | None) -> None:
    rule, shards = build(name)
    update(rule, shards, 0, skipped=True, value=value)
    assert same(bits(shards), bits(build(name)[1]))
    update(rule, shards, 1)
    before, counters = bits(shards), rule.state_dict()
    update(rule, shards, 2, skipped=True, value=value)
    assert same(bits(shards), before) and rule.state_dict() == counters
    update(rule, shards, 3)
    assert not same(bits(shards), before)


@pytest.mark.parametrize("name", KINDS)
def test_a_rule_resumes_bit_for_bit_or_starts_again(name: str) -> None:
    cfg, mesh = with_rule(name, config()), single_process_mesh()

    def fresh() -> tuple[HybridZeroOptimizer, list[Unit]]:
        units = [Unit("layers.0", torch.float64)]
        return HybridZeroOptimizer(list(units), cfg, mesh, torch.float64), units

    def steps(optimizer: HybridZeroOptimizer, units: list[Unit], first: int, last: int) -> list[torch.Tensor]:
        for step in range(first, last):
            optimizer.begin(1)
            loss_of(units, rows(step, 0)).backward()
            optimizer.step(step, num_labels=8, global_tokens=8)
        return [piece.tensor.clone() for piece in optimizer.pieces()]

    first, units = fresh()
    saved, counters = steps(first, units, 0, 3), first.state_dict()
    whole = steps(first, units, 3, 6)
    second, units = fresh()
    for piece, tensor in zip(second.pieces(), saved, strict=True):
        piece.tensor.copy_(tensor)
    second.load_state_dict(counters, moments=True)
    second.publish_weights()
    assert all(torch.equal(a, b) for a, b in zip(steps(second, units, 3, 6), whole, strict=True))
    second.load_state_dict(counters, moments=False)
    assert all(not tensor.any() for _, state in second.shards() for role, tensor in state.items() if role != "master")
    assert second.state_dict() == {**counters, **fresh()[0]._updates.state_dict()}


class WholeAdamW(AdamW):
    """A rule that asks for whole matrices; what it computes is AdamW, so that results can be compared."""

    whole_matrices = True


def _train_whole(mesh: Mesh) -> tuple[dict[str, Any], list[tuple[int, list[tuple[int, int]]]]]:
    """(training, per bucket (shard size, [(start, stop)] of its parameters))."""
    RULES["adamw"] = WholeAdamW  # in this rank's own process
    cfg = config(reduce_bucket_size=1300)
    params = [param for i in range(5) for param in Unit(f"layers.{i}", torch.float64).parameters()]
    buckets: list[Bucket] = build_buckets(params, mesh.zero, cfg)  # type: ignore[arg-type]
    layout = [(bucket.shard_size, [(slot.start, slot.stop) for slot in bucket.slots]) for bucket in buckets]
    return train(mesh, cfg), layout


def test_a_rule_for_whole_matrices_gets_them_whole() -> None:
    results = run_world(_train_whole, 4)
    for result, layout in results:
        assert_same_training(result, reference(config()))
        for shard_size, spans in layout:
            assert all(start // shard_size == (stop - 1) // shard_size for start, stop in spans)
            assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False)), "no overlap"
    owners = [{name for name, role in result["pieces"] if role == "master"} for result, _ in results]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 8, "each parameter has one owner"
    assert sum(results[0][0]["elements"]) == 4 * (24 * 24 + 24)


@pytest.mark.parametrize("kind", ["lion", "sgd 0.9"])
def test_a_rule_trains_the_same_in_every_layout_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    adam = {
        "lr": 0.05 if "sgd" in kind else 1e-3,
        "weight_decay": 0.1,
        "weight_decay_on": "matrices_without_embeddings",
    }
    sections = {"optimizer": options_of(kind).model_dump(), "adam": adam}
    curves = check_layouts([name for name in LAYOUTS if name != "dp2 replicas"], sections, tmp_path)
    assert curves["dp2"][-1][0] < curves["dp2"][0][0], "the loss falls"


@pytest.mark.parametrize("name", KINDS)
def test_the_planner_counts_the_state_of_each_rule(name: str) -> None:
    cfg = with_rule(name, tiny(None, model={"dtype": "torch.bfloat16"}, grad_scaler={}))
    mesh = plan_mesh(Sizes(), 0, torch.device("meta"))
    units = units_of(build_stages(cfg, mesh, AttentionBackend.SDPA))
    optimizer = HybridZeroOptimizer(units, cfg, mesh, torch.bfloat16)
    ((held,), _) = holdings(cfg, Sizes(), AttentionBackend.SDPA)
    tensors = [tensor for _, state in optimizer.shards() for tensor in state.values()]
    assert len(tensors) == len(optimizer.buckets) * (1 + STATE_TENSORS[name])
    assert held.optimizer == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_all_groups_are_multiplied_in_one_launch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits of multiplying each of them first."""
    factor, lr = torch.tensor(0.3, dtype=torch.float64), torch.tensor([1e-2], dtype=torch.float64)
    rule, shards = build(name, dtype)
    rule.update(
        [torch.arange(64.0, dtype=dtype).sub_(20).mul_(factor) for _ in shards], lr[0], 0.97, torch.tensor(False)
    )
    expected = bits(shards)
    cfg = Config.model_validate({**config().model_dump(), "adam": ADAM.model_dump()})
    params = [parameter(whole(f"p{len(shape)}", shape), dtype, "cpu") for shape in ((64,), (8, 8))]
    single = single_process_mesh()
    made = GroupUpdates(build_buckets(params, single.zero, with_rule(name, cfg)), with_rule(name, cfg), single)
    assert [group.name for group in (rule._group for rule in made.rules)] == ["decay", "no_decay"]
    for shard, (_, first) in zip(made.shards, enumerate(build(name, dtype)[1]), strict=True):
        shard.weights[:64] = first.weights
    calls = []
    multiply = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *args: calls.append(len(args[0])) or multiply(*args))
    grads = [torch.cat([torch.arange(64.0, dtype=dtype) - 20, torch.zeros(192, dtype=dtype)]) for _ in shards]
    made.update(grads, UpdateStep(lr, 0.97, factor, torch.tensor(False)), torch.tensor(1))
    assert calls == [2]
    found = [Shard(s.weights[:64], {role: x[:64] for role, x in s.state.items()}) for s in made.shards]
    assert same(bits(found), expected)


def test_adamw_on_a_gpu_divides_gradients_in_its_kernel() -> None:
    """The same kernel on the CPU, asked as on CUDA: the factor's reciprocal in fp32, 1 ulp from multiplying. What the
    kernel reads is made once for all groups."""
    no, rates = torch.tensor(False), torch.tensor([1e-2], dtype=torch.float64)
    (rule, ours), (other, expected) = build("adamw", torch.float32), build("adamw", torch.float32)
    for step in range(3):
        grads = [torch.arange(64.0).sub_(20 + step) for _ in ours]
        shared = UpdateStep(rates, 0.97, torch.tensor(0.3 + step, dtype=torch.float64), no)
        for one, grad in zip(rule.rules, grads, strict=True):
            one.update_scaled([grad.clone()], shared, 0)
        assert shared.divisor is shared.divisor and shared.found_inf is shared.found_inf
        other.update([grad.mul_(shared.factor) for grad in grads], rates[0], 0.97, no)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.weights, theirs.weights, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mine.state["exp_avg_sq"], theirs.state["exp_avg_sq"], rtol=1e-6, atol=0)


LLAMA_8M = {
    **{"num_layers": 8, "hidden_size": 288, "num_attention_heads": 8, "num_kv_attention_heads": 4, "vocab_size": 4096},
    **{"multiple_of": 32, "no_bias": True, "tie_word_embeddings": True, "embed_split_hidden": False},
}
EMBEDDING = 4096 * 288


def decayed(on: str, pp: int = 1, **model: Any) -> list[dict[bool, int]]:
    """Per pipeline rank: parameters with and without weight decay."""
    cfg = tiny(None, model={**LLAMA_8M, **model}, adam={"weight_decay_on": on}, parallel={"pipeline": {"size": pp}})
    found = []
    for rank in range(pp):
        mesh = plan_mesh(Sizes(pp=pp), rank, torch.device("meta"))
        units = units_of(build_stages(cfg, mesh, AttentionBackend.SDPA))
        buckets = build_buckets([param for unit in units for param in unit.parameters()], mesh.zero, cfg)  # type: ignore[misc]
        found.append(
            {decay: sum(b.numel for b in buckets if (b.kind.group.name == "decay") is decay) for decay in (True, False)}
        )
    return found


def test_which_parameters_decay() -> None:
    """8,483,616 in all; a copy of a tied embedding, and an untied head, count as the places they are read in."""
    assert decayed("matrices") == [{True: 8_478_720, False: 4_896}]
    assert decayed("all") == [{True: 8_483_616, False: 0}]
    assert decayed("matrices_without_embeddings") == [{True: 8_478_720 - EMBEDDING, False: 4_896 + EMBEDDING}]
    assert decayed("matrices_without_embeddings", tie_word_embeddings=False) == [
        {True: 8_478_720, False: 4_896 + EMBEDDING}
    ]
    first, last = decayed("matrices_without_embeddings", pp=2)
    assert first[False] + last[False] == 4_896 + 2 * EMBEDDING, "both copies of a tied weight are updated alike"
    assert first[True] + last[True] == 8_478_720 - EMBEDDING
