"""config.json and our model section."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.apps.convert.families import FAMILIES
from internlm_lite.apps.convert.hf_config import HFConfig, default_family, features, from_hf, mlp_width, to_hf
from internlm_lite.apps.convert.hf_windows import FULL, SLIDING
from internlm_lite.apps.convert.recipes import our_shapes
from internlm_lite.apps.planner.holdings import holdings
from internlm_lite.config.cross import cross_problems
from internlm_lite.config.load import load_config
from internlm_lite.config.schema import Config, ModelConfig, RopeScaling
from internlm_lite.errors import CheckpointError
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.rope import rotation_of
from internlm_lite.mesh.mesh import sizes_of
from internlm_lite.units import round_up
from tests.apps.convert.made import MODEL
from tests.cli import ROOT

SMALL = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
# What the published config.json files say, shortened.
INTERNLM_7B = {
    "model_type": "internlm",
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-06,
    "bias": True,
    "max_position_embeddings": 2048,
    "rotary": {"base": 10000, "type": "dynamic"},
    "torch_dtype": "float16",
}
INTERNLM2_20B = {
    "model_type": "internlm2",
    "vocab_size": 92544,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "bias": False,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


@given(st.integers(2, 20000), st.integers(1, 80000))
def test_every_width_is_met_exactly(hidden, width):
    ratio, multiple = mlp_width(hidden, width)
    assert round_up(int(hidden * ratio), multiple) == width


def test_known_widths_get_the_plain_ratio():
    assert mlp_width(4096, 11008) == (8 / 3, 256)
    assert mlp_width(5120, 13824) == (8 / 3, 256)
    assert mlp_width(4096, 14336) == (3.5, 256)


GEMMA3_TEXT = {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}


def dynamic(factor: float, length: int) -> RopeScaling:
    return RopeScaling(rope_type="dynamic", factor=factor, original_max_position_embeddings=length)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (
            INTERNLM_7B,
            {
                "no_bias": False,
                "rope_base": 10000,
                "num_kv_attention_heads": 32,
                "dtype": "torch.float16",
                "rope_scaling": dynamic(1.0, 2048),
            },
        ),
        (
            INTERNLM2_20B,
            {"no_bias": True, "rope_base": 1000000, "num_kv_attention_heads": 8, "rope_scaling": dynamic(2.0, 32768)},
        ),
        (LLAMA3_8B, {"no_bias": True, "rope_base": 500000, "num_kv_attention_heads": 8, "layer_norm_epsilon": 1e-5}),
    ],
)
def test_published_configs_are_understood(config, changes):
    hf = from_hf(config, "here")
    assert hf.family == config["model_type"]
    assert hf.model.mlp_hidden_size == config["intermediate_size"]
    assert hf.max_positions == config["max_position_embeddings"]
    assert {key: getattr(hf.model, key) for key in changes} == changes


GEMMA = {
    "norm_position": "sandwich",
    "zero_centered_norm": True,
    "mlp_type": "geglu_tanh",
    "embed_scale": 8.0,
    "attention_scale": 12**-0.5,
}
LOCAL = {"sliding_window": 8, "layer_types": [SLIDING, FULL], "rope_local_base": 500}
GPT2 = {"norm_type": "layernorm", "mlp_bias": True, "no_bias": False}
OWN = {
    "mistral": {"no_bias": True, "sliding_window": 4},
    "qwen2": {"no_bias": True, "qkv_bias": True, "sliding_window": 8, "layer_types": [FULL, SLIDING]},
    "qwen3": {"qk_norm": "head"},
    "phi3": {"no_bias": True},
    "olmo2": {"norm_position": "reordered", "qk_norm": "full"},
    "olmo3": {"norm_position": "reordered", "qk_norm": "full", **LOCAL},
    "gemma2": {**GEMMA, "attention_softcap": 20.0, "logit_softcap": 10.0},
    "gemma3_text": {**GEMMA, "qk_norm": "head", **LOCAL},
    "gpt2": {**GPT2, "position": "learned", "max_position_embeddings": 128, "mlp_type": "gelu_tanh"},
    "gpt_neox": {**GPT2, "mlp_type": "gelu", "partial_rotary_factor": 0.5},
    "internlm3": {"no_bias": True, "qkv_bias": True},
}
"""What a model of the family has."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"no_bias": True, "tie_word_embeddings": True}, {"init_std": 0.006}])
@pytest.mark.parametrize("heads", [{}, {"head_dim": 10, "rope_scaling": YARN}, {"head_dim": 8, "rope_scaling": LLAMA3}])
def test_there_and_back_is_the_same_model(family, changes, heads):
    if family in ("internlm", "internlm2", "phi3", "gpt2", "gpt_neox"):
        heads = {}
    ours = ModelConfig.model_validate({**MODEL, "num_kv_attention_heads": 8, **changes, **OWN.get(family, {}), **heads})
    back = from_hf(to_hf(ours, family, 64, "float32"), "here").model
    assert features(back) == features(ours)
    assert (back.init_std, back.dtype) == (ours.init_std, ours.dtype)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"no_bias": True, "qkv_bias": True}, "qwen2"),
        ({"qk_norm": "head"}, "qwen3"),
        ({"qk_norm": "head", "qkv_bias": False}, "llama"),
        *((own, family) for family, own in OWN.items() if family not in ("phi3", "internlm3")),
    ],
)
def test_the_family_is_the_first_that_can_express_the_model(changes, family):
    if family in ("gpt2", "gpt_neox"):
        changes = {**changes, "num_kv_attention_heads": 8}
    assert default_family(ModelConfig.model_validate({**MODEL, **changes})) == family


