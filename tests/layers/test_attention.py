"""Head counts that cannot work are refused with what to change."""

import pytest

from internlm_lite.errors import ConfigError
from internlm_lite.layers.attention import check_heads


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        check_heads(hidden_size=30, heads=6, kv_heads=4, tp_size=3)
    text = str(error.value)
    assert "even number of features" in text and "divisor of num_attention_heads 6" in text and "tensor 3" in text


def test_what_fits_passes():
    check_heads(hidden_size=64, heads=8, kv_heads=4, tp_size=4)
