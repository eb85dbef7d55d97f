"""Converts our model config to Hugging Face's config.json and back.

Features that the other side cannot express are refused: the same weights would compute another function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import ValidationError

from internlm_lite.apps.convert.recipes import FAMILIES, Family
from internlm_lite.config.schema import Dtype, ModelConfig, RopeScaling
from internlm_lite.errors import CheckpointError
from internlm_lite.units import round_up


@dataclass(frozen=True)
class _Form:
    """What a family's config.json and modelling code can express."""

    architecture: str
    bias_key: str | None = None
    """The key for biases on queries, keys, values and output alike."""
    biased: bool = False
    """Its default; without such a key, what the family has on queries, keys and values alone."""
    qk_norm: Literal[False, "head"] = False
    has_head_dim: bool = True
    """Its heads may have any size."""
    scales_rope: bool = True
    """Its rope_scaling is that of transformers' modeling_rope_utils.py."""


_FORMS: dict[Family, _Form] = {
    "llama": _Form("LlamaForCausalLM", "attention_bias"),
    "mistral": _Form("MistralForCausalLM"),
    "qwen2": _Form("Qwen2ForCausalLM", biased=True),
    "qwen3": _Form("Qwen3ForCausalLM", "attention_bias", qk_norm="head"),
    "internlm": _Form("InternLMForCausalLM", "bias", biased=True, has_head_dim=False, scales_rope=False),
    "internlm2": _Form("InternLM2ForCausalLM", "bias", biased=True, has_head_dim=False, scales_rope=False),
    "internlm3": _Form("InternLM3ForCausalLM"),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PLAIN_ROPE = ("default", "origin", "dynamic")
"""Kinds of unscaled rotary embedding; "dynamic" is one only up to the trained sequence length."""
_SCALED_ROPE = tuple(kind for kind in get_args(RopeScaling.model_fields["rope_type"].annotation) if kind != "dynamic")
_MISTRAL_WINDOW = 4096
"""Of a Mistral whose config.json does not name its sliding window."""
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class HFConfig:
    """The content of config.json."""

    family: Family
    model: ModelConfig
    max_positions: int
    notes: tuple[str, ...]
    """Notes for the user, one a line."""


def to_hf(model: ModelConfig, family: Family, max_positions: int, dtype: str) -> dict[str, Any]:
    """config.json for our model. `dtype`: such as "bfloat16". Raises CheckpointError."""
    if problems := list(_not_expressed(model, family)):
        raise CheckpointError(f"this model is no {family}:\n  " + "\n  ".join(problems))
    form = _FORMS[family]
    # Only Llama has mlp_bias; InternLM's own code reads the base of its rotary embedding from `rotary`.
    special: dict[str, dict[str, Any]] = {
        "llama": {"mlp_bias": False},
        "internlm": {"rotary": {"base": float(model.rope_base), "type": "origin"}},
        "internlm3": {"bias": False, "qkv_bias": model.has_qkv_bias},
        "mistral": {"sliding_window": None},
    }
    biases = {} if form.bias_key is None else {form.bias_key: model.has_out_bias}
    return {
        "architectures": [form.architecture],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.layer_norm_epsilon,
        "rope_theta": float(model.rope_base),
        "rope_scaling": _rope_section(model.rope_scaling),
        **({"head_dim": model.head_size} if form.has_head_dim else {}),
        **biases,
        **special.get(family, {}),
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.init_std,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def default_family(model: ModelConfig) -> Family:
    """The first family that can express our model; "llama" if none can."""
    return next((family for family in FAMILIES if not any(_not_expressed(model, family))), "llama")


def _not_expressed(model: ModelConfig, family: Family) -> Iterator[str]:
    """What of our model `family` lacks."""
    form, has = _FORMS[family], (model.has_qkv_bias, model.has_out_bias)
    if model.apply_post_layer_norm:
        yield "model.apply_post_layer_norm=True: no such model normalises after the residual addition"
    if family == "internlm" and model.kv_heads != model.num_attention_heads:
        yield f"{model.kv_heads} key/value heads: it has no grouped-query attention; take --model-type llama"
    if has not in _biases(family):
        yield f"biases on queries, keys, values: {has[0]}, on the output: {has[1]}: it cannot have these"
    if model.qk_norm != form.qk_norm:
        yield f"model.qk_norm={model.qk_norm!r}: it has {form.qk_norm!r}"
    if not form.has_head_dim and model.head_size * model.num_attention_heads != model.hidden_size:
        yield f"model.head_dim={model.head_dim}: its heads have hidden_size / num_attention_heads features"
    if not form.scales_rope and model.rope_scaling is not None:
        yield f"model.rope_scaling: its own code has no {model.rope_scaling.rope_type}"


def _biases(family: Family) -> tuple[tuple[bool, bool], ...]:
    """(on queries, keys, values; on the output) that a family may have."""
    form = _FORMS[family]
    if form.bias_key is not None:
        return (False, False), (True, True)
    return ((False, False), (True, False)) if family == "internlm3" else ((form.biased, False),)


def _rope_section(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    yarn = {"beta_fast", "beta_slow", "truncate", "attention_factor"}
    llama3 = {"low_freq_factor", "high_freq_factor"}
    others = {"linear": yarn | llama3, "llama3": yarn, "yarn": llama3}[scaling.rope_type]
    return scaling.model_dump(exclude=others, exclude_none=True)


def from_hf(config: Mapping[str, Any], where: str) -> HFConfig:
    """Our model config from config.json. Raises CheckpointError naming `where` and every unsupported key."""
    family = next((known for known in FAMILIES if known == config.get("model_type")), None)
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {config.get('model_type')!r}: expected one of {', '.join(FAMILIES)}"
        )
    problems = [*_missing(config), *_unsupported(config)]
    if problems:
        raise CheckpointError(f"{where}: this is another model than ours:\n  " + "\n  ".join(problems))
    base, kind, scaling = _rope(config)
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    qkv_bias, out_bias = _biases_of(config, family)
    own_head_dim = config.get("head_dim") or hidden_size // heads
    ratio, multiple = mlp_width(config["hidden_size"], config["intermediate_size"])
    dtype = f"torch.{config.get('torch_dtype') or config.get('dtype') or 'bfloat16'}"
    values = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_kv_attention_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "mlp_ratio": ratio,
        "multiple_of": multiple,
        "layer_norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "head_dim": None if own_head_dim * heads == hidden_size else own_head_dim,
        "rope_base": base,
        "rope_scaling": scaling,
        "no_bias": not out_bias,
        "qkv_bias": None if qkv_bias == out_bias else qkv_bias,
        "qk_norm": _FORMS[family].qk_norm,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range") or 0.02,
        "dtype": dtype if dtype in get_args(Dtype) and dtype != "torch.float64" else "torch.float32",
    }
    try:
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"{where}: {'.'.join(map(str, first['loc']))}: found {first['input']!r}: {first['msg']}"
        ) from error
    max_positions = config.get("max_position_embeddings", 2048)
    if type(max_positions) is not int or max_positions < 1:
        raise CheckpointError(f"{where}: max_position_embeddings: found {max_positions!r}, expected a positive integer")
    notes = []
    if kind == "dynamic":
        notes.append(
            f"rope scaling is dynamic there and absent here: the same up to {max_positions} tokens, not beyond"
        )
    return HFConfig(family, model, max_positions, tuple(notes))


