"""Converts our model config to Hugging Face's config.json and back.

Features that the other side cannot express are refused: the same weights would compute another function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from internlm_lite.apps.convert.recipes import FAMILIES, Family
from internlm_lite.config.schema import Dtype, ModelConfig
from internlm_lite.errors import CheckpointError
from internlm_lite.units import round_up

_ARCHITECTURE = {"llama": "LlamaForCausalLM", "internlm": "InternLMForCausalLM", "internlm2": "InternLM2ForCausalLM"}
_BIAS_KEY = {"llama": "attention_bias", "internlm": "bias", "internlm2": "bias"}
_BIAS_DEFAULT = {"llama": False, "internlm": True, "internlm2": True}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PLAIN_ROPE = ("default", "origin", "dynamic")
"""Kinds of rotary embedding equal to ours; "dynamic" only up to the trained sequence length."""
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
    problems = []
    if model.apply_post_layer_norm:
        problems.append("model.apply_post_layer_norm=True: no such model normalises after the residual addition")
    if family == "internlm" and model.kv_heads != model.num_attention_heads:
        problems.append(f"{model.kv_heads} key/value heads: it has no grouped-query attention; take --model-type llama")
    if problems:
        raise CheckpointError(f"this model is no {family}:\n  " + "\n  ".join(problems))
    # Only Llama has mlp_bias; InternLM's own code reads the base of its rotary embedding from `rotary`.
    special: dict[str, dict[str, Any]] = {
        "llama": {"mlp_bias": False},
        "internlm": {"rotary": {"base": float(model.rope_base), "type": "origin"}},
        "internlm2": {},
    }
    return {
        "architectures": [_ARCHITECTURE[family]],
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
        "rope_scaling": None,
        _BIAS_KEY[family]: not model.no_bias,
        **special[family],
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.init_std,
        "torch_dtype": dtype,
        "use_cache": True,
    }


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
    base, kind = _rope(config)
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
        "rope_base": base,
        "no_bias": not config.get(_BIAS_KEY[family], _BIAS_DEFAULT[family]),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range") or 0.02,
        "dtype": dtype if dtype in get_args(Dtype) and dtype != "torch.float64" else "torch.float32",
    }
    try:
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}: {first['loc'][0]}: found {first['input']!r}: {first['msg']}") from error
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
    base, kind = _rope(config)
    if kind not in _PLAIN_ROPE:
        yield f"rope: found type {kind!r}, expected none, 'default' or 'dynamic': our positions are not rescaled"
    if not isinstance(base, int | float) or base <= 0:
        yield f"rope_theta: found {base!r}, expected a positive number"
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    kv_heads = config.get("num_key_value_heads") or heads
    if type(kv_heads) is not int or heads % kv_heads:
        yield f"num_key_value_heads: found {kv_heads!r}, expected a divisor of num_attention_heads {heads}"
    head_dim = config.get("head_dim") or hidden // heads
    if hidden % heads or (hidden // heads) % 2 or head_dim != hidden // heads:
        yield (
            f"head_dim: found {head_dim} for hidden_size {hidden} and {heads} heads; expected hidden_size / heads, even"
        )


def _rope(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(base, kind): `rope_theta` and `rope_scaling`, InternLM's `rotary`, or transformers 5's `rope_parameters`."""
    base, kind = config.get("rope_theta", 10000.0), "default"
    found = [config.get(key) for key in ("rotary", "rope_scaling", "rope_parameters")]
    sections = [section for section in found if isinstance(section, Mapping)]
    for section in sections:
        base = section.get("rope_theta", section.get("base", base))
        kind = section.get("rope_type", section.get("type", kind))
    for section in (config, *sections):
        if section.get("partial_rotary_factor") not in (None, 1):
            kind = f"partial ({section['partial_rotary_factor']})"
    return base, kind
