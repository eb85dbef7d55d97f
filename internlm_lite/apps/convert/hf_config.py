"""Converts our model config to Hugging Face's config.json and back, by the tables in families.py.

Features that the other side cannot express are refused: the same weights would compute another function. What a family
lacks of a model of ours is seen by reading what would be written: there it has its own value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from internlm_lite.apps.convert.families import FAMILIES, FORMS, Family, Form, with_biases
from internlm_lite.apps.convert.hf_rope import scaling_features
from internlm_lite.apps.convert.hf_windows import FULL, SLIDING
from internlm_lite.config.schema import Dtype, ModelConfig
from internlm_lite.errors import CheckpointError
from internlm_lite.units import round_up

_NO_FEATURES = {
    *("checkpoint", "dtype", "attention", "use_flash_attn", "compile", "fp8", "use_fp32_norm", "init_std"),
    *("num_chunks", "embed_split_hidden", "embed_grad_scale", "parallel_output"),
    *("embedding_dropout", "attention_dropout", "residual_dropout", "feed_forward_dropout"),
    *("scaling", "mup_base_width", "mup_base_head_dim"),
    *("mlp_ratio", "multiple_of", "no_bias", "apply_post_layer_norm"),
}
"""Fields of the model section that do not change what a trained model computes, or that others say as well."""
_OF_ROTATION = ("rope_base", "rope_scaling", "rope_local_base", "partial_rotary_factor", "no_rope_every")
_COUNTS = {"vocab_size", "hidden_size", "mlp_width", "num_layers", "num_attention_heads", "max_positions"}
_SWITCHES = ("qkv_bias", "out_bias", "mlp_bias", "tie_word_embeddings")
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class HFConfig:
    """The content of config.json."""

    family: Family
    model: ModelConfig
    max_positions: int
    has_images: bool
    """It is the part for text of a model that reads images, too."""

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user, one a line."""
        return ("the part of the model that reads images is left out",) * self.has_images


def features(model: ModelConfig) -> dict[str, Any]:
    """What decides which function a model computes: fields of the model section, each in one spelling."""
    found = {name: getattr(model, name) for name in ModelConfig.model_fields if name not in _NO_FEATURES}
    sliding = [model.is_sliding(layer) for layer in range(model.num_layers)]
    found |= {
        "num_kv_attention_heads": model.kv_heads,
        "head_dim": model.head_size,
        "mlp_width": model.mlp_hidden_size,
        "qkv_bias": model.has_qkv_bias,
        "out_bias": model.has_out_bias,
        "norm_position": model.norms_at,
        "norm_bias": model.has_norm_bias,
        "embed_scale": model.embed_scale or 1.0,
        "logit_scale": model.logit_scale or 1.0,
        "attention_scale": model.attention_scale or model.head_size**-0.5,
        "rope_scaling": scaling_features(model),
        "sliding_window": model.sliding_window if any(sliding) else None,
        "layer_types": [SLIDING if kind else FULL for kind in sliding] if any(sliding) else None,
        "max_position_embeddings": model.most_positions,
    }
    if model.position != "rope":
        return found | {name: ModelConfig.model_fields[name].default for name in _OF_ROTATION}
    if model.no_rope_every > model.num_layers:
        found["no_rope_every"] = 0
    if not any(sliding) or (model.rope_scaling is None and model.rope_local_base == model.rope_base):
        found["rope_local_base"] = None
    return found


def to_hf(model: ModelConfig, family: Family, max_positions: int, dtype: str) -> dict[str, Any]:
    """config.json for our model. `dtype`: such as "bfloat16". Raises CheckpointError."""
    if problems := list(_not_expressed(model, family)):
        raise CheckpointError(f"this model is no {family}:\n  " + "\n  ".join(problems))
    return _written(model, family, max_positions) | {"torch_dtype": dtype, "use_cache": True}


def default_family(model: ModelConfig) -> Family:
    """The first family that can express our model; "llama" if none can."""
    return next((family for family in FAMILIES if not any(_not_expressed(model, family))), "llama")


def _written(model: ModelConfig, family: Family, max_positions: int) -> dict[str, Any]:
    """config.json with what the family has a key for."""
    form, ours = FORMS[family], features(with_biases(model, family))
    ours |= {name: getattr(model, name) for name in form.keys if name in _NO_FEATURES}
    ours["max_positions"] = _positions(model, max_positions)
    config: dict[str, Any] = {"architectures": [form.architecture], "model_type": family}
    # Families have defaults for these, which need not be in our vocabulary.
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config |= {name: ours[feature] for feature, (name, _) in form.keys.items()}
    config |= {name: value for name, (value, _) in form.constants.items()}
    for group in form.groups:
        config |= group.write(ours)
    return config


def _positions(model: ModelConfig, max_positions: int) -> int:
    """max_position_embeddings: of learned positions their number, of dynamic rotations the original length."""
    scaling = scaling_features(model) or {}
    original = scaling["original_max_position_embeddings"] if scaling.get("rope_type") == "dynamic" else None
    return model.most_positions or original or max_positions


