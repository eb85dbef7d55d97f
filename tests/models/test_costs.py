"""What layers say that they cost, against what torch counts: every layer class, every shape of model in the tests."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import internlm_lite.layers
import internlm_lite.models
from internlm_lite.config.load import load_config
from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.layers.attention import Attention
from internlm_lite.layers.costs import CostedLayer, RowShape
from internlm_lite.layers.cross_attention import CrossAttention, Memory
from internlm_lite.layers.dropout import Dropout, Site, SplitDropout, token_keys
from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.flash import Attend, AttentionBackend, Borders, packed_across, packed_sdpa
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns
from internlm_lite.layers.mlp import FeedForward
from internlm_lite.layers.norm import NORMS, FullRMSNorm, full_norms
from internlm_lite.layers.positions import LearnedPositions
from internlm_lite.layers.rope import Rotary, rope_frequencies
from internlm_lite.layers.source_side import SourceEmbedding, SourceNorm
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh.mesh import plan_mesh, single_process_mesh, sizes_of
from internlm_lite.models import decoder
from internlm_lite.models.decoder import (
    Block,
    EncoderBlock,
    SourceDropout,
    SourceRow,
    StageSpec,
    Transformer,
    tensor_parallel_context,
)
from internlm_lite.models.head import Head
from internlm_lite.models.stages import meta_model, model_flops_per_token
from tests.apps.planner.test_memory import SHAPES
from tests.apps.planner.test_traffic import LAYOUTS
from tests.cli import ROOT
from tests.models.counted import counted_flops, saved_bytes
from tests.models.small import small_config
from tests.models.test_tensor_parallel import CASES

T = 24
ABSTRACT = {"CostedLayer", "_Linear", "Norm", "OnSource"}
"""Bases, which no model contains."""


@dataclass
class Ready:
    """A layer and its inputs: one row of documents with these `boundaries`."""

    layer: CostedLayer
    run: Callable[[], torch.Tensor]
    known: tuple[torch.Tensor, ...]
    """Tensors that are kept but belong to another layer: the batch, the rotary table."""


Build = Callable[[ModelConfig, TensorParallelContext, torch.device, tuple[int, ...]], Ready]


def hidden(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, width: int = 0) -> torch.Tensor:
    return torch.randn(T, width or config.hidden_size, device=device).to(tp_ctx.dtype).requires_grad_()


def rotary_of(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device) -> Rotary:
    return Rotary(torch.arange(T, device=device), rope_frequencies(config, torch.device(device)), tp_ctx.dtype)


def plain(make: Callable[[ModelConfig, TensorParallelContext], Any]) -> Build:
    """Of layers that are called with the hidden state alone."""

    def build(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
        layer, x = make(config, tp_ctx), hidden(config, tp_ctx, device)
        return Ready(layer, lambda: layer(x), ())

    return build


def dropout(kind: type[Dropout]) -> Build:
    def build(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
        layer, x = kind(0.5, 0, Site.EMBEDDING, config.hidden_size, tp_ctx), hidden(config, tp_ctx, device)
        keys = token_keys(1, 0, torch.tensor([0], device=device), T)
        return Ready(layer, lambda: layer(x, keys[0]), (keys,))

    return build


def build_columns(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
    layer = ColumnLinear("c", config.hidden_size, 40, tp_ctx, init_std=0.1, bias=True)
    x = hidden(config, tp_ctx, device)
    return Ready(layer, lambda: columns(x, layer)[0], ())


def build_full_norm(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
    layer, x = FullRMSNorm("n", config, tp_ctx, heads=(4, 6)), hidden(config, tp_ctx, device, 24)
    return Ready(layer, lambda: full_norms((x,), (layer,))[0], ())


def build_embedding(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
    layer, tokens = Embedding("e", config, tp_ctx), torch.zeros(T, dtype=torch.int64, device=device)
    return Ready(layer, lambda: layer(tokens), (tokens,))


def build_positions(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
    config = config.model_copy(update={"max_position_embeddings": T})
    layer, positions = LearnedPositions("p", config, tp_ctx), torch.arange(T, device=device)
    return Ready(layer, lambda: layer(positions), (positions,))


def build_with_attention(make: Callable[[ModelConfig, TensorParallelContext], Any]) -> Build:
    def build(
        config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, boundaries: tuple[int, ...]
    ) -> Ready:
        layer, x, rotary = make(config, tp_ctx), hidden(config, tp_ctx, device), rotary_of(config, tp_ctx, device)
        attend, source = packed_sdpa(boundaries), hidden(config, tp_ctx, device)
        beside = (None, Memory(source, across(boundaries))) if layer_reads_source(layer) else ()
        return Ready(layer, lambda: layer(x, rotary, attend, *beside), (rotary.cos, rotary.signed_sin, source))

    return build


def layer_reads_source(layer: nn.Module) -> bool:
    return isinstance(layer, Block) and layer.cross_attention is not None


def across(boundaries: tuple[int, ...]) -> Attend:
    """Of documents to as long ones of another row."""
    borders = Borders(torch.tensor(boundaries, dtype=torch.int32), boundaries, T)
    return packed_across(AttentionBackend.SDPA, borders, borders)


def build_cross_attention(
    config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, boundaries: tuple[int, ...]
) -> Ready:
    layer, x, source = CrossAttention("c", 0, config, tp_ctx), *(hidden(config, tp_ctx, device) for _ in range(2))
    return Ready(layer, lambda: layer(x, Memory(source, across(boundaries))), (source,))


def build_source_embedding(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
    layer, tokens = SourceEmbedding("e", config, tp_ctx), torch.zeros(T, dtype=torch.int64, device=device)
    return Ready(layer, lambda: layer(tokens), (tokens,))


def build_head(config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, _: Any) -> Ready:
    layer, x = Head(config, LossConfig(label_smoothing=0.1), tp_ctx), hidden(config, tp_ctx, device)
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    labels, scale = torch.zeros(T, dtype=torch.int64, device=device), torch.ones((), device=device)
    return Ready(layer, lambda: layer(x, labels, scale).scaled_sum, (labels,))


def build_model(
    config: ModelConfig, tp_ctx: TensorParallelContext, device: torch.device, boundaries: tuple[int, ...]
) -> Ready:
    spec = StageSpec(range(config.num_blocks), first=True, last=True)
    layer = Transformer(config, LossConfig(label_smoothing=0.1), tp_ctx, AttentionBackend.SDPA, spec)
    tokens, labels, positions = (torch.zeros(T, dtype=torch.int64, device=device) for _ in range(3))
    attend, scale = packed_sdpa(boundaries), torch.ones((), device=device)
    assert layer.output is not None
    layer.output.matrix.main_grad = torch.zeros_like(layer.output.matrix)

    source = SourceRow(tokens, positions, attend, across(boundaries)) if config.num_encoder_layers else None

    def run() -> torch.Tensor:
        return layer.losses(layer.hidden(tokens, positions, attend, source=source), labels, scale).scaled_sum

    return Ready(layer, run, (tokens, labels, positions))


BUILDS: dict[type[nn.Module], Build] = {
    ColumnLinear: build_columns,
    RowLinear: plain(lambda c, ctx: RowLinear("r", c.hidden_size, 40, ctx, init_std=0.1, bias=True)),
    FeedForward: plain(lambda c, ctx: FeedForward("f", 0, c, ctx)),
    Dropout: dropout(Dropout),
    SplitDropout: dropout(SplitDropout),
    SourceDropout: dropout(SourceDropout),
    SourceEmbedding: build_source_embedding,
    SourceNorm: plain(lambda c, ctx: SourceNorm("n", c, ctx)),
    CrossAttention: build_cross_attention,
    Embedding: build_embedding,
    LearnedPositions: build_positions,
    FullRMSNorm: build_full_norm,
    Attention: build_with_attention(lambda c, ctx: Attention("a", 0, c, ctx)),
    Block: build_with_attention(lambda c, ctx: Block(c, c.num_encoder_layers, ctx)),
    EncoderBlock: build_with_attention(lambda c, ctx: EncoderBlock(c, 0, ctx)),
    Head: build_head,
    Transformer: build_model,
    **{norm: plain(lambda c, ctx, norm=norm: norm("n", c, ctx)) for norm in NORMS.values()},
}
"""A new norm is tested as soon as it is in NORMS; every other new layer gets a line here."""


def layer_classes() -> dict[str, type[nn.Module]]:
    """All modules that layers/ and models/ define."""
    found = {}
    for package in (internlm_lite.layers, internlm_lite.models):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            members = vars(importlib.import_module(info.name)).values()
            classes = [member for member in members if isinstance(member, type) and issubclass(member, nn.Module)]
            found.update({member.__name__: member for member in classes if member.__module__ == info.name})
    return found


def ready(
    build: Build, config: ModelConfig, boundaries: tuple[int, ...] = (0, T), device: str = "cpu"
) -> tuple[Ready, int]:
    """(the layer, FLOPs that it says a forward pass over the row takes)."""
    mesh = single_process_mesh(torch.device(device))
    made = build(config, tensor_parallel_context(config, mesh, by_sequence=False), mesh.device, boundaries)
    for param in made.layer.parameters():
        nn.init.constant_(param, 0.01)
    return made, T * made.layer.flops_per_token(T)


def test_every_layer_class_is_compared_with_the_counter() -> None:
    classes = {name: cls for name, cls in layer_classes().items() if name not in ABSTRACT}
    assert not [name for name, cls in classes.items() if not issubclass(cls, CostedLayer)], "layers without costs"
    assert set(classes.values()) == set(BUILDS), "layers without a line in BUILDS"


@pytest.mark.parametrize("cls", BUILDS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("shape", [{}, {"num_kv_attention_heads": None, "no_bias": True, "mlp_ratio": 5}], ids=str)
def test_a_layer_knows_its_flops(cls: type[nn.Module], shape: dict[str, Any]) -> None:
    made, forward = ready(BUILDS[cls], small_config(**shape))
    assert counted_flops(made.run) == (forward, 3 * forward)


@pytest.mark.parametrize("cls", BUILDS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("boundaries", [(0, T), (0, 5, 16, T)], ids=["one document", "several"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"checkpoint": "selective"},
        {"attention_softcap": 0.7},
        {"mlp_type": "gelu", "mlp_bias": True, "head_bias": True, "embed_scale": 2.0, "logit_softcap": 3.0},
        {"mlp_type": "relu", "mlp_bias": True, "checkpoint": "selective", "logit_scale": 0.5},
        {"mlp_type": "geglu_tanh", "checkpoint": "selective", "head_bias": True, "tie_word_embeddings": True},
        {"dtype": "torch.bfloat16", "use_fp32_norm": True, "embed_split_hidden": False},
        {"checkpoint": "selective", "norm_position": "reordered", "qk_norm": "full"},
        {"dtype": "torch.bfloat16", "norm_position": "sandwich", "zero_centered_norm": True, "norm_type": "layernorm"},
        {"num_encoder_layers": 2, "norm_position": "sandwich", "qk_norm": "head", "source_vocab_size": 48},
        {"num_encoder_layers": 1, "checkpoint": "selective", "qk_norm": "full", "embed_split_hidden": False},
        {"num_encoder_layers": 1, "checkpoint": "selective", "norm_position": "post", "dtype": "torch.bfloat16"},
    ],
    ids=str,
)
def test_a_layer_knows_what_it_saves(cls: type[nn.Module], boundaries: tuple[int, ...], shape: dict[str, Any]) -> None:
    made, _ = ready(BUILDS[cls], small_config(**shape), boundaries)
    row = RowShape(T, "cpu", attention_by_document=len(boundaries) > 2, reference=True, selective="checkpoint" in shape)
    row = replace(row, source_tokens=T)
    assert saved_bytes(made.run, made.layer, made.known) == sum(made.layer.saved_bytes(row).values())


def model_shapes() -> list[dict[str, Any]]:
    """The `model` sections of this suite, with windows of the whole row: blocks reach further than shorter ones."""
    of_ranks = [{k: v for k, v in case.items() if k in ModelConfig.model_fields} for case in CASES.values()]
    sections = [*SHAPES, *of_ranks, *(sections.get("model", {}) for _, sections in LAYOUTS.values())]
    sections = [{**section, "sliding_window": T} if "sliding_window" in section else section for section in sections]
    return [section for number, section in enumerate(sections) if section not in sections[:number]]


def expected_flops(model: Transformer, forward: int) -> tuple[int, int]:
    """(forward without gradients, forward and backward) of one row: recomputed layers run twice."""
    again = sum(T * block.flops_per_token(T) for block in model.blocks() if block.recompute)
    for block in model.blocks():
        if block.attention.rule.softcap is not None:  # scores are made again
            again += T * (block.flops_per_token(T) - block.flops_per_token(0))
    return forward, 3 * forward + again


@pytest.mark.parametrize("shape", model_shapes(), ids=str)
def test_every_model_of_the_tests_knows_its_flops(shape: dict[str, Any]) -> None:
    config = small_config(**shape)
    made, forward = ready(build_model, config)
    assert isinstance(made.layer, Transformer)
    assert counted_flops(made.run) == expected_flops(made.layer, forward)
    assert 3 * forward == T * model_flops_per_token(config, T)


@pytest.mark.parametrize("name", ["tiny", "7B_sft", "20B_sft"])
def test_the_models_of_configs_know_their_flops(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.py").config.model
    made, forward = ready(build_model, config, device="meta")
    assert isinstance(made.layer, Transformer)
    assert counted_flops(made.run) == expected_flops(made.layer, forward)


def test_tensor_parallel_ranks_give_the_flops_of_all_ranks() -> None:
    mesh = plan_mesh(sizes_of(2, 2, 1, -1), 1, torch.device("meta"))
    half = decoder.build_model(small_config(), LossConfig(), mesh, AttentionBackend.SDPA)
    assert half.flops_per_token(T) == meta_model(small_config()).flops_per_token(T)
