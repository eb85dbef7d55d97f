"""Muon against torch's, and what it leaves alone: other parameters, skipped steps, zero gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from internlm_lite.config.schema import Config
from internlm_lite.mesh.layout import Parameter, parameter, split, whole
from internlm_lite.mesh.mesh import Group, Mesh, single_process_mesh
from internlm_lite.models.stages import meta_model
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.groups import ParamGroup, ParamGroups
from internlm_lite.optim.muon import Muon, matrices_of, matrix_shapes
from internlm_lite.optim.newton_schulz import iteration_flops
from internlm_lite.optim.update_rule import Piece, Shard
from internlm_lite.optim.whole import share_out
from tests.train.runs import tiny
from tests.world import run_world

LR, DECAY = 0.02, 0.1
QKV = (12, 4, 4)
"""Three query heads for each of two key/value heads of four features: rows q q q k v q q q k v."""
SHAPES: list[tuple[tuple[int, int], tuple[int, ...]]] = [
    ((40, 24), QKV),
    ((24, 24), (24,)),
    ((64, 24), (64,)),
    ((24, 64), (24,)),
    ((63, 63), (63,)),
]
STEPS = 20


def muon_of(**options: Any) -> ParamGroup:
    cfg = tiny(None, adam={"lr": LR, "weight_decay": DECAY}, optimizer={"name": "muon", **options})
    param = matrix((8, 8), (8,), "w", torch.float64)
    return ParamGroups(cfg).of(param)


def matrix(
    shape: tuple[int, int], rows: tuple[int, ...], name: str, dtype: torch.dtype, tp: Group | None = None, dim: int = 0
) -> Parameter:
    made = parameter(whole(name, shape) if tp is None else split(name, shape, dim, tp), dtype, "cpu")
    made.matrix_rows = rows
    return made


def numbers(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shard_of(params: list[Parameter], dtype: torch.dtype, holders: Group | None = None) -> Shard:
    """Of these parameters, with one element of padding before each."""
    pieces, start = [], 1
    for param in params:
        pieces.append(Piece(param, start, start + param.numel(), 0))
        start += param.numel() + 1
    return Shard(torch.zeros(start, dtype=dtype), {"exp_avg": torch.zeros(start, dtype=dtype)}, tuple(pieces), holders)


def flat_of(shard: Shard, values: list[torch.Tensor]) -> torch.Tensor:
    flat = torch.zeros_like(shard.weights)
    for piece, value in zip(shard.pieces, values, strict=True):
        flat[piece.start : piece.stop] = value.reshape(-1).to(flat.dtype)
    return flat


def in_shard(shard: Shard, flat: torch.Tensor) -> list[torch.Tensor]:
    return [flat[piece.start : piece.stop].view(piece.param.shape) for piece in shard.pieces]


def step(rule: Muon, grads: list[torch.Tensor], lr: float = LR, *, skipped: bool = False) -> None:
    rule.update(grads, torch.tensor(lr, dtype=torch.float64), 0.95, torch.tensor(skipped))


def all_params(dtype: torch.dtype) -> list[Parameter]:
    return [matrix(shape, rows, f"w{i}", dtype) for i, (shape, rows) in enumerate(SHAPES)]


def rule_with(group: ParamGroup, dtype: torch.dtype) -> tuple[Muon, Shard]:
    shard = shard_of(all_params(dtype), dtype)
    start = [numbers(shape, seed) for seed, (shape, _) in enumerate(SHAPES)]
    shard.weights.copy_(flat_of(shard, start))
    return Muon([shard], group), shard


def grads_of(shard: Shard, seed: int, factor: float = 1) -> torch.Tensor:
    return flat_of(shard, [factor * numbers(shape, 100 * seed + i) for i, (shape, _) in enumerate(SHAPES)])


def separate(shard: Shard, flat: torch.Tensor) -> list[torch.Tensor]:
    """The logical matrices, as a model with a parameter for each would have them."""
    return [
        part.reshape(-1, part.shape[-1]).clone()
        for piece, found in zip(shard.pieces, in_shard(shard, flat), strict=True)
        for part in matrices_of(found, piece.param)
    ]


class TorchMuon:
    """torch.optim.Muon on the logical matrices."""

    def __init__(self, shard: Shard, **options: Any) -> None:
        self.shard = shard
        self.params = [torch.nn.Parameter(part) for part in separate(shard, shard.weights)]
        self.optimizer = torch.optim.Muon(self.params, lr=LR, weight_decay=DECAY, **options)

    def step(self, grads: torch.Tensor, lr: float) -> None:
        for param, grad in zip(self.params, separate(self.shard, grads), strict=True):
            param.grad = grad
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    @property
    def momenta(self) -> list[torch.Tensor]:
        return [self.optimizer.state[param]["momentum_buffer"] for param in self.params]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "torchs"), [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_twenty_steps_equal_torchs(nesterov: bool, scale: str, torchs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused projection equals separate parameters, unequal ones too, with interleaved rows. The momentum is stored as
    torch's, an average: an iteration that ignores scale would hide another one, until it is converted or scheduled."""
    monkeypatch.setattr(
        torch.Tensor, "bfloat16", torch.Tensor.clone
    )  # torch's iteration, in the dtype of the gradients
    rule, shard = rule_with(muon_of(nesterov=nesterov, update_scale=scale), torch.float64)
    other = TorchMuon(shard, nesterov=nesterov, adjust_lr_fn=torchs)
    for index in range(STEPS):
        lr = LR / (index + 1)
        other.step(grads_of(shard, index), lr)
        step(rule, [grads_of(shard, index)], lr)
        if index == 2:
            found = separate(shard, shard.state["exp_avg"])
            torch.testing.assert_close(found, other.momenta, rtol=1e-12, atol=1e-14)
        expected = [param.data for param in other.params]
        torch.testing.assert_close(separate(shard, shard.weights), expected, rtol=1e-10, atol=1e-12)


