"""Norms of families against transformers in float64: OLMo 2, Gemma 2 and StableLM, without their other parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from internlm_lite.models.decoder import Transformer
from tests.models.small import VOCAB, row_of, small_model

transformers = pytest.importorskip("transformers")

SHAPE = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 10},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": False},
}
OURS = {"hidden_size": 64, "mlp_ratio": 0.75, "num_layers": 2, "num_attention_heads": 4, "num_kv_attention_heads": 2}
AFTER = {"attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
AROUND = {
    **{"attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm"},
    **{"ffn_norm": "pre_feedforward_layernorm", "ffn_post_norm": "post_feedforward_layernorm"},
}
BEFORE = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
PLAIN = {"hidden_activation": "silu", "attn_logit_softcapping": None, "final_logit_softcapping": None}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "olmo2": ({"head_dim": 16}, {"norm_position": "reordered", "qk_norm": "full"}, AFTER),
    "gemma2": (
        {**PLAIN, "query_pre_attn_scalar": 10, "layer_types": ["full_attention"] * 2},
        {"head_dim": 10, "norm_position": "sandwich", "zero_centered_norm": True},
        AROUND,
    ),
    "stablelm": (
        {"head_dim": 16, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        {"norm_type": "layernorm"},
        BEFORE,
    ),
}
"""(keys of config.json, keys of ours, names of norms)."""


def theirs_of(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family][0]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    generator = torch.Generator().manual_seed(3)
    for param in model.parameters():
        nn.init.normal_(param, 0.3 if param.dim() == 1 else 0, 0.2, generator=generator)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps, offset = getattr(module, "variance_epsilon", None) or module.eps, float(family == "gemma2")
            module.forward = in_float64(module, eps, offset)
    model.model.rotary_emb.forward = angles
    return model


def in_float64(module: Any, eps: float, offset: float) -> Any:
    return lambda x: (module.weight + offset) * (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())


def angles(x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    head_dim = angles.head_dim  # type: ignore[attr-defined]
    radians = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = position_ids[..., None].double() * radians
    return torch.cat((angle, angle), dim=-1).cos(), torch.cat((angle, angle), dim=-1).sin()


def their_tensors(model: Any, ours: Transformer, which: str = "data") -> dict[str, torch.Tensor]:
    """By our names: parameters, or with "grad" their gradients."""
    found = {name: getattr(param, which) for name, param in model.named_parameters()}
    norms, made = FAMILIES[model.config.model_type][2], {}
    kv_heads, head_dim = ours.config.kv_heads, ours.config.head_size
    for n in range(len(ours.blocks())):
        there = f"model.layers.{n}"
        q, k, v = (found[f"{there}.self_attn.{x}_proj.weight"].unflatten(0, (kv_heads, -1, head_dim)) for x in "qkv")
        made[f"layers.{n}.attention.wqkv.weight"] = torch.cat((q, k, v), dim=1).flatten(0, 2)
        made[f"layers.{n}.attention.wo.weight"] = found[f"{there}.self_attn.o_proj.weight"]
        for one, other in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            made[f"layers.{n}.feed_forward.{one}.weight"] = found[f"{there}.mlp.{other}_proj.weight"]
        renamed = {**norms, "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
        for kind in ("weight", "bias"):
            pairs = {f"layers.{n}.{one}.{kind}": f"{there}.{other}.{kind}" for one, other in renamed.items()}
            pairs[f"norm.{kind}"] = f"model.norm.{kind}"
            made |= {one: found[other] for one, other in pairs.items() if other in found}
    scale = ours.config.hidden_size**0.5 if model.config.model_type == "gemma2" else 1.0
    embedding = found["model.embed_tokens.weight"]
    made["tok_embeddings.weight"] = embedding * scale if which == "data" else embedding / scale
    made["output.weight"] = found["lm_head.weight"]
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_theirs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, **_: torch.softmax(x, dim))  # not in float32
    theirs = theirs_of(family)
    eps = getattr(theirs.config, "rms_norm_eps", None) or theirs.config.layer_norm_eps
    ours = small_model(**OURS, **FAMILIES[family][1], no_bias=True, layer_norm_epsilon=eps)
    angles.head_dim = ours.config.head_size  # type: ignore[attr-defined]
    weights = their_tensors(theirs, ours)
    assert weights.keys() == dict(ours.named_parameters()).keys()
    for name, param in ours.named_parameters():
        param.data.copy_(weights[name])
    doc = torch.randint(1, VOCAB, (11,), generator=torch.Generator().manual_seed(1))  # 0 is their padding
    tokens, positions, labels, attend = row_of([doc])
    expected = theirs(tokens[None]).logits[0]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours.hidden(tokens, positions, attend)), expected, rtol=0, atol=1e-10)
    nn.functional.cross_entropy(expected, labels, reduction="sum").backward()
    ours.losses(ours.hidden(tokens, positions, attend), labels, torch.ones(())).scaled_sum.backward()
    wanted = their_tensors(theirs, ours, "grad")
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param.grad, wanted[name], rtol=0, atol=1e-9, msg=name)
