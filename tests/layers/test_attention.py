"""Head counts that cannot work are refused with what to change."""

import pytest

from internlm_lite.config.schema import ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.attention import check_heads


def heads(**model: int) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 8, "num_layers": 1, **model})


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        check_heads(heads(hidden_size=30, num_attention_heads=6, num_kv_attention_heads=4), 3)
    text = str(error.value)
    assert "even number of features" in text and "divisor of num_attention_heads 6" in text and "tensor 3" in text


def test_what_fits_passes():
    check_heads(heads(hidden_size=64, num_attention_heads=8, num_kv_attention_heads=4), 4)
    check_heads(heads(hidden_size=30, num_attention_heads=4, num_kv_attention_heads=4, head_dim=6), 4)