def test_a_step_in_bf16_equals_torchs_to_its_rounding() -> None:
    """torch casts before it divides by the norm."""
    rule, shard = rule_with(muon_of(ns_dtype="torch.bfloat16"), torch.float32)
    before, other = shard.weights.clone(), TorchMuon(shard, adjust_lr_fn="match_rms_adamw")
    start = separate(shard, before)
    other.step(grads_of(shard, 0), LR)
    step(rule, [grads_of(shard, 0)])
    for ours, theirs, old in zip(separate(shard, shard.weights), other.params, start, strict=True):
        assert (ours - theirs).norm() < 0.04 * (ours - old).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_step_changes_no_bit(dtype: torch.dtype) -> None:
    rule, shard = rule_with(muon_of(), dtype)
    step(rule, [grads_of(shard, 0)])
    before = [tensor.clone() for tensor in (shard.weights, shard.state["exp_avg"])]
    for bad in (torch.nan, torch.inf, 1.0):
        step(rule, [torch.full_like(shard.weights, bad)], skipped=True)
    for old, new in zip(before, (shard.weights, shard.state["exp_avg"]), strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    fresh, other = rule_with(muon_of(), dtype)
    step(fresh, [grads_of(other, 0)])
    for each in (rule, fresh):
        step(each, [grads_of(shard, 1)])
    assert torch.equal(shard.weights, other.weights)


@pytest.mark.parametrize("ns_dtype", [None, "torch.bfloat16"])
def test_a_zero_gradient_decays_alone(ns_dtype: str | None) -> None:
    """As of a matrix behind a zero matrix at the start: its norm is 0, and must not divide."""
    rule, shard = rule_with(muon_of(ns_dtype=ns_dtype), torch.float32)
    expected = shard.weights - shard.weights * DECAY * LR
    step(rule, [torch.zeros_like(shard.weights)])
    torch.testing.assert_close(shard.weights, expected)
    assert not shard.state["exp_avg"].any()


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**-13, 2.0**16, 2.0**50])
@pytest.mark.parametrize("ns_dtype", [None, "torch.bfloat16"])
def test_a_step_does_not_depend_on_the_scale_of_gradients(factor: float, ns_dtype: str | None) -> None:
    """A loss scale that is left on overflows in a cast to fp16; small gradients stay below a clamp of the norm."""
    found = []
    for scale in (1.0, factor):
        rule, shard = rule_with(muon_of(ns_dtype=ns_dtype), torch.float32)
        step(rule, [grads_of(shard, 0, scale)])
        found.append(shard.weights)
    assert torch.equal(*found)


