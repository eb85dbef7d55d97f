"""The FLOP formulas against the 20B demo's figures and small models counted by hand."""

from __future__ import annotations

import pytest

from internlm_lite.config.schema import ModelConfig
from internlm_lite.models.stages import model_flops_per_token
from internlm_lite.monitor.flops import internlm_flops_per_token, internlm_step_flops, mfu, tflops_per_gpu
from tests.monitor.test_line import SEED

B20 = ModelConfig(hidden_size=5120, num_attention_heads=40, num_layers=60, vocab_size=103168, mlp_ratio=8 / 3)
SMALL = ModelConfig(
    hidden_size=64, num_attention_heads=4, num_kv_attention_heads=2, num_layers=3, vocab_size=100,
    mlp_ratio=2, multiple_of=16,
)  # fmt: skip


def test_20b_demo_per_step():
    assert internlm_step_flops(B20, 2048, 32) == 8_124_188_338_421_760
    assert internlm_flops_per_token(B20, 2048) / 1e12 == pytest.approx(0.12396527616, rel=1e-15)


def test_seed_tflops():
    for record in SEED:
        seconds = 65536 / 16 / record.speed.last_tgs_1
        found = tflops_per_gpu(internlm_flops_per_token(B20, 2048), 65536, seconds, 16)
        assert found == pytest.approx(record.tflops, rel=2e-5)


def test_recomputation_costs_one_more_forward():
    head = 6 * 2048 * 5120 * 103168
    plain = internlm_step_flops(B20, 2048, 1) - head
    for share, passes in ((True, 4), (0.5, 3.5), (False, 3)):
        model = B20.model_copy(update={"checkpoint": share})
        assert internlm_step_flops(model, 2048, 1) - head == pytest.approx(plain * passes / 3, rel=1e-14)
        assert model_flops_per_token(model, 2048) == model_flops_per_token(B20, 2048)


def test_model_flops_count_grouped_heads_and_the_real_width():
    attention = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64) + 4 * 128 * 64
    mlp = 2 * 3 * 64 * 128
    assert model_flops_per_token(SMALL, 128) == 3 * (3 * (attention + mlp) + 2 * 64 * 100)


def test_both_formulas_agree_without_grouped_heads():
    exact = B20.model_copy(update={"mlp_ratio": 13824 / 5120})
    assert model_flops_per_token(exact, 2048) == pytest.approx(internlm_flops_per_token(exact, 2048), rel=1e-12)


@pytest.mark.parametrize("mlp_type", ["gelu", "gelu_tanh", "relu"])
def test_a_feed_forward_part_without_a_gate_has_two_matrices(mlp_type):
    """GPT-2's block is 24 h^2 products a token with a width of 4 h: that of SwiGLU with 8/3 h."""
    plain = SMALL.model_copy(update={"mlp_type": mlp_type, "num_kv_attention_heads": None, "mlp_ratio": 4})
    block = 24 * 64**2 + 4 * 128 * 64
    assert internlm_flops_per_token(plain, 128) == pytest.approx(3 * 3 * block + 6 * 64 * 100, rel=1e-14)
    assert model_flops_per_token(plain, 128) == 3 * (3 * block + 2 * 64 * 100)
    gated = plain.model_copy(update={"mlp_type": "geglu"})
    assert model_flops_per_token(gated, 128) - model_flops_per_token(plain, 128) == 3 * 3 * 2 * 64 * 256


def test_a_window_counts_its_pairs_and_not_the_whole_row():
    """2048 tokens, windows of 512: 917,760 pairs of 2,098,176; both, with their mirrors, as S^2 counts them."""
    features, full, window = 64, 2048**2, 2 * 917_760 - 2048
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    for types, pairs in ((None, 3 * window), (kinds, 2 * window + full), (["full_attention"], 3 * full)):
        model = SMALL.model_copy(update={"sliding_window": 512, "layer_types": types})
        lower = model_flops_per_token(SMALL, 2048) - model_flops_per_token(model, 2048)
        assert lower == 3 * 4 * (3 * full - pairs) * features // 2048
        inside = internlm_step_flops(SMALL, 2048, 5) - internlm_step_flops(model, 2048, 5)
        assert inside == pytest.approx(3 * 5 * 4 * (3 * full - pairs) * 64, rel=1e-9)
        short = model.model_copy(update={"sliding_window": 4096})
        assert model_flops_per_token(short, 2048) == model_flops_per_token(SMALL, 2048)


def test_mfu():
    assert mfu(1e9, 1000, 2.0, 4, 1e12) == pytest.approx(0.125)
    assert mfu(1e9, 1000, 2.0, 4, None) is None
