"""How evenly context-parallel ranks share the attention of real batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.context_parallel.row import context_row, layers_by_window


@dataclass(frozen=True)
class ContextBalance:
    """Of one step."""

    step: int
    attention_flops: int
    """Of the products of attention, forward and backward, of pairs of tokens that see each other, on all ranks."""
    imbalance: float
    """Attention work of the busiest rank over the mean, row by row, as each row waits for its busiest rank."""


def context_balance(step: int, rows: Iterable[Sequence[int]], model: ModelConfig, size: int) -> ContextBalance:
    """`rows`: document boundaries of each row of the step, on all data-parallel ranks; `size`: ranks that share one."""
    layers = layers_by_window([model.window(layer) for layer in range(model.num_layers)])
    work = [context_row(borders, layers, size, 0, torch.device("cpu")).work(layers) for borders in rows]
    pairs = sum(map(sum, work))
    per_pair = 3 * 4 * model.num_attention_heads * model.head_size  # q k^T and its weights times v; backward: twice
    return ContextBalance(step, per_pair * pairs, sum(map(max, work)) * size / pairs)