def group_table(**model: Any) -> dict[str, tuple[str, str]]:
    cfg = tiny(None, model={"no_bias": False, **model}, optimizer={"name": "muon"}, adam={"weight_decay": DECAY})
    params = list(meta_model(cfg.model).parameters())
    groups = ParamGroups(cfg)
    made = build_buckets(params, single_process_mesh(torch.device("meta")).zero, cfg)  # type: ignore[arg-type]
    found = {slot.param.shard_spec.name: bucket.kind.group for bucket in made for slot in bucket.slots}
    assert len(found) == len(params) == sum(len(bucket.slots) for bucket in made), "each is in one group"
    assert all(groups.of(param) == found[param.shard_spec.name] for param in params)  # type: ignore[arg-type, attr-defined]
    return {name: (group.name, group.rule) for name, group in found.items()}


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tie_word_embeddings": True},
        {"position": "learned", "max_position_embeddings": 64, "head_bias": True, "norm_type": "layernorm"},
        {"mlp_type": "gelu", "mlp_bias": True, "qk_norm": "full"},
    ],
)
def test_who_is_in_which_group(model: dict[str, Any]) -> None:
    """Found by what a parameter is, not by its name: tables and the head, tied or not, are matrices, and not Muon's."""
    table = group_table(**model)
    assert {name for name, group in table.items() if group == ("muon", "muon")} == {
        name
        for name in table
        if name.startswith("layers.")
        and name.endswith(".weight")
        and name.split(".")[-2] in ("wqkv", "wo", "w1", "w2", "w3")
    }
    assert set(table.values()) == {("muon", "muon"), ("decay", "adamw"), ("no_decay", "adamw")}
    tables = [name for name, group in table.items() if group == ("decay", "adamw")]
    assert tables[-1] == "tok_embeddings.weight" and ("output.weight" in tables) != model.get(
        "tie_word_embeddings", False
    )


def test_the_layers_say_where_their_matrices_are() -> None:
    """Rows of a fused projection: those of its query heads, then of a key and a value head, again for each group."""
    cfg = tiny(None, model={"num_attention_heads": 8, "num_kv_attention_heads": 2, "head_dim": 6})
    by_name = {param.shard_spec.name: param for param in meta_model(cfg.model).parameters()}  # type: ignore[attr-defined]
    wqkv = by_name["layers.0.attention.wqkv.weight"]
    assert wqkv.matrix_rows == (24, 6, 6)
    assert matrix_shapes(wqkv) == [(48, 32), (12, 32), (12, 32)]
    rows = torch.arange(72.0).view(72, 1).expand(72, 32).contiguous()
    q, k, v = (part.reshape(-1, 32)[:, 0].int().tolist() for part in matrices_of(rows, wqkv))
    assert q == [*range(24), *range(36, 60)] and k == [*range(24, 30), *range(60, 66)] and v == [i + 6 for i in k]
    assert matrix_shapes(by_name["layers.0.feed_forward.w2.weight"]) == [(32, 96)]


def test_hyperparameters_of_the_groups() -> None:
    group = muon_of()
    assert (group.lr, group.weight_decay, group.momentum) == (LR, DECAY, 0.95)
    group = muon_of(muon_lr=0.5, muon_weight_decay=0.0, momentum=0.9)
    assert (group.lr, group.weight_decay, group.momentum) == (0.5, 0.0, 0.9)


