"""What each family of Hugging Face's models calls its tensors, and what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from internlm_lite.apps.convert.hf_rope import Rotation
from internlm_lite.apps.convert.hf_windows import Windows
from internlm_lite.errors import CheckpointError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "phi3", "internlm", "internlm2", "internlm3"]
"""`model_type` in Hugging Face's config.json."""
FAMILIES: tuple[Family, ...] = get_args(Family)

Key = tuple[str, Any]
"""A key of config.json, and what transformers takes where it is left out; for the required ones: None."""

SEPARATE = {
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
"""Our modules -> theirs; those of a layer without its number. `attention.q`, `.k` and `.v` follow each other in one
tensor where they have the same name, and so do `feed_forward.w1` and `.w3`; with `attention.wqkv` instead the rows are
ordered as ours."""
STACKED = {
    **SEPARATE,
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), "mlp.gate_up_proj"),
}
GROUPED = {
    "tok_embeddings": "model.tok_embeddings",
    "norm": "model.norm",
    "output": "output",
    "layers": "model.layers",
    **{name: name for name in ("attention_norm", "attention.wqkv", "attention.wo", "ffn_norm")},
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")},
}


class KeyGroup(Protocol):
    """Features that several keys say together."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our features. Raises CheckpointError for what our decoder lacks."""

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json."""


@dataclass(frozen=True)
class Activation:
    """That of the feed-forward part."""

    key: str = "hidden_act"
    names: Mapping[str, str] = field(default_factory=lambda: {"silu": "swiglu", "swish": "swiglu"})
    """Theirs -> model.mlp_type; the first is the default."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = config.get(self.key, next(iter(self.names)))
        if found not in self.names:
            raise CheckpointError(f"{self.key}: found {found!r}, expected {' or '.join(map(repr, self.names))}")
        return {}

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return {self.key: next(iter(self.names))}


@dataclass(frozen=True)
class Form:
    """A family."""

    architecture: str
    names: Mapping[str, str]
    keys: Mapping[str, Key]
    """Our feature (hf_config.py:features) -> its key."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Features that all models of the family have."""
    constants: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Key -> the one value that we can express, and its default."""
    groups: tuple[KeyGroup, ...] = (Activation(), Rotation())
    transposed: frozenset[str] = frozenset()
    """Our modules whose weight is stored as [inputs, outputs]."""


def _keys(more: Mapping[str, Key] | None = None, **defaults: Any) -> dict[str, Key]:
    """The keys of most families, with these besides or instead, and with these defaults."""
    keys: dict[str, Key] = {
        "vocab_size": ("vocab_size", None),
        "hidden_size": ("hidden_size", None),
        "mlp_width": ("intermediate_size", None),
        "num_layers": ("num_hidden_layers", None),
        "num_attention_heads": ("num_attention_heads", None),
        "num_kv_attention_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "layer_norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_word_embeddings": ("tie_word_embeddings", False),
        "init_std": ("initializer_range", 0.02),
        "max_positions": ("max_position_embeddings", 2048),
    }
    keys |= more or {}
    return keys | {feature: (keys[feature][0], default) for feature, default in defaults.items()}


def _without(keys: dict[str, Key], *features: str) -> dict[str, Key]:
    return {feature: key for feature, key in keys.items() if feature not in features}


_ATTENTION: dict[str, Key] = dict.fromkeys(("qkv_bias", "out_bias"), ("attention_bias", False))
_UNBIASED = {"qkv_bias": False, "out_bias": False}
_BIASED: dict[str, Key] = dict.fromkeys(("qkv_bias", "out_bias"), ("bias", True))
_QWEN = Windows(4096, lambda config, layer: layer >= config.get("max_window_layers", 28), flag="use_sliding_window")

FORMS: Mapping[Family, Form] = {
    "llama": Form("LlamaForCausalLM", SEPARATE, _keys(_ATTENTION), constants={"mlp_bias": (False, False)}),
    "mistral": Form(
        "MistralForCausalLM",
        SEPARATE,
        _keys(max_positions=131072),
        _UNBIASED,
        groups=(Activation(), Rotation(), Windows(4096, has_types=False)),
    ),
    "qwen2": Form(
        "Qwen2ForCausalLM",
        SEPARATE,
        _keys(max_positions=32768),
        {"qkv_bias": True, "out_bias": False},
        groups=(Activation(), Rotation(), _QWEN),
    ),
    "qwen3": Form(
        "Qwen3ForCausalLM",
        SEPARATE,
        _keys(_ATTENTION, head_dim=128, max_positions=32768),
        {"qk_norm": "head"},
        groups=(Activation(), Rotation(), _QWEN),
    ),
    "phi3": Form(
        "Phi3ForCausalLM",
        STACKED,
        _keys(layer_norm_epsilon=1e-5, max_positions=4096),
        _UNBIASED,
        groups=(Activation(), Rotation(kinds=()), Windows(None, has_types=False)),
    ),
    "internlm": Form(
        "InternLMForCausalLM",
        SEPARATE,
        _without(_keys(_BIASED), "num_kv_attention_heads", "head_dim"),
        groups=(Activation(), Rotation(kinds=(), has_rotary=True)),
    ),
    "internlm2": Form(
        "InternLM2ForCausalLM",
        GROUPED,
        _without(_keys(_BIASED), "head_dim"),
        groups=(Activation(), Rotation(kinds=())),
    ),
    "internlm3": Form(
        "InternLM3ForCausalLM",
        SEPARATE,
        _keys({"qkv_bias": ("qkv_bias", False)}),
        {"out_bias": False},
        {"bias": (False, False)},
    ),
}
