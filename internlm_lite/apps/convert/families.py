"""What the families of Hugging Face's models call their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Family = Literal["llama", "mistral", "qwen2", "qwen3", "phi3", "internlm", "internlm2", "internlm3"]
"""`model_type` in Hugging Face's config.json."""
FAMILIES: tuple[Family, ...] = get_args(Family)

_LLAMA = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_STACKED = {
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), "mlp.gate_up_proj"),
}
_INTERNLM2 = {
    "tok_embeddings": "model.tok_embeddings",
    "norm": "model.norm",
    "output": "output",
    "layers": "model.layers",
    **{
        name: name
        for name in ("attention_norm", "attention.wqkv", "attention.wo", "ffn_norm")
        + ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    },
}
NAMES: Mapping[Family, Mapping[str, str]] = {
    **dict.fromkeys(FAMILIES, _LLAMA),
    "phi3": {**_LLAMA, **_STACKED},
    "internlm2": _INTERNLM2,
}
"""Our modules -> theirs; those of a layer without its number. `attention.q`, `.k` and `.v` are one after the other in
one tensor where they have the same name, and so are `feed_forward.w1` and `.w3`; with `attention.wqkv` instead the rows
are ordered as ours."""
TRANSPOSED: Mapping[Family, frozenset[str]] = {}
"""Modules whose weight is stored as [inputs, outputs]."""
