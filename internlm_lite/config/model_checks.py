"""Cross checks of the section `model`: fields that contradict each other, or the tensor-parallel size."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from internlm_lite.config.encoder_checks import encoder_problems
from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import UNKNOWN_TO_KERNELS, Config, ModelConfig

_TENSOR = "parallel.tensor"
_RANGES = {"float16": (2.0**-24, 65504.0), "bfloat16": (2.0**-126, 3.38e38), "float32": (2.0**-126, 3.4e38)}
"""Least and greatest numbers of a dtype."""


def model_problems(config: Config) -> Iterator[Problem]:
    """A Problem for each contradiction."""
    yield from _heads(config)
    yield from _positions(config)
    yield from _windows(config.model)
    yield from _embedding(config.model)
    yield from _norms(config)
    yield from _tensor(config)
    yield from _float8(config)
    yield from _dropout(config)
    yield from _mup(config)
    yield from _smoothing(config)
    yield from encoder_problems(config)


def _heads(config: Config) -> Iterator[Problem]:
    model = config.model
    heads = "model.num_attention_heads"
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield _indivisible("model.hidden_size", model.hidden_size, heads, model.num_attention_heads)
    elif model.head_size % 2:
        keys = ("model.hidden_size", heads) if model.head_dim is None else ("model.head_dim",)
        yield Problem(
            keys,
            f"found {model.head_size} features per head, expected an even number for the rotary embedding; change "
            f"{' or '.join(keys)}",
        )
    if model.num_attention_heads % model.kv_heads:
        yield _indivisible(heads, model.num_attention_heads, "model.num_kv_attention_heads", model.kv_heads)


def _positions(config: Config) -> Iterator[Problem]:
    model, most, key = config.model, config.model.max_position_embeddings, "model.max_position_embeddings"
    if model.position == "learned":
        if most is None:
            text = "found None, expected the number of positions for 'learned' ones; set it to data.seq_len or more"
            yield Problem((key, "model.position"), text)
        elif most < config.data.seq_len:
            text = f"found {most}, expected at least data.seq_len {config.data.seq_len}; change one of them"
            yield Problem((key, "data.seq_len"), text)
        elif config.monitor.sample_prompts and config.monitor.sample_tokens >= most:
            text = f"found {config.monitor.sample_tokens}, expected less than {key} {most}, with room for a prompt"
            yield Problem(("monitor.sample_tokens", key), f"{text}; lower it")
    if model.position == "rope":
        yield from _rope(config)
        return
    for name in ("rope_scaling", "rope_local_base", "partial_rotary_factor", "no_rope_every"):
        value, default = getattr(model, name), ModelConfig.model_fields[name].default
        if value != default:
            found = "" if name == "rope_scaling" else f" {value!r}"
            text = f"found{found} with model.position {model.position!r}, which rotates nothing; remove it"
            yield Problem((f"model.{name}", "model.position"), text)


def _norms(config: Config) -> Iterator[Problem]:
    model, kind = config.model, "model.norm_type"
    if model.apply_post_layer_norm and model.norms_at != "post":
        keys = "model.norm_position", "model.apply_post_layer_norm"
        yield Problem(keys, f'found "{model.norms_at}" with {keys[1]}=True, which says "post"; remove one of them')
    if model.norm_bias and model.norm_type == "rmsnorm":
        text = f'found True with {kind} "rmsnorm", which has no bias; set {kind}="layernorm", or remove norm_bias'
        yield Problem(("model.norm_bias", kind), text)
    if model.qk_norm == "full" and model.norm_type != "rmsnorm":
        yield Problem(
            ("model.qk_norm", kind),
            f'found "full" with {kind} "{model.norm_type}", expected "rmsnorm", as in OLMo 2; change it, or set '
            'qk_norm="head"',
        )


def _rope(config: Config) -> Iterator[Problem]:
    model, key = config.model, "model.rope_scaling"
    scaling, base, rotated = model.rope_scaling, model.rope_base, model.rotary_size
    if model.partial_rotary_factor < 1 and (rotated % 2 or not rotated):
        text = f"found {model.partial_rotary_factor}, which rotates {rotated} of {model.head_size} features per head"
        yield Problem(("model.partial_rotary_factor",), f"{text}, expected an even number, at least 2; change it")
    if model.rope_local_base is not None and not any(map(model.is_sliding, range(model.num_blocks))):
        text = f"found {model.rope_local_base}, but no layer is sliding; remove it, or set model.sliding_window"
        yield Problem(("model.rope_local_base", "model.sliding_window", "model.layer_types"), text)
    if scaling is None:
        return
    yield from _original_length(model)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.rope_type == "llama3" and low >= high:
        keys = (f"{key}.low_freq_factor", f"{key}.high_freq_factor")
        yield Problem(keys, f"found {low} and {high}, expected the first to be smaller; change one")
    if scaling.rope_type == "yarn" and base <= 1:
        yield Problem(("model.rope_base",), f"found {base}, expected more than 1 for rope_type 'yarn'; raise it")
    if scaling.rope_type == "dynamic" and rotated < 4:
        text = f"found 'dynamic' with {rotated} rotated features per head, expected at least 4; take 'yarn'"
        yield Problem((f"{key}.rope_type",), text)


def _original_length(model: ModelConfig) -> Iterator[Problem]:
    scaling, key = model.rope_scaling, "model.rope_scaling.original_max_position_embeddings"
    if scaling is None or scaling.rope_type == "linear" or scaling.original_max_position_embeddings is not None:
        return
    if scaling.rope_type != "dynamic" or model.max_position_embeddings is None:
        why = f"rope_type {scaling.rope_type!r} needs it"
        yield Problem((key,), f"found None, expected the longest row of the first training: {why}; set it")


def _windows(model: ModelConfig) -> Iterator[Problem]:
    window, kinds = "model.sliding_window", "model.layer_types"
    sliding = model.layer_types is not None and "sliding_attention" in model.layer_types
    if sliding and model.sliding_window is None:
        yield Problem((window, kinds), f"found None with sliding layers in {kinds}, expected their tokens; add it")
    if model.sliding_window is not None and not any(map(model.is_sliding, range(model.num_blocks))):
        text = f"found {model.sliding_window}, but no layer is sliding by {kinds}; remove one of them"
        yield Problem((window, kinds), text)
    for key in UNKNOWN_TO_KERNELS.get(model.attention, ()):
        if (value := getattr(model, key)) is not None:
            text = f'found {value} with model.attention "{model.attention}", whose kernel does not have it; take "auto"'
            yield Problem((f"model.{key}", "model.attention"), text)


def _embedding(model: ModelConfig) -> Iterator[Problem]:
    low, high = _RANGES.get(model.torch_dtype_name, (0.0, inf))
    if model.embed_scale is not None and not low <= model.embed_scale <= high:
        text = f'found {model.embed_scale} with model.dtype "{model.dtype}", expected a number between {low} and {high}'
        yield Problem(("model.embed_scale", "model.dtype"), f"{text}; change one of them")


def _tensor(config: Config) -> Iterator[Problem]:
    """Sizes that tensor parallelism splits must be divisible by parallel.tensor."""
    model, tensor = config.model, config.parallel.tensor
    split = {"model.num_attention_heads": model.num_attention_heads, "model.vocab_size": model.vocab_size}
    if model.num_kv_attention_heads is not None:
        split["model.num_kv_attention_heads"] = model.num_kv_attention_heads
    if model.embed_split_hidden or model.position == "learned":
        split["model.hidden_size"] = model.hidden_size
    for key, value in split.items():
        if value % tensor:
            yield _indivisible(key, value, _TENSOR, tensor)
    if model.mlp_hidden_size % tensor:
        yield Problem(
            ("model.mlp_ratio", "model.hidden_size", "model.multiple_of", _TENSOR),
            f"found a feed-forward width of {model.mlp_hidden_size} (hidden_size * mlp_ratio rounded up to a "
            f"multiple of {model.multiple_of}), expected a multiple of {_TENSOR} {tensor}; change mlp_ratio or "
            "multiple_of",
        )
    if model.tie_word_embeddings and model.embed_split_hidden and tensor > 1:
        yield Problem(
            ("model.tie_word_embeddings", "model.embed_split_hidden", _TENSOR),
            f"found True with {_TENSOR} {tensor} and model.embed_split_hidden=True: the head is split along the "
            "vocabulary, so a shared embedding must be too; set model.embed_split_hidden=False",
        )


def _indivisible(key: str, value: int, divisor_key: str, divisor: int) -> Problem:
    return Problem(
        (key, divisor_key), f"found {value}, expected a multiple of {divisor_key} {divisor}; change one of them"
    )


def _float8(config: Config) -> Iterator[Problem]:
    """Products in float8 take multiples of 16 along every dimension of a tensor-parallel rank's part."""
    model, tensor, data = config.model, config.parallel.tensor, config.data
    if not model.fp8:
        return
    if model.torch_dtype_name != "bfloat16":
        keys = "model.fp8", "model.dtype"
        yield Problem(
            keys, f'found True with model.dtype "{model.dtype}", expected "torch.bfloat16"; change one of them'
        )
    queries, keys_values = (heads * model.head_size for heads in (model.num_attention_heads, 2 * model.kv_heads))
    sizes = {
        ("model.hidden_size",): model.hidden_size,
        ("model.num_attention_heads", "model.head_dim", _TENSOR): queries // tensor,
        ("model.num_kv_attention_heads", _TENSOR): (queries + keys_values) // tensor,
        ("model.multiple_of", "model.mlp_ratio", _TENSOR): model.mlp_hidden_size // tensor,
        ("data.micro_bsz", "data.seq_len"): data.micro_bsz * data.seq_len,
    }
    odd = {keys: size for keys, size in sizes.items() if size % 16}
    if odd:
        found = " and ".join(f"{size} ({', '.join(keys)})" for keys, size in odd.items())
        yield Problem(
            ("model.fp8", *(key for keys in odd for key in keys)),
            f"found True with matrices of {found} rows or columns on a rank, expected multiples of 16; "
            "change these keys, or set model.fp8=False",
        )


