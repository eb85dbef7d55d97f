"""config.json and our model section."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.apps.convert.families import FAMILIES
from internlm_lite.apps.convert.hf_config import default_family, from_hf, mlp_width, to_hf
from internlm_lite.apps.convert.hf_windows import FULL, SLIDING
from internlm_lite.apps.convert.recipes import our_shapes
from internlm_lite.config.schema import ModelConfig, RopeScaling
from internlm_lite.errors import CheckpointError
from internlm_lite.units import round_up
from tests.apps.convert.made import MODEL

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


OWN = {
    "mistral": {"no_bias": True, "sliding_window": 4},
    "qwen2": {"no_bias": True, "qkv_bias": True, "sliding_window": 8, "layer_types": [FULL, SLIDING]},
    "qwen3": {"qk_norm": "head"},
    "phi3": {"no_bias": True},
    "internlm3": {"no_bias": True, "qkv_bias": True},
}
"""What a model of the family has."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"no_bias": True, "tie_word_embeddings": True}, {"init_std": 0.006}])
@pytest.mark.parametrize("heads", [{}, {"head_dim": 10, "rope_scaling": YARN}, {"head_dim": 8, "rope_scaling": LLAMA3}])
def test_there_and_back_is_the_same_model(family, changes, heads):
    if heads and family in ("internlm", "internlm2", "phi3"):
        heads = {}
    ours = ModelConfig.model_validate({**MODEL, "num_kv_attention_heads": 8, **changes, **OWN.get(family, {}), **heads})
    back = from_hf(to_hf(ours, family, 64, "float32"), "here").model
    assert back.mlp_hidden_size == ours.mlp_hidden_size and back.head_size == ours.head_size
    same = {"mlp_ratio": 1.0, "multiple_of": 1, "head_dim": None}
    assert back.model_copy(update=same) == ours.model_copy(update=same)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"no_bias": True, "qkv_bias": True}, "qwen2"),
        ({"qk_norm": "head"}, "qwen3"),
        ({"qk_norm": "head", "qkv_bias": False}, "llama"),
    ],
)
def test_the_family_is_the_first_that_can_express_the_model(changes, family):
    assert default_family(ModelConfig.model_validate({**MODEL, **changes})) == family


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom': expected one of llama, mistral, qwen2, qwen3, "),
        ({"hidden_size": None}, "hidden_size: found None, expected a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: found '2'"),
        ({"hidden_act": "tanh"}, "hidden_act: found 'tanh', expected 'silu'"),
        ({"mlp_bias": True}, "mlp_bias: found True"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope: found type 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0}}, "found type 'yarn with mscale'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"model_type": "internlm2", "rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope: found type 'llama3'"),
        ({"model_type": "internlm3", "bias": True}, "bias: found True"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [FULL]}, "layer_types: found ['full_"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [FULL, "chunked_attention"]}, "chunked"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1"),
        ({"rope_theta": -1}, "rope_theta: found -1"),
        ({"head_dim": 15}, "head_dim: found 15 for hidden_size 64 and 8 heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
        ({"rms_norm_eps": 0}, "layer_norm_epsilon"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings: found 'long'"),
    ],
)
def test_another_model_is_refused(changes, words):
    with pytest.raises(CheckpointError, match="here: ") as caught:
        from_hf({**SMALL, **changes}, "here")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"apply_post_layer_norm": True}, "apply_post_layer_norm=True: it has False"),
        ("llama", {"sliding_window": 4}, "model.sliding_window=4: it has None"),
        ("mistral", {"no_bias": True, "sliding_window": 4, "layer_types": [SLIDING, FULL]}, "model.layer_types="),
        ("internlm", {"num_kv_attention_heads": 2}, "num_kv_attention_heads=2: it has 8"),
        ("llama", {"qk_norm": "head"}, r"model.qk_norm='head': it has False"),
        ("qwen3", {}, r"model.qk_norm=False: it has 'head'"),
        ("qwen2", {}, "model.out_bias=True: it has False"),
        ("internlm2", {"head_dim": 16}, r"model.head_dim=16: it has 8"),
        ("internlm2", {"rope_scaling": LLAMA3}, "rope: found type 'llama3', expected"),
        ("phi3", {"no_bias": True, "rope_scaling": YARN}, "rope: found type 'yarn'"),
    ],
)
def test_what_has_no_form_there_is_refused(family, changes, words):
    with pytest.raises(CheckpointError, match=words):
        to_hf(ModelConfig.model_validate({**MODEL, **changes}), family, 64, "float32")


PUBLISHED = {
    "meta-llama/Llama-3.1-8B": (
        {**LLAMA3_8B, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}},
        8_030_261_248,
    ),
    "mistralai/Mistral-7B-v0.3": (
        {**LLAMA3_8B, "model_type": "mistral", "vocab_size": 32768, "sliding_window": None, "rope_parameters": None},
        7_248_023_552,
    ),
    "Qwen/Qwen2.5-7B": (
        {
            **{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944},
            **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        },
        7_615_616_512,
    ),
    "Qwen/Qwen3-8B": (
        {
            **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
            **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        },
        8_190_735_360,
    ),
    "Qwen/Qwen3-14B": (
        {
            **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408},
            **{"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128},
        },
        14_768_307_200,
    ),
    "Qwen/Qwen3-0.6B": (
        {
            **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072},
            **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
}
"""config.json, shortened, and the number of parameters in the published safetensors files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_files(name):
    config, count = PUBLISHED[name]
    assert sum(math.prod(shape) for shape in our_shapes(from_hf(config, name).model).values()) == count
