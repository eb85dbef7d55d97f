"""The `tflops` of the step line, by InternLM's formula, and `mfu`.

    F = c * ((8 + 4m) * B*s*h^2 + 4 * B*s^2*h) * L + 6 * B*s*h*V
    m = mlp_ratio, times 1.5 with a gate (SwiGLU), c = 3 + share of layers recomputed, B*s tokens in the step
    s^2: of a sliding layer the pairs in its window (`ModelConfig.attention_pairs`), on average over the layers
    of an encoder the same of its layers and source tokens, beside the first term; of attention to n source tokens for
    each target token c * (4 + 4n) * B*s*h^2 + c * 4n * B*s^2*h more in each layer of the decoder

from "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (Narayanan et al., 2021).
`tflops` uses F, as InternLM's logs do. `mfu` takes what the layers say (`models.stages.model_flops_per_token`): no
recomputation, grouped key/value heads and the rounded feed-forward width as they are. Both take attention over all of
seq_len, masked pairs too (not halved for causality): an upper bound for packed documents.
"""

from __future__ import annotations

from fractions import Fraction

from internlm_lite.config.schema import ModelConfig


def internlm_step_flops(
    model: ModelConfig, seq_len: int, sequences: int, source_share: Fraction = Fraction(1)
) -> float:
    """F for one optimizer step over `sequences` windows of `seq_len` tokens on all data-parallel ranks.
    `source_share`: see `Config.source_share`."""
    h, tokens = model.hidden_size, sequences * seq_len
    passes = 3 + model.recomputed_share  # forward, backward at twice the cost, and the recomputed share of a forward
    mlp = model.mlp_ratio * (1.5 if model.gated_mlp else 1)
    first = model.num_encoder_layers
    pairs = sum(model.attention_pairs(first + layer, seq_len) for layer in range(model.num_layers)) / model.num_layers
    block = (8 + 4 * mlp) * tokens * h**2 + 4 * sequences * pairs * h
    found = passes * block * model.num_layers + 6 * tokens * h * model.vocab_size
    if not first:
        return found
    length, n = int(seq_len * source_share), float(source_share)
    encoder = first * (8 + 4 * mlp) * sequences * length * h**2
    encoder += 4 * sequences * sum(model.attention_pairs(layer, length) for layer in range(first)) * h
    cross = model.num_layers * ((4 + 4 * n) * tokens * h**2 + 4 * n * tokens * seq_len * h)
    return found + passes * (encoder + cross)


def internlm_flops_per_token(model: ModelConfig, seq_len: int, source_share: Fraction = Fraction(1)) -> float:
    """F per consumed (target) token; the same for every batch size."""
    return internlm_step_flops(model, seq_len, 1, source_share) / seq_len


def tflops_per_gpu(flops_per_token: float, tokens: int, seconds: float, world_size: int) -> float:
    """TFLOP/s of one GPU when `world_size` of them took `seconds` for `tokens`."""
    return flops_per_token * tokens / (seconds * world_size * 1e12)


def mfu(flops_per_token: float, tokens: int, seconds: float, world_size: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: fraction of `peak` (FLOP/s of one device) reached; None if the peak is unknown."""
    return None if peak is None else tflops_per_gpu(flops_per_token, tokens, seconds, world_size) * 1e12 / peak