def _not_expressed(model: ModelConfig, family: Family) -> Iterator[str]:
    """What of our model `family` lacks."""
    found, problems = _read(FORMS[family], _written(model, family, max_positions=1))
    if problems:
        yield from problems
        return
    theirs = features(ModelConfig.model_validate(_section(found)))
    for name, value in features(with_biases(model, family)).items():
        if value != theirs[name]:
            yield f"model.{name}={value!r}: it has {theirs[name]!r}"


def from_hf(config: Mapping[str, Any], where: str) -> HFConfig:
    """Our model config from config.json. Raises CheckpointError naming `where` and every unsupported key."""
    has_images = config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping)
    if has_images:
        config = {**config, **config["text_config"], "model_type": "gemma3_text"}
    family = next((known for known in FAMILIES if known == config.get("model_type")), None)
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {config.get('model_type')!r}: expected one of {', '.join(FAMILIES)}"
        )
    found, problems = _read(FORMS[family], config)
    if problems:
        raise CheckpointError(f"{where}: this is another model than ours:\n  " + "\n  ".join(problems))
    dtype = f"torch.{config.get('torch_dtype') or config.get('dtype') or 'bfloat16'}"
    found["dtype"] = dtype if dtype in get_args(Dtype) and dtype != "torch.float64" else "torch.float32"
    try:
        model = ModelConfig.model_validate(_section(found))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"{where}: {'.'.join(map(str, first['loc']))}: found {first['input']!r}: {first['msg']}"
        ) from error
    return HFConfig(family, model, found["max_positions"], has_images)


def _section(found: Mapping[str, Any]) -> dict[str, Any]:
    """The model section with these features."""
    values = {name: value for name, value in found.items() if name in ModelConfig.model_fields}
    ratio, multiple = mlp_width(found["hidden_size"], found["mlp_width"])
    values |= {"mlp_ratio": ratio, "multiple_of": multiple, "no_bias": not values.pop("out_bias")}
    if values["qkv_bias"] != values["no_bias"]:
        values["qkv_bias"] = None
    if values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]:
        values["head_dim"] = None
    if values.get("attention_scale") == found["head_dim"] ** -0.5:
        values["attention_scale"] = None
    is_local = values.get("rope_scaling") is not None or values.get("rope_local_base") != values.get("rope_base")
    if values.get("sliding_window") is None or not is_local:
        values["rope_local_base"] = None
    return values


def mlp_width(hidden_size: int, width: int) -> tuple[float, int]:
    """(mlp_ratio, multiple_of) that give exactly this width of the feed-forward part. Raises CheckpointError if none
    does."""
    # The exact ratio first; then others, half a feature higher, so that int() does not round below the width.
    candidates = [(8 / 3, multiple) for multiple in _MULTIPLES]
    candidates += [(width / hidden_size, multiple) for multiple in _MULTIPLES]
    candidates.append(((width + 0.5) / hidden_size, 1))
    for ratio, multiple in candidates:
        if round_up(int(hidden_size * ratio), multiple) == width:
            return ratio, multiple
    raise CheckpointError(f"no mlp_ratio and multiple_of give intermediate_size {width} for hidden_size {hidden_size}")


def _read(form: Form, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our features, and what is said that our decoder lacks, or that contradicts itself."""
    config = {**dict(form.keys.values()), **config}
    found = {**form.fixed, **{feature: config[key] for feature, (key, _) in form.keys.items()}}
    problems = [
        f"{key}: found {config[key]!r}, expected a positive integer"
        for feature, (key, _) in form.keys.items()
        if feature in _COUNTS and (type(config[key]) is not int or config[key] < 1)
    ]
    if problems:
        return found, problems
    problems += [
        f"{key}: found {config.get(key, default)!r}, expected {value!r}: no other is supported"
        for key, (value, default) in form.constants.items()
        if (config.get(key, default) or None) != (value or None)
    ]
    if config.get("quantization_config"):
        problems.append("quantization_config: quantised weights are not read; convert the original model")
    found |= {feature: bool(found[feature]) for feature in _SWITCHES if feature in found}
    for read, given in ((_heads, found), *((group.read, config) for group in form.groups)):
        try:
            found |= read(given)
        except CheckpointError as error:
            problems.append(str(error))
    return found, problems


def _heads(found: Mapping[str, Any]) -> dict[str, Any]:
    """Features that may be left out, or null. Raises CheckpointError."""
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    kv_heads = found.get("num_kv_attention_heads") or heads
    head_dim = found.get("head_dim") or hidden // heads
    if type(kv_heads) is not int or heads % kv_heads:
        raise CheckpointError(
            f"num_key_value_heads: found {kv_heads!r}, expected a divisor of num_attention_heads {heads}"
        )
    if type(head_dim) is not int or head_dim < 1 or head_dim % 2 or (not found.get("head_dim") and hidden % heads):
        raise CheckpointError(
            f"head_dim: found {head_dim!r} for hidden_size {hidden} and {heads} heads, expected an even number"
        )
    return {"num_kv_attention_heads": kv_heads, "head_dim": head_dim, "init_std": found["init_std"] or 0.02}