def _dropout(config: Config) -> Iterator[Problem]:
    """A kernel's own masks would not be those of another layout, nor those of a layer that runs again."""
    model = config.model
    kernel = model.attention if model.use_flash_attn else "sdpa"
    if model.attention_dropout and kernel not in ("auto", "sdpa"):
        yield Problem(
            ("model.attention_dropout", "model.attention"),
            f'found {model.attention_dropout:g} with model.attention "{kernel}", which drops attention weights by '
            'numbers of its own; set model.attention="auto", or attention_dropout=0',
        )


def _mup(config: Config) -> Iterator[Problem]:
    model, rule = config.model, config.optimizer.name
    if model.scaling != "mup":
        for name in ("mup_base_width", "mup_base_head_dim"):
            if getattr(model, name) is not None:
                keys = f"model.{name}", "model.scaling"
                yield Problem(
                    keys, f'found {getattr(model, name)} with scaling "standard", expected "mup"; change one of them'
                )
        return
    keys = "model.mup_base_width", "model.scaling"
    if model.mup_base_width is None:
        text = (
            "found None, expected the hidden_size at which learning rate and init_std were found; without it mup is the"
        )
        yield Problem(keys, f"{text} same as standard: set it")
    if rule == "sgd":
        text = (
            'found "sgd", whose updates grow with the gradient, with model.scaling="mup"; expected adamw, lion or muon'
        )
        yield Problem(("optimizer.name", "model.scaling"), f"{text}; change one of them")
    if rule == "muon" and config.optimizer.update_scale != "spectral":
        text = (
            f'found {config.optimizer.update_scale!r} with model.scaling="mup"; expected "spectral", which alone makes '
        )
        yield Problem(("optimizer.update_scale", "model.scaling"), f"{text}updates as large at every width")


def _smoothing(config: Config) -> Iterator[Problem]:
    loss, vocab_size, key = config.loss, config.model.vocab_size, "loss.pad_id"
    if loss.pad_id is None:
        return
    if not loss.label_smoothing:
        text = f"found {loss.pad_id} with loss.label_smoothing 0, whose targets are labels alone; remove it"
        yield Problem((key, "loss.label_smoothing"), text)
    elif loss.pad_id >= vocab_size or vocab_size < 3:
        text = f"found {loss.pad_id} with model.vocab_size {vocab_size}, expected an id of at least three; change it"
        yield Problem((key, "model.vocab_size"), text)
