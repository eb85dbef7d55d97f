"""Attention by rule (window, soft cap, scale, dropped weights) against the formula over all pairs, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internlm_lite.config.schema import LossConfig
from internlm_lite.layers import scores
from internlm_lite.layers.flash import AttentionBackend, packed_sdpa
from internlm_lite.layers.scores import AttentionRule, attention_rule
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import build_model
from tests.models.counted import saved_bytes
from tests.models.small import small_config

T = 40
ROWS = {"one": (0, T), "equal": (0, 10, 20, 30, T), "unequal": (0, 1, 8, 8 + 7, T), "padded": (0, 33, T, T, T)}
RULES = {
    "window of one": AttentionRule(window=1),
    "window": AttentionRule(window=7),
    "window of a document": AttentionRule(window=10),
    "window beyond": AttentionRule(window=T + 1),
    "soft cap": AttentionRule(softcap=0.7),
    "scale": AttentionRule(scale=0.31),
    "all": AttentionRule(3, 7, 0.5, 1.3),
}


def over_all_pairs(rule, boundaries, q, k, v, factors=None):
    """Of the whole row at once; `factors` [H, T, T] of the weights."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scaled = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(q.shape[-1]) if rule.scale is None else rule.scale)
    capped = scaled if rule.softcap is None else rule.softcap * torch.tanh(scaled / rule.softcap)
    document = torch.bucketize(torch.arange(len(q)), torch.tensor(boundaries[1:]), right=True)
    at = torch.arange(len(q))
    seen = (document[:, None] == document) & (at <= at[:, None])
    if rule.window is not None:
        seen &= at[:, None] - at < rule.window
    weights = capped.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights if factors is None else weights * factors, v)


def inputs(kv_heads=2, dtype=torch.float64, tokens=T):
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(tokens, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
    *qkv, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in qkv], weight


def with_gradients(out, qkv, weight):
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]