def _step_on_ranks(mesh: Mesh, dtype: torch.dtype) -> list[torch.Tensor]:
    """Parts of the weights after two steps; each rank holds its part of every matrix and of every gradient."""
    params = [
        matrix(shape, rows, f"w{i}", dtype, mesh.tp, int(shape[0] == 63 or shape == (24, 64)))
        for i, (shape, rows) in enumerate(SHAPES)
        if shape != (63, 63)
    ]
    shard = shard_of(params, dtype, mesh.tp if mesh.tp.size > 1 else None)

    def parts(seed: int) -> list[torch.Tensor]:
        wholes = [numbers(param.shard_spec.shape, seed + i) for i, param in enumerate(params)]  # type: ignore[arg-type]
        return [
            value[tuple(slice(*side) for side in param.shard_spec.box)]
            for value, param in zip(wholes, params, strict=True)
        ]

    shard.weights.copy_(flat_of(shard, parts(0)))
    rule = Muon([shard], muon_of())
    for index in (1, 2):
        step(rule, [flat_of(shard, parts(100 * index))])
    return [found.clone() for found in in_shard(shard, shard.weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_parallel_ranks_compute_the_bits_of_one(dtype: torch.dtype) -> None:
    """The iteration is done on whole matrices: one on a part gives another direction, though gradients agree."""
    (alone,) = run_world(_step_on_ranks, 1, (dtype,))
    for size in (2, 4):
        ranks = run_world(_step_on_ranks, size, (dtype,), tensor=size)
        for parts, expected in zip(zip(*ranks, strict=True), alone, strict=True):
            joined = torch.cat(parts, dim=int(parts[0].shape[0] == expected.shape[0]))
            assert torch.equal(joined, expected)


def zero_group(size: int) -> Group:
    return replace(single_process_mesh().zero, ranks=tuple(range(size)))


def layout(sizes: int, params: list[Parameter], **zero: Any) -> list[Bucket]:
    cfg = tiny(None, optimizer={"name": "muon"}, hybrid_zero_optimizer={"reduce_bucket_size": 10**9, **zero})
    return build_buckets(params, zero_group(sizes), Config.model_validate(cfg.model_dump()))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_no_matrix_is_cut(ranks: int) -> None:
    """Neither by alignment (63 x 63 is no multiple of it) nor where there are more ranks than matrices."""
    params = [matrix((63, 63), (63,), f"w{i}", torch.float32) for i in range(5)]
    (bucket,) = layout(ranks, params)
    assert all(slot.start // bucket.shard_size == (slot.stop - 1) // bucket.shard_size for slot in bucket.slots)
    assert sum(bucket.elements_on(rank) for rank in range(ranks)) == 5 * 63 * 63
    assert max(bucket.elements_on(rank) for rank in range(ranks)) == -(-5 // ranks) * 63 * 63


def test_work_is_divided_by_its_cost() -> None:
    """Wide fused projections have as many elements as a square matrix, and a fraction of the work. No shard is larger
    than if elements alone were divided, and later buckets make up for earlier ones."""
    square = [matrix((64, 64), (64,), f"s{i}", torch.float32) for i in range(8)]
    fused = [matrix((64, 64), (4, 4), f"f{i}", torch.float32) for i in range(8)]
    cost = {param: sum(iteration_flops(*shape, 5) for shape in matrix_shapes(param)) for param in square + fused}
    assert cost[square[0]] > 2 * cost[fused[0]]
    for size in (10**9, 5 * 64 * 64):
        buckets = layout(4, [*square, *fused], reduce_bucket_size=size)
        loads = [0, 0, 0, 0]
        for bucket in buckets:
            assert bucket.shard_size <= -(-len(bucket.slots) // 4) * 64 * 64
            for slot in bucket.slots:
                loads[slot.start // bucket.shard_size] += cost[slot.param]
        assert max(loads) - min(loads) <= cost[square[0]]


def test_owners_among_tensor_parallel_ranks() -> None:
    loads = [0, 0]
    assert share_out([5, 1, 4], loads) == [0, 1, 1] and loads == [5, 5]
    assert share_out([1, 2], loads) == [1, 0] and loads == [7, 6]