def mlp_width(hidden_size: int, width: int) -> tuple[float, int]:
    """(mlp_ratio, multiple_of) that give exactly this SwiGLU width. Raises CheckpointError if none does."""
    # The exact ratio first; then others, half a feature higher, so that int() does not round below the width.
    candidates = [(8 / 3, multiple) for multiple in _MULTIPLES]
    candidates += [(width / hidden_size, multiple) for multiple in _MULTIPLES]
    candidates.append(((width + 0.5) / hidden_size, 1))
    for ratio, multiple in candidates:
        if round_up(int(hidden_size * ratio), multiple) == width:
            return ratio, multiple
    raise CheckpointError(f"no mlp_ratio and multiple_of give intermediate_size {width} for hidden_size {hidden_size}")


def _missing(config: Mapping[str, Any]) -> Iterator[str]:
    for key in _REQUIRED:
        value = config.get(key)
        if type(value) is not int or value < 1:
            yield f"{key}: found {value!r}, expected a positive integer"


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    """Features that our decoder lacks, and invalid combinations."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act: found {config['hidden_act']!r}, expected 'silu'"
    if config.get("mlp_bias"):
        yield "mlp_bias: found True, expected False: our SwiGLU has no biases"
    if config.get("quantization_config"):
        yield "quantization_config: quantised weights are not read; convert the original model"
    base, kind, scaling = _rope(config)
    if kind not in (*_PLAIN_ROPE, *_SCALED_ROPE):
        yield f"rope: found type {kind!r}, expected none, 'default', 'dynamic', {', '.join(map(repr, _SCALED_ROPE))}"
    elif scaling is not None and not _FORMS[config["model_type"]].scales_rope:
        yield f"rope: found type {kind!r}, which this family's own code computes in another way"
    yield from _windows(config)
    if config["model_type"] == "internlm3" and config.get("bias"):
        yield "bias: found True, expected False: our SwiGLU has no biases"
    if not isinstance(base, int | float) or base <= 0:
        yield f"rope_theta: found {base!r}, expected a positive number"
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    kv_heads = config.get("num_key_value_heads") or heads
    if type(kv_heads) is not int or heads % kv_heads:
        yield f"num_key_value_heads: found {kv_heads!r}, expected a divisor of num_attention_heads {heads}"
    head_dim = config.get("head_dim") or hidden // heads
    if type(head_dim) is not int or head_dim < 1 or head_dim % 2 or (not config.get("head_dim") and hidden % heads):
        yield f"head_dim: found {head_dim!r} for hidden_size {hidden} and {heads} heads, expected an even number"


def _biases_of(config: Mapping[str, Any], family: Family) -> tuple[bool, bool]:
    """(on queries, keys, values; on the output)"""
    form = _FORMS[family]
    if form.bias_key is not None:
        both = bool(config.get(form.bias_key, form.biased))
        return both, both
    return bool(config.get("qkv_bias", False)) if family == "internlm3" else form.biased, False


def _windows(config: Mapping[str, Any]) -> Iterator[str]:
    """A layer whose attention spans a window of fewer tokens than there are positions."""
    family, layers = config.get("model_type"), config.get("num_hidden_layers")
    window = config.get("sliding_window", _MISTRAL_WINDOW if family == "mistral" else None)
    is_used = family == "mistral" or config.get("use_sliding_window", False)
    types = config.get("layer_types")
    if isinstance(types, list):
        is_used = "sliding_attention" in types
    elif family in ("qwen2", "qwen3") and isinstance(layers, int):
        is_used = is_used and config.get("max_window_layers", 28) < layers  # windows begin at that layer
    positions = config.get("max_position_embeddings", 2048)
    if is_used and isinstance(window, int) and isinstance(positions, int) and window < positions:
        yield f"sliding_window: found {window} for {positions} positions: sliding-window attention is not supported"


def _rope(config: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any] | None]:
    """(base, kind, values of model.rope_scaling): `rope_theta` and `rope_scaling`, InternLM's `rotary`, or transformers
    5's `rope_parameters`."""
    base, kind = config.get("rope_theta", 10000.0), "default"
    found = [config.get(key) for key in ("rotary", "rope_scaling", "rope_parameters")]
    sections = [section for section in found if isinstance(section, Mapping)]
    merged = {key: value for section in sections for key, value in section.items() if value is not None}
    for section in sections:
        base = section.get("rope_theta", section.get("base", base))
        kind = section.get("rope_type", section.get("type", kind))
    for section in (config, *sections):
        if section.get("partial_rotary_factor") not in (None, 1):
            kind = f"partial ({section['partial_rotary_factor']})"
    if kind == "yarn" and (merged.get("mscale") or merged.get("mscale_all_dim")):
        kind = "yarn with mscale"
    if kind not in _SCALED_ROPE:
        return base, kind, None
    values = {key: merged[key] for key in RopeScaling.model_fields if key in merged} | {"rope_type": kind}
    if kind != "linear":
        values.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return base, kind, values