def assert_close(ours, expected, rtol=1e-11, atol=1e-12):
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("boundaries", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("block", [4, 2**20])
def test_a_rule_is_the_formula_over_all_pairs(rule, boundaries, block, monkeypatch):
    """No window reaches into another document; the cap comes before the mask, or masked scores would be -c."""
    monkeypatch.setattr(scores, "_AT_ONCE", block)
    monkeypatch.setattr(scores, "_FEWEST", min(block, 16))
    for kv_heads in (4, 2, 1):
        qkv, weight = inputs(kv_heads)
        ours = with_gradients(packed_sdpa(boundaries)(rule, *qkv), qkv, weight)
        assert_close(ours, with_gradients(over_all_pairs(rule, boundaries, *qkv), qkv, weight))


def test_large_scores_are_capped_and_large_caps_change_nothing():
    (q, k, v), _ = inputs()
    q = q.detach() * 50
    boundaries, capped = ROWS["unequal"], AttentionRule(softcap=2.0)
    found = packed_sdpa(boundaries)(capped, q, k, v)
    torch.testing.assert_close(found, over_all_pairs(capped, boundaries, q, k, v), rtol=1e-12, atol=1e-13)
    plain = packed_sdpa(boundaries)(AttentionRule(), q, k, v)
    assert (found - plain).abs().max() > 0.5
    torch.testing.assert_close(packed_sdpa(boundaries)(AttentionRule(softcap=1e9), q, k, v), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [RULES["window"], RULES["all"]], ids=["window", "all"])
def test_other_dtypes_are_close(dtype, rule):
    qkv, weight = inputs(dtype=dtype)
    ours = with_gradients(packed_sdpa(ROWS["unequal"])(rule, *qkv), qkv, weight)
    assert {x.dtype for x in ours} == {dtype}
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = with_gradients(over_all_pairs(rule, ROWS["unequal"], *exact), exact, weight.double())
    for mine, theirs in zip(ours, expected, strict=True):
        assert ((mine.double() - theirs).norm() / theirs.norm()).item() < 4 * torch.finfo(dtype).eps


def factors_of(layer, heads, queries, keys):
    """0 or 2, by all four numbers."""
    mixed = (heads * 7919 + queries * 104729 + keys * 1299709 + layer * 15485863) * 2654435761
    return 2.0 * ((mixed >> 7) % 2)


def dropped(layer, weights, *numbers):
    return weights * factors_of(layer, *numbers)


@pytest.mark.parametrize("rule", [AttentionRule(5), RULES["window"], RULES["all"]], ids=["plain", "window", "all"])
@pytest.mark.parametrize("boundaries", ROWS.values(), ids=ROWS)
def test_weights_are_dropped_by_layer_head_and_tokens_of_the_row(rule, boundaries, monkeypatch):
    at = torch.arange(T)
    factors = factors_of(rule.layer, torch.arange(4).view(-1, 1, 1), at[:, None], at).double()
    assert 0.4 < factors.mean() / 2 < 0.6
    for block in (4, 2**20):
        monkeypatch.setattr(scores, "_AT_ONCE", block)
        monkeypatch.setattr(scores, "_FEWEST", min(block, 16))
        qkv, weight = inputs()
        ours = with_gradients(packed_sdpa(boundaries, dropped)(rule, *qkv), qkv, weight)
        assert_close(ours, with_gradients(over_all_pairs(rule, boundaries, *qkv, factors), qkv, weight))


def test_the_work_and_the_memory_are_those_of_the_window():
    tokens, window = 4096, 64
    qkv, weight = inputs(tokens=tokens, dtype=torch.float32)
    counter = FlopCounterMode(display=False)
    with counter:
        out = packed_sdpa((0, tokens))(AttentionRule(window=window), *qkv)
    pairs = counter.get_total_flops() / (4 * 4 * 8)
    exact = window * tokens - window * (window - 1) // 2
    assert exact <= pairs < 2.1 * exact and exact < tokens**2 / 60

    class Holder(torch.nn.Module):
        pass

    kept = saved_bytes(lambda: packed_sdpa((0, tokens))(AttentionRule(window=window), *qkv), Holder())
    assert kept == sum(x.nbytes for x in qkv)
    assert len(with_gradients(out, qkv, weight)) == 4


@pytest.mark.parametrize("window", [2, 13, T])
def test_windows_caps_and_scales_are_those_of_transformers(window):
    """Its mask of sliding layers, and its attention of Gemma 2, which computes the softmax in fp32."""
    from transformers.masking_utils import sliding_window_causal_mask_function
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    (q, k, v), _ = inputs()
    sees = sliding_window_causal_mask_function(window)
    seen = [[bool(sees(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(T)] for i in range(T)]
    mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(~torch.tensor(seen), -1e30)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    heads = (x.detach().transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    expected, _ = eager_attention_forward(module, *heads, mask[None, None], scaling=0.4, softcap=1.5)
    ours = packed_sdpa((0, T))(AttentionRule(0, window, 1.5, 0.4), q, k, v)
    torch.testing.assert_close(ours, expected[0].double(), rtol=1e-6, atol=1e-6)


def test_the_pattern_of_layers_counts_from_the_first_of_the_model():
    config = small_config(num_layers=7, sliding_window=5, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    assert [attention_rule(config, layer).window for layer in range(7)] == [5, 5, None, 5, 5, None, 5]
    model = build_model(config, LossConfig(), single_process_mesh(), AttentionBackend.SDPA)
    assert [block.attention.rule for block in model.blocks()] == [attention_rule(config, n) for n in range(7)]
    everywhere = small_config(sliding_window=5)
    assert [attention_rule(everywhere, layer).window for layer in range(3)] == [5, 5, 5]
    capped = attention_rule(small_config(attention_softcap=30.0, attention_scale=0.1), 2)
    assert capped == AttentionRule(2, None, 30.0, 0.1)


def test_pairs_of_a_window():
    """W * S - W * (W - 1) / 2 of them, and mirrors, because full attention counts S^2: 2 * S (S + 1) / 2 - S."""
    for window, pairs in ((512, 917760), (2048, 2098176), (4096, 2098176), (None, 2098176), (1, 2048)):
        assert small_config(sliding_window=window).attention_pairs(0, 2048) == 2 * pairs - 2048
    config = small_config(sliding_window=5)
    for length in (0, 1, 4, 5, 6, 23):
        boundaries = range(length)
        seen = sum(q - k < 5 and k <= q for q in boundaries for k in boundaries)
        assert config.attention_pairs(1, length) == 2 * seen - length
