"""What each family of Hugging Face's models calls its tensors, and what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from internlm_lite.apps.convert.hf_rope import NoRopeKeys, RopeKeys
from internlm_lite.apps.convert.hf_windows import WindowKeys
from internlm_lite.config.schema import ModelConfig
from internlm_lite.errors import CheckpointError

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "olmo3",
    "smollm3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "internlm",
    "internlm2",
    "internlm3",
]
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


GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
PLAIN = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class ActivationKeys:
    """That of the feed-forward part."""

    key: str = "hidden_act"
    default: str = "silu"
    types: Mapping[str, str] = field(default_factory=lambda: GATED)
    """Theirs -> model.mlp_type."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = config.get(self.key, self.default)
        if not isinstance(found, str) or found not in self.types:
            raise CheckpointError(f"{self.key}: found {found!r}, expected {', '.join(map(repr, self.types))}")
        return {"mlp_type": self.types[found]}

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for name, kind in self.types.items() if kind == features["mlp_type"]]
        return {self.key: self.default if not names or self.default in names else names[0]}


@dataclass(frozen=True)
class GemmaScaleKeys:
    """Embeddings times sqrt(hidden size), rounded to their dtype; scores times query_pre_attn_scalar^-0.5."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        scalar = config.get("query_pre_attn_scalar", 256)
        if not isinstance(scalar, int | float) or scalar <= 0:
            raise CheckpointError(f"query_pre_attn_scalar: found {scalar!r}, expected a positive number")
        return {"embed_scale": config["hidden_size"] ** 0.5, "attention_scale": scalar**-0.5}

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return {"query_pre_attn_scalar": round(features["attention_scale"] ** -2)}


@dataclass(frozen=True)
class InnerWidthKeys:
    """GPT-2's n_inner, which may be null."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        width = config.get("n_inner")
        if width is not None and (type(width) is not int or width < 1):
            raise CheckpointError(f"n_inner: found {width!r}, expected a positive integer or null")
        return {"mlp_width": width or 4 * config["n_embd"]}

    def write(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return {"n_inner": features["mlp_width"]}


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
    groups: tuple[KeyGroup, ...] = (ActivationKeys(), RopeKeys())
    transposed: frozenset[str] = frozenset()
    """Our modules whose weight is stored as [inputs, outputs]."""


def has_unrotated(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a SmolLM3 has no rotary embedding. Raises CheckpointError."""
    every = NoRopeKeys().read(config)["no_rope_every"]
    return every > 0 and (layer + 1) % every == 0


def _number(config: Mapping[str, Any], key: str, default: int, least: int) -> int:
    """A key of config.json. Raises CheckpointError."""
    found = config.get(key, default)
    if type(found) is not int or found < least:
        raise CheckpointError(f"{key}: found {found!r}, expected an integer, at least {least}")
    return found


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
        "attention_dropout": ("attention_dropout", 0.0),
        **(more or {}),
    }
    return keys | {feature: (keys[feature][0], default) for feature, default in defaults.items()}


def _without(keys: dict[str, Key], *features: str) -> dict[str, Key]:
    return {feature: key for feature, key in keys.items() if feature not in features}


_GPT2 = {
    "tok_embeddings": "transformer.wte",
    "tok_embeddings.positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "output": "lm_head",
    "layers": "transformer.h",
    "attention_norm": "ln_1",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attn.c_attn"),
    "attention.wo": "attn.c_proj",
    "ffn_norm": "ln_2",
    "feed_forward.w1": "mlp.c_fc",
    "feed_forward.w2": "mlp.c_proj",
}
_NEOX = {
    "tok_embeddings": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "layers": "gpt_neox.layers",
    "attention_norm": "input_layernorm",
    "attention.wqkv": "attention.query_key_value",
    "attention.wo": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.dense_h_to_4h",
    "feed_forward.w2": "mlp.dense_4h_to_h",
}
_OLMO = {**SEPARATE, "attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
_GEMMA = {
    **SEPARATE,
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_ATTENTION: dict[str, Key] = dict.fromkeys(("qkv_bias", "out_bias"), ("attention_bias", False))
_MLP: dict[str, Key] = {"mlp_bias": ("mlp_bias", False)}
_UNBIASED = {"qkv_bias": False, "out_bias": False}
_BIASED: dict[str, Key] = dict.fromkeys(("qkv_bias", "out_bias"), ("bias", True))
_SOFTCAP: dict[str, Key] = {"logit_softcap": ("final_logit_softcapping", None)}
_QWEN = WindowKeys(
    4096, lambda config, layer: layer >= _number(config, "max_window_layers", 28, least=0), flag="use_sliding_window"
)
_GEMMA_DEFAULTS = {"num_attention_heads": 8, "num_kv_attention_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA_FIXED = {"norm_position": "sandwich", "zero_centered_norm": True}
_GEMMA_ACTIVATION = ActivationKeys("hidden_activation", "gelu_pytorch_tanh")

FORMS: Mapping[Family, Form] = {
    "llama": Form("LlamaForCausalLM", SEPARATE, _keys({**_ATTENTION, **_MLP})),
    "mistral": Form(
        "MistralForCausalLM",
        SEPARATE,
        _keys(max_positions=131072),
        _UNBIASED,
        groups=(ActivationKeys(), RopeKeys(), WindowKeys(4096, has_types=False)),
    ),
    "qwen2": Form(
        "Qwen2ForCausalLM",
        SEPARATE,
        _keys(max_positions=32768),
        {"qkv_bias": True, "out_bias": False},
        groups=(ActivationKeys(), RopeKeys(), _QWEN),
    ),
    "qwen3": Form(
        "Qwen3ForCausalLM",
        SEPARATE,
        _keys(_ATTENTION, head_dim=128, max_positions=32768),
        {"qk_norm": "head"},
        groups=(ActivationKeys(), RopeKeys(), _QWEN),
    ),
    "olmo2": Form(
        "Olmo2ForCausalLM",
        _OLMO,
        _keys(_ATTENTION, layer_norm_epsilon=1e-5),
        {"norm_position": "reordered", "qk_norm": "full"},
    ),
    "olmo3": Form(
        "Olmo3ForCausalLM",
        _OLMO,
        _keys(_ATTENTION, layer_norm_epsilon=1e-5),
        {"norm_position": "reordered", "qk_norm": "full"},
        groups=(
            ActivationKeys(),
            RopeKeys(("rope_theta", 500000.0), by_layer=True),
            WindowKeys(4096, lambda config, layer: (layer + 1) % 4 > 0),
        ),
    ),
    "smollm3": Form(
        "SmolLM3ForCausalLM",
        SEPARATE,
        _keys({**_ATTENTION, **_MLP}, num_kv_attention_heads=4, tie_word_embeddings=True, max_positions=32768),
        groups=(
            ActivationKeys(),
            RopeKeys(("rope_theta", 2000000.0)),
            NoRopeKeys(),
            WindowKeys(None, has_unrotated, flag="use_sliding_window"),
        ),
    ),
    "phi3": Form(
        "Phi3ForCausalLM",
        STACKED,
        _keys(
            {"embedding_dropout": ("embd_pdrop", 0.0), "residual_dropout": ("resid_pdrop", 0.0)},
            layer_norm_epsilon=1e-5,
            max_positions=4096,
        ),
        _UNBIASED,
        groups=(
            ActivationKeys(),
            RopeKeys(kinds=(), share=("partial_rotary_factor", 1.0)),
            WindowKeys(None, has_types=False),
        ),
    ),
    "gemma2": Form(
        "Gemma2ForCausalLM",
        _GEMMA,
        _keys(
            {**_ATTENTION, **_SOFTCAP, "attention_softcap": ("attn_logit_softcapping", 50.0)},
            logit_softcap=30.0,
            vocab_size=256000,
            max_positions=8192,
            **_GEMMA_DEFAULTS,
        ),
        _GEMMA_FIXED,
        {"use_bidirectional_attention": (None, None)},
        (_GEMMA_ACTIVATION, GemmaScaleKeys(), RopeKeys(), WindowKeys(4096, lambda config, layer: (layer + 1) % 2 > 0)),
    ),
    "gemma3_text": Form(
        "Gemma3ForCausalLM",
        _GEMMA,
        _keys({**_ATTENTION, **_SOFTCAP}, vocab_size=262208, max_positions=131072, **_GEMMA_DEFAULTS),
        {**_GEMMA_FIXED, "qk_norm": "head"},
        {"use_bidirectional_attention": (False, False), "attn_logit_softcapping": (None, None)},
        (
            _GEMMA_ACTIVATION,
            GemmaScaleKeys(),
            RopeKeys(("rope_theta", 1000000.0), by_layer=True, local_base=10000.0),
            WindowKeys(
                4096, lambda config, layer: (layer + 1) % _number(config, "sliding_window_pattern", 6, least=1) > 0
            ),
        ),
    ),
    "gpt2": Form(
        "GPT2LMHeadModel",
        _GPT2,
        {
            "vocab_size": ("vocab_size", 50257),
            "hidden_size": ("n_embd", 768),
            "num_layers": ("n_layer", 12),
            "num_attention_heads": ("n_head", 12),
            "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
            "tie_word_embeddings": ("tie_word_embeddings", True),
            "init_std": ("initializer_range", 0.02),
            "max_positions": ("n_positions", 1024),
            "max_position_embeddings": ("n_positions", 1024),
            "embedding_dropout": ("embd_pdrop", 0.1),
            "attention_dropout": ("attn_pdrop", 0.1),
            "residual_dropout": ("resid_pdrop", 0.1),
        },
        {"position": "learned", "norm_type": "layernorm", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {
            "scale_attn_weights": (True, True),
            "scale_attn_by_inverse_layer_idx": (False, False),
            "add_cross_attention": (False, False),
        },
        (ActivationKeys("activation_function", "gelu_new", PLAIN), InnerWidthKeys()),
        frozenset(("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2")),
    ),
    "gpt_neox": Form(
        "GPTNeoXForCausalLM",
        _NEOX,
        _without(
            _keys(
                {
                    **dict.fromkeys(("qkv_bias", "out_bias"), ("attention_bias", True)),
                    **dict.fromkeys(("embedding_dropout", "residual_dropout"), ("hidden_dropout", 0.0)),
                    "layer_norm_epsilon": ("layer_norm_eps", 1e-5),
                }
            ),
            *("num_kv_attention_heads", "head_dim"),
        ),
        {"norm_type": "layernorm", "mlp_bias": True},
        {"use_parallel_residual": (False, True)},
        (
            ActivationKeys(default="gelu", types=PLAIN),
            RopeKeys(("rotary_emb_base", 10000.0), share=("rotary_pct", 0.25)),
        ),
    ),
    "internlm": Form(
        "InternLMForCausalLM",
        SEPARATE,
        _without(_keys(_BIASED), "num_kv_attention_heads", "head_dim"),
        groups=(ActivationKeys(), RopeKeys(kinds=("dynamic",), has_rotary=True)),
    ),
    "internlm2": Form(
        "InternLM2ForCausalLM",
        GROUPED,
        _without(_keys(_BIASED), "head_dim"),
        groups=(ActivationKeys(), RopeKeys(kinds=("linear", "dynamic"))),
    ),
    "internlm3": Form(
        "InternLM3ForCausalLM",
        SEPARATE,
        _keys({"qkv_bias": ("qkv_bias", False), **dict.fromkeys(("out_bias", "mlp_bias"), ("bias", False))}),
    ),
}


def with_biases(model: ModelConfig, family: Family) -> ModelConfig:
    """The model with all biases that every model of the family has: those that it lacks are 0 there."""
    always = {name: True for name, value in FORMS[family].fixed.items() if name.endswith("_bias") and value}
    if FORMS[family].fixed.get("norm_type") == model.norm_type == "layernorm":
        always["norm_bias"] = True
    return model.model_copy(update=always)