@pytest.mark.parametrize(("name", "family"), [("7B_sft", "llama"), ("gpt2_124m", "gpt2"), ("llama_8m", "llama")])
def test_shipped_configs_can_be_exported(name, family):
    model = load_config(str(ROOT / "configs" / f"{name}.py")).config.model
    assert default_family(model) == family
    assert to_hf(model, family, 64, "float32")["model_type"] == family


QWEN_WINDOWS = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4}
SMOL_WINDOWS = {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 4}
LINEAR_BY_2 = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom': expected one of llama, mistral, qwen2, qwen3, "),
        ({"hidden_size": None}, "hidden_size: found None, expected a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: found '2'"),
        ({"hidden_act": "tanh"}, "hidden_act: found 'tanh', expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope: found type 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0}}, "found type 'yarn with mscale'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"model_type": "internlm2", "rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope: found type 'llama3'"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [FULL]}, "layer_types: found ['full_"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [FULL, "chunked_attention"]}, "chunked"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "found type 'longrope'"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "long_factor": [1.0]}}, "rope: found type 'su'"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e4}}}, "rope_parameters: found one for each kind of layer"),
        ({"model_type": "olmo3", "rope_parameters": {SLIDING: YARN}}, f"rope_parameters.{SLIDING}: found type 'yarn'"),
        (
            {"model_type": "smollm3", "no_rope_layers": [0, 1]},
            "no_rope_layers: found [0, 1], expected 0",
        ),
        ({"model_type": "smollm3", "no_rope_layer_interval": "4"}, "no_rope_layers"),
        ({"model_type": "gpt_neox"}, "use_parallel_residual: found True, expected False"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx",
        ),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights: found False"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention: found True"),
        ({"model_type": "gpt2", "activation_function": "silu"}, "activation_function: found 'silu', expected 'gelu'"),
        ({"model_type": "gpt2", "n_inner": "wide"}, "n_inner: found 'wide'"),
        ({"model_type": "gpt2", "n_embd": 0}, "n_embd: found 0, expected a positive integer"),
        ({"model_type": "gemma2", "head_dim": 8, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar: found 0"),
        ({"model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": -1.0}, "attention_softcap: found -1.0"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1"),
        ({"rope_theta": -1}, "rope_theta: found -1"),
        ({"head_dim": 15}, "head_dim: found 15 for hidden_size 64 and 8 heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
        ({"rms_norm_eps": 0}, "layer_norm_epsilon"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings: found 'long'"),
        ({"hidden_act": ["silu"]}, "hidden_act: found ['silu'], expected 'silu'"),
        ({**QWEN_WINDOWS, "max_window_layers": None}, "max_window_layers: found None, expected an integer, at least 0"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern: found 0, expected an"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "2"}, "sliding_window_pattern: found '2'"),
        ({**SMOL_WINDOWS, "no_rope_layer_interval": None}, "no_rope_layers: found None"),
        ({**SMOL_WINDOWS, "no_rope_layers": [1]}, "no_rope_layers: found [1]"),
        (
            {"rope_scaling": LINEAR_BY_2, "rope_parameters": {**LINEAR_BY_2, "factor": 4.0}},
            "rope_parameters: found factor 4.0, but 2.0 elsewhere",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": YARN},
            "found rope_type 'yarn', but 'li",
        ),
        ({"model_type": "olmo3", "rope_parameters": LINEAR_BY_2}, "rope_parameters: found one for all layers"),
        ({"model_type": "olmo3", "rope_parameters": {FULL: [1]}}, f"rope_parameters.{FULL}: found [1], expected an"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_"),
    ],
)
def test_another_model_is_refused(changes, words):
    with pytest.raises(CheckpointError, match="here: ") as caught:
        from_hf({**SMALL, **changes}, "here")
    assert words in str(caught.value)


def windows(config: dict[str, object]) -> list[int | None]:
    model = from_hf(config, "here").model
    return [model.window(layer) for layer in range(model.num_layers)]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_of_qwen_slide_from_max_window_layers_on(family):
    """The other way round than its documentation said; and a window without the switch is none."""
    config = {**SMALL, "model_type": family, "num_hidden_layers": 4, "sliding_window": 6, "use_sliding_window": True}
    assert windows({**config, "max_window_layers": 0}) == [6, 6, 6, 6]
    assert windows({**config, "max_window_layers": 2}) == [None, None, 6, 6]
    assert windows({**config, "max_window_layers": 4}) == windows(config) == [None] * 4
    assert windows({**config, "max_window_layers": 4, "layer_types": [SLIDING, FULL] * 2}) == [6, None, 6, None]
    off = {**config, "max_window_layers": 0, "use_sliding_window": False}
    assert windows(off) == windows({**off, "layer_types": [SLIDING] * 4}) == [None] * 4


def test_layers_of_gemma_3_slide_by_list_by_number_or_by_default():
    """One of these alone would be read as all sliding, or none."""
    config = {**SMALL, "model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window": 5}
    expected = [5, 5, 5, 5, 5, None, 5, 5]
    assert windows(config) == windows({**config, "sliding_window_pattern": 6}) == expected
    assert windows({**config, "layer_types": [SLIDING] * 5 + [FULL] + [SLIDING] * 2}) == expected
    assert windows({**config, "sliding_window_pattern": 2}) == [5, None] * 4
    assert windows({**config, "sliding_window": None}) == [None] * 8
    assert windows({**config, "layer_types": [FULL] * 8}) == [None] * 8


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR),
        ("gpt_neox", {"rotary_emb_base": 500.0, "rotary_pct": 0.5}, {"partial_rotary_factor": 0.5}),
        ("phi3", {"rope_theta": 500.0, "partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_rotations_in_both_spellings(family, old, new):
    new = {"rope_type": "linear", "factor": 2.0} if "linear" in new else new
    config = {**SMALL, "model_type": family, "use_parallel_residual": False}
    both = [
        from_hf({**config, **keys}, "here").model for keys in (old, {"rope_parameters": {"rope_theta": 500.0, **new}})
    ]
    assert both[0] == both[1] and both[0].rope_base == 500.0
    assert both[0].rope_scaling is not None or both[0].partial_rotary_factor == 0.5


def test_the_newer_of_two_names_counts():
    """As in transformers, in whatever order; and a GPT-NeoX is not rotated by a key that its code does not read."""
    yarn, old = {"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 3.0}
    for both in ({**old, **yarn}, {**yarn, "type": "linear"}):
        scaling = from_hf({**SMALL, "rope_scaling": both}, "here").model.rope_scaling
        assert scaling is not None and (scaling.rope_type, scaling.factor) == ("yarn", 4.0)
    neox = {**SMALL, "model_type": "gpt_neox", "use_parallel_residual": False, "rope_theta": 500.0}
    assert from_hf(neox, "here").model.rope_base == 10000.0
    assert from_hf({**neox, "rotary_emb_base": 300}, "here").model.rope_base == 300


@pytest.mark.parametrize(("family", "local"), [("gemma3_text", 300.0), ("olmo3", 500.0)])
def test_rotations_of_each_kind_of_layer_in_both_spellings(family, local):
    """Sliding layers turn by a base of their own, and unscaled; OLMo 3 scales the others with yarn."""
    config = {**SMALL, "model_type": family, "num_hidden_layers": 6, "head_dim": 8}
    old = {**config, "rope_theta": 500.0, "rope_local_base_freq": local, "rope_scaling": YARN}
    kinds = {FULL: {**YARN, "rope_theta": 500.0}, SLIDING: {"rope_type": "default", "rope_theta": local}}
    both = [from_hf(keys, "here").model for keys in (old, {**config, "rope_parameters": kinds})]
    assert both[0] == both[1] and (both[0].rope_base, both[0].rope_local_base) == (500.0, local)
    assert both[0].rope_scaling is not None and rotation_of(both[0], 0) == "local"


def test_defaults_of_gemma_3s_rotations_and_scales():
    model = from_hf({**SMALL, "model_type": "gemma3_text", "num_hidden_layers": 6, "hidden_size": 1152}, "here").model
    assert (model.rope_base, model.rope_local_base, model.rope_scaling) == (1e6, 1e4, None)
    assert (model.embed_scale, model.attention_scale, model.head_size) == (1152**0.5, None, 256)
    scales = {"google/gemma-2-9b": 256**-0.5, "google/gemma-2-27b": 144**-0.5}
    for name, scale in scales.items():
        family, config, _ = PUBLISHED[name]
        model = from_hf({**config, "model_type": family}, name).model
        assert (model.attention_scale or model.head_size**-0.5) == scale, "not that of head_dim where another is said"


def test_layers_without_rotation_are_those_with_0():
    """In no_rope_layers a 1 says that there is a rotation."""
    family, config, _ = PUBLISHED["HuggingFaceTB/SmolLM3-3B"]
    for keys in ({}, {"no_rope_layers": [1, 1, 1, 0] * 9}, {"no_rope_layer_interval": 4, "no_rope_layers": None}):
        model = from_hf({**config, "model_type": family, **keys}, "here").model
        without = [layer for layer in range(36) if rotation_of(model, layer) is None]
        assert without == [3, 7, 11, 15, 19, 23, 27, 31, 35]
    model = from_hf({**config, "model_type": family, "no_rope_layers": [1] * 36}, "here").model
    assert all(rotation_of(model, layer) for layer in range(36))


def test_config_json_says_what_readers_would_derive():
    """head_dim; and no special tokens of a family's default vocabulary, which need not be in ours."""
    written = to_hf(ModelConfig.model_validate({**MODEL, "no_bias": True, "head_dim": 10}), "phi3", 64, "float32")
    assert written["head_dim"] == 10 and written["pad_token_id"] is None and written["eos_token_id"] is None
    natural = to_hf(ModelConfig.model_validate({**MODEL, "no_bias": True}), "llama", 64, "float32")
    assert natural["head_dim"] == 8
    null = from_hf({**natural, "head_dim": None}, "here").model
    assert features(null) == features(ModelConfig.model_validate({**MODEL, "no_bias": True}))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"apply_post_layer_norm": True}, "model.norm_position='post': it has 'pre'"),
        ("llama", {"sliding_window": 4}, "model.sliding_window=4: it has None"),
        ("mistral", {"no_bias": True, "sliding_window": 4, "layer_types": [SLIDING, FULL]}, "model.layer_types="),
        ("internlm", {"num_kv_attention_heads": 2}, "num_kv_attention_heads=2: it has 8"),
        ("llama", {"qk_norm": "head"}, r"model.qk_norm='head': it has False"),
        ("qwen3", {}, r"model.qk_norm=False: it has 'head'"),
        ("qwen2", {}, "model.out_bias=True: it has False"),
        ("internlm2", {"head_dim": 16}, r"model.head_dim=16: it has 8"),
        ("internlm2", {"rope_scaling": LLAMA3}, "rope: found type 'llama3', expected"),
        ("llama", {"mlp_type": "gelu"}, "model.mlp_type='gelu': it has 'swiglu'"),
        ("qwen3", {"qk_norm": "head", "mlp_bias": True}, "model.mlp_bias=True: it has False"),
        ("llama", {"head_bias": True}, "model.head_bias=True: it has False"),
        ("llama", {"logit_scale": 0.5}, "model.logit_scale=0.5: it has 1.0"),
        ("llama", {"logit_softcap": 30.0}, "model.logit_softcap=30.0: it has None"),
        ("llama", {"attention_softcap": 30.0}, "model.attention_softcap=30.0: it has None"),
        ("llama", {"attention_scale": 0.25}, "model.attention_scale=0.25: it has 0.35"),
        ("llama", {"embed_scale": 8.0}, "model.embed_scale=8.0: it has 1.0"),
        ("llama", {"position": "sinusoidal"}, "model.position='sinusoidal': it has 'rope'"),
        ("llama", {"position": "none"}, "model.position='none': it has 'rope'"),
        ("llama", {"no_rope_every": 2}, "model.no_rope_every=2: it has 0"),
        ("llama", {"partial_rotary_factor": 0.5}, "model.partial_rotary_factor=0.5: it has 1"),
        (
            "qwen3",
            {"qk_norm": "head", "sliding_window": 4, "rope_local_base": 500},
            "model.rope_local_base=500.0: it has None",
        ),
        ("phi3", {"no_bias": True, "rope_scaling": YARN}, "rope: found type 'yarn'"),
    ],
)
def test_what_has_no_form_there_is_refused(family, changes, words):
    with pytest.raises(CheckpointError, match=words):
        to_hf(ModelConfig.model_validate({**MODEL, **changes}), family, 64, "float32")


def sizes(vocabulary: int, hidden: int, width: int, layers: int, heads: int, **more: object) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **{{"kv": "num_key_value_heads", "tied": "tie_word_embeddings"}.get(key, key): more[key] for key in more},
    }


PUBLISHED = {
    "meta-llama/Llama-2-7b": ("llama", sizes(32000, 4096, 11008, 32, 32), 6_738_415_616),
    "meta-llama/Llama-3.1-8B": (
        "llama",
        sizes(128256, 4096, 14336, 32, 32, kv=8, rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192}),
        8_030_261_248,
    ),
    "meta-llama/Llama-3.2-1B": ("llama", sizes(128256, 2048, 8192, 16, 32, kv=8, tied=True), 1_235_814_400),
    "meta-llama/Llama-3.2-3B": ("llama", sizes(128256, 3072, 8192, 28, 24, kv=8, tied=True), 3_212_749_824),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        sizes(32000, 4096, 14336, 32, 32, kv=8, sliding_window=4096),
        7_241_732_096,
    ),
    "mistralai/Mistral-7B-v0.3": (
        "mistral",
        sizes(32768, 4096, 14336, 32, 32, kv=8, sliding_window=None),
        7_248_023_552,
    ),
    "mistralai/Mistral-Nemo-Base-2407": (
        "mistral",
        sizes(131072, 5120, 14336, 40, 32, kv=8, head_dim=128, sliding_window=None),
        12_247_782_400,
    ),
    "Qwen/Qwen2.5-0.5B": ("qwen2", sizes(151936, 896, 4864, 24, 14, kv=2, tied=True), 494_032_768),
    "Qwen/Qwen2.5-7B": ("qwen2", sizes(152064, 3584, 18944, 28, 28, kv=4), 7_615_616_512),
    "Qwen/Qwen2.5-14B": ("qwen2", sizes(152064, 5120, 13824, 48, 40, kv=8), 14_770_033_664),
    "Qwen/Qwen3-0.6B": ("qwen3", sizes(151936, 1024, 3072, 28, 16, kv=8, head_dim=128, tied=True), 596_049_920),
    "Qwen/Qwen3-4B": ("qwen3", sizes(151936, 2560, 9728, 36, 32, kv=8, head_dim=128, tied=True), 4_022_468_096),
    "Qwen/Qwen3-8B": ("qwen3", sizes(151936, 4096, 12288, 36, 32, kv=8, head_dim=128), 8_190_735_360),
    "Qwen/Qwen3-14B": ("qwen3", sizes(151936, 5120, 17408, 40, 40, kv=8, head_dim=128), 14_768_307_200),
    "allenai/OLMo-2-1124-7B": ("olmo2", sizes(100352, 4096, 11008, 32, 32), 7_298_617_344),
    "allenai/OLMo-2-1124-13B": ("olmo2", sizes(100352, 5120, 13824, 40, 40), 13_716_198_400),
    "allenai/Olmo-3-1025-7B": ("olmo3", sizes(100278, 4096, 11008, 32, 32), 7_298_011_136),
    "allenai/Olmo-3-1125-32B": ("olmo3", sizes(100278, 5120, 27648, 64, 40, kv=8), 32_233_522_176),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", sizes(128256, 2048, 11008, 36, 16, kv=4, tied=True), 3_075_098_624),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", sizes(32064, 3072, 8192, 32, 32, sliding_window=2047), 3_821_079_552),
    "microsoft/phi-4": ("phi3", sizes(100352, 5120, 17920, 40, 40, kv=10, rope_theta=250000), 14_659_507_200),
    "google/gemma-2-2b": ("gemma2", sizes(256000, 2304, 9216, 26, 8, kv=4, head_dim=256), 2_614_341_888),
    "google/gemma-2-9b": ("gemma2", sizes(256000, 3584, 14336, 42, 16, kv=8, head_dim=256), 9_241_705_984),
    "google/gemma-2-27b": (
        "gemma2",
        sizes(256000, 4608, 36864, 46, 32, kv=16, head_dim=128, query_pre_attn_scalar=144),
        27_227_128_320,
    ),
    "google/gemma-3-1b-pt": (
        "gemma3_text",
        sizes(262144, 1152, 6912, 26, 4, kv=1, head_dim=256, sliding_window=512),
        999_885_952,
    ),
    # Of the larger ones the published number counts the part for images, too; their config.json says little.
    "google/gemma-3-4b-pt": (
        "gemma3",
        {"text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, **GEMMA3_TEXT}},
        4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    ),
    "google/gemma-3-12b-pt": (
        "gemma3",
        {"text_config": {**sizes(262208, 3840, 15360, 48, 16, kv=8), **GEMMA3_TEXT}},
        12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    ),
    "google/gemma-3-27b-pt": (
        "gemma3",
        {"text_config": {**sizes(262208, 5376, 21504, 62, 32, kv=16, head_dim=128), **GEMMA3_TEXT}},
        27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
    ),
    "openai-community/gpt2": ("gpt2", {}, 124_439_808),
    "openai-community/gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
    "openai-community/gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    "openai-community/gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": (
        "gpt_neox",
        sizes(50432, 2560, 10240, 32, 32, use_parallel_residual=False, rotary_pct=1.0),
        2_775_864_320,
    ),
    "internlm/internlm2-7b": ("internlm2", sizes(92544, 4096, 14336, 32, 32, kv=8, bias=False), 7_737_708_544),
    "internlm/internlm2-20b": ("internlm2", INTERNLM2_20B, 19_861_149_696),
    "internlm/internlm3-8b-instruct": (
        "internlm3",
        sizes(128512, 4096, 10240, 48, 32, kv=2, head_dim=128),
        8_804_241_408,
    ),
}
"""model_type, config.json, shortened, and the number of parameters in the published safetensors files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_files(name):
    family, config, count = PUBLISHED[name]
    hf = from_hf({**config, "model_type": family}, name)
    assert sum(math.prod(shape) for shape in our_shapes(hf.model).values()) == count
    assert hf.family in (family, "gemma3_text") and features(hf.model) == features(there_and_back(hf))
    run = {"data": {"seq_len": hf.max_positions, "total_steps": 4}, "lr_scheduler": {"total_steps": 4}}
    assert not list(cross_problems(Config.model_validate({**run, "grad_scaler": None, "model": hf.model}), None))


def there_and_back(hf: HFConfig) -> ModelConfig:
    return from_hf(to_hf(hf.model, hf.family, hf.max_positions, "bfloat16"), "back").model


@pytest.mark.parametrize("name", [name for name, (*_, count) in PUBLISHED.items() if count > 7e9])
def test_the_plan_of_a_layout_counts_the_same(name):
    """Two tensor-parallel ranks, four stages, four data-parallel ranks."""
    family, config, count = PUBLISHED[name]
    values = {
        "data": {"seq_len": 64, "total_steps": 4},
        "lr_scheduler": {"total_steps": 4},
        "parallel": {"tensor": 2, "pipeline": {"size": 4}},
        "model": from_hf({**config, "model_type": family}, name).model.model_copy(update={"embed_split_hidden": False}),
    }
    assert holdings(Config.model_validate(values), sizes_of(32, 2, 4, -1), AttentionBackend.SDPA)[1] == count
