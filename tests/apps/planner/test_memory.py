"""Saved bytes that the model states, against what autograd keeps of the real model."""

from __future__ import annotations

from typing import Any

import pytest

from internlm_lite.apps.planner.memory import row_shape
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.apps.planner.kept import config, kept_bytes, planned, planned_stage, waiting_bytes
from tests.world import run_world

LOCAL = {
    "sliding_window": 32,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_local_base": 50.0,
}
"""Two rotary tables."""
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_kv_attention_heads": 2},
    {"num_kv_attention_heads": 1, "no_bias": True},
    {"dtype": "torch.bfloat16"},
    {"dtype": "torch.bfloat16", "use_fp32_norm": True},
    {"dtype": "torch.float64", "mlp_ratio": 4},
    {"apply_post_layer_norm": True},
    {"embed_split_hidden": False},
    {"embed_split_hidden": False, "tie_word_embeddings": True, "embed_grad_scale": 0.5},
    {"num_kv_attention_heads": 2, "qk_norm": "head", "head_dim": 6, "qkv_bias": False},
    {"dtype": "torch.bfloat16", "qk_norm": "head", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"dtype": "torch.bfloat16", "fp8": True},
    {"embedding_dropout": 0.1, "residual_dropout": 0.1},
    {"embedding_dropout": 0.1, "residual_dropout": 0.1, "checkpoint": "selective", "dtype": "torch.bfloat16"},
    {"attention_dropout": 0.1, "num_kv_attention_heads": 2, "apply_post_layer_norm": True, "residual_dropout": 0.1},
    {"mlp_type": "gelu", "mlp_bias": True, "head_bias": True},
    {"mlp_type": "geglu_tanh", "dtype": "torch.bfloat16", "logit_softcap": 3.0, "embed_scale": 5.6},
    {"mlp_type": "relu", "checkpoint": "selective", "logit_scale": 0.5},
    {
        "mlp_type": "gelu_tanh",
        "mlp_bias": True,
        "checkpoint": "selective",
        "dtype": "torch.bfloat16",
        "head_bias": True,
    },
    {"mlp_type": "geglu", "checkpoint": "selective"},
    {"mlp_type": "gelu", "mlp_bias": True, "dtype": "torch.bfloat16", "fp8": True},
    {"norm_type": "layernorm", "qk_norm": "head", "dtype": "torch.bfloat16"},
    {"norm_type": "layernorm", "norm_bias": False, "zero_centered_norm": True, "dtype": "torch.float64"},
    {"norm_position": "reordered", "qk_norm": "full", "num_kv_attention_heads": 2, "dtype": "torch.bfloat16"},
    {"norm_position": "sandwich", "zero_centered_norm": True, "dtype": "torch.bfloat16"},
    {"checkpoint": "selective", "norm_position": "reordered", "qk_norm": "full"},
    {"checkpoint": "selective", "norm_position": "sandwich", "norm_type": "layernorm", "qk_norm": "head"},
    {"position": "learned", "max_position_embeddings": 32},
    {"position": "learned", "max_position_embeddings": 40, "embed_split_hidden": False, "embed_grad_scale": 0.5},
    {"position": "sinusoidal", "dtype": "torch.bfloat16", "checkpoint": "selective"},
    {"position": "none", "embed_split_hidden": False},
    {"no_rope_every": 2, "num_kv_attention_heads": 1},
    {"no_rope_every": 2, "checkpoint": "selective", "num_kv_attention_heads": 2},
    {"no_rope_every": 3, "qk_norm": "head", "checkpoint": "selective"},
    {"no_rope_every": 1},
    {"partial_rotary_factor": 0.25},
    {"partial_rotary_factor": 0.5, "qk_norm": "head", "dtype": "torch.bfloat16"},
    {**LOCAL, "partial_rotary_factor": 0.5, "no_rope_every": 3},
    {**LOCAL, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
    {"attention_softcap": 0.7, "attention_scale": 0.4},
    {"attention_softcap": 0.7, "num_kv_attention_heads": 2, "dtype": "torch.bfloat16"},
    {"sliding_window": 24},
    {"num_encoder_layers": 2, "num_kv_attention_heads": 2, "no_rope_every": 2},
    {"num_encoder_layers": 1, "norm_type": "sample_layernorm", "feed_forward_dropout": 0.1, "mlp_type": "relu"},
    {"num_encoder_layers": 2, "checkpoint": "selective", "feed_forward_dropout": 0.1, "qk_norm": "head"},
    {
        **{"num_encoder_layers": 3, "checkpoint": 2 / 3, "embed_split_hidden": False, "tie_word_embeddings": True},
        **{"tie_source_embeddings": True, "position": "sinusoidal", "embedding_dropout": 0.1, "residual_dropout": 0.1},
    },
    {"checkpoint": 1 / 3},
    {"checkpoint": "selective"},
    {"checkpoint": "selective", "dtype": "torch.bfloat16", "use_fp32_norm": True, "num_kv_attention_heads": 2},
    {"checkpoint": "selective", "apply_post_layer_norm": True},
    {"checkpoint": "selective", "attention_softcap": 0.7, "sliding_window": 24},
    {"checkpoint": 2 / 3, "apply_post_layer_norm": True, "num_kv_attention_heads": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planned_bytes_are_what_autograd_keeps(shape: dict[str, Any]) -> None:
    wanted = config(**shape)
    assert kept_bytes(single_process_mesh(), wanted) == sum(planned(wanted).values())


def test_windows_shorter_than_documents_keep_at_most_what_is_planned() -> None:
    """Of documents of 5, 11 and 16 tokens the reference keeps an output and statistics of the first alone."""
    wanted = config(sliding_window=10, layer_types=["sliding_attention", "full_attention"])
    (of_layer,) = {
        unit.attention.saved_bytes(row_shape(wanted, AttentionBackend.SDPA, "cpu"))["attention statistics"]
        for unit in planned_stage(wanted).blocks()
    }
    outputs = 2 * 27 * 32 * 4
    assert (
        kept_bytes(single_process_mesh(), wanted) == sum(planned(wanted).values()) - outputs - 2 * of_layer * 27 // 32
    )


def test_full_recomputation_keeps_the_rotary_table_outside_autograd() -> None:
    wanted = config(checkpoint=True)
    terms = planned(wanted)
    # The closures of the recomputation hold the table; autograd never sees it.
    assert kept_bytes(single_process_mesh(), wanted) == sum(terms.values()) - terms["rotary table"]


BF16 = {"num_kv_attention_heads": 2, "dtype": "torch.bfloat16"}


DEFERRED: list[dict[str, Any]] = [
    {},
    {**BF16, "checkpoint": "selective"},
    {**BF16, "fp8": True},
    {"mlp_type": "relu", "mlp_bias": True, "head_bias": True},
    {**BF16, "mlp_type": "gelu_tanh", "checkpoint": "selective"},
    {**BF16, "mlp_type": "gelu", "mlp_bias": True, "fp8": True},
]


@pytest.mark.parametrize("shape", DEFERRED, ids=str)
def test_deferred_weight_gradients_hold_what_is_planned(shape: dict[str, Any]) -> None:
    wanted = config(**shape)
    row = row_shape(wanted, AttentionBackend.SDPA, "cpu")
    assert waiting_bytes(wanted) == planned_stage(wanted).deferred_bytes(row)


def _kept_on_ranks(mesh: Mesh, shape: dict[str, Any]) -> int:
    return kept_bytes(mesh, config(parallel={"tensor": mesh.tp.size, **shape.pop("parallel", {})}, **shape))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_kv_attention_heads": 2, "embed_split_hidden": False, "checkpoint": "selective"},
        {"mlp_type": "gelu", "mlp_bias": True, "head_bias": True, "logit_softcap": 2.0, "embed_scale": 2.0},
        {"parallel_output": False, "embedding_dropout": 0.1, "residual_dropout": 0.1},
        {"norm_position": "reordered", "qk_norm": "full", "checkpoint": "selective", "num_kv_attention_heads": 2},
        {"norm_position": "sandwich", "norm_type": "layernorm", "qk_norm": "head"},
    ],
    ids=str,
)
def test_planned_bytes_hold_on_tensor_parallel_ranks(shape: dict[str, Any], sequence_parallel: bool) -> None:
    shape = {**shape, "parallel": {"sequence_parallel": sequence_parallel}}
    found = run_world(_kept_on_ranks, 2, (shape,), tensor=2)
    wanted = config(**{**shape, "parallel": {"tensor": 2, "sequence_parallel": sequence_parallel}})
    assert found == [sum(planned(wanted).values())] * 2


def test_sequence_parallelism_keeps_less() -> None:
    whole, split = (config(parallel={"tensor": 2, "sequence_parallel": on}) for on in (False, True))
    assert planned(split)["layer inputs"] * 2 == planned(whole)["layer inputs"]
    assert sum(planned(split).values()) < sum(planned(whole).values())
