"""FLOP/s of matrix products at the model's shapes: forward, input gradient and weight gradient."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from internlm_lite.config.schema import ModelConfig


@dataclass(frozen=True)
class LinearShape:
    """`count` matrices [outputs, inputs] in the model."""

    inputs: int
    outputs: int
    count: int


def linear_layers(model: ModelConfig) -> list[LinearShape]:
    """Every matrix product with weights in one forward pass."""
    hidden, layers, queries = model.hidden_size, model.num_layers, model.num_attention_heads * model.head_size
    return [
        LinearShape(hidden, queries + 2 * model.kv_heads * model.head_size, layers),
        LinearShape(queries, hidden, layers),
        LinearShape(hidden, model.mlp_hidden_size, 2 * layers),
        LinearShape(model.mlp_hidden_size, hidden, layers),
        LinearShape(hidden, model.vocab_size, 1),
    ]


def measured_rate(layers: list[LinearShape], rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s over all products of one forward and backward pass with `rows` tokens; each product is timed alone."""
    flops = seconds = 0.0
    for shape in layers:
        x = torch.randn(rows, shape.inputs, device=device).to(dtype)
        weight = torch.randn(shape.outputs, shape.inputs, device=device).to(dtype)
        y = torch.randn(rows, shape.outputs, device=device).to(dtype)
        for left, right in ((x, weight.t()), (y, weight), (y.t(), x)):
            seconds += shape.count * _median_seconds(left, right)
            flops += shape.count * 2 * rows * shape.inputs * shape.outputs
    return flops / seconds


def _median_seconds(left: torch.Tensor, right: torch.Tensor, repeats: int = 9) -> float:
    out = left @ right
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if out.device.type == "cuda":
            torch.cuda.synchronize(out.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
