"""What context parallelism sends and keeps in one layer, of a row that is one document: shorter ones send no more.

gather    keys and values of all ranks; their gradients back                        kept: those of the row
ring      own keys and values to the ranks whose queries see them, twice; gradients  kept: own ones
ulysses   queries, keys and values for heads; the output back; both again backward   kept: the row's, of own heads
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from internlm_lite.layers.context_parallel.ring import ring_messages
from internlm_lite.layers.context_parallel.row import context_row
from internlm_lite.layers.context_parallel.ulysses import heads_sent
from internlm_lite.layers.costs import Message, RowShape


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of one token's heads on a tensor-parallel rank."""

    queries: int
    keys: int
    """And as many of values."""
    kv_heads: int
    window: int | None


def exchange_messages(row: RowShape, heads: HeadBytes) -> list[Message]:
    """Of this rank, in a forward and a backward pass; none without context parallelism."""
    if row.context == 1:
        return []
    if in_ring(row):
        return _ring(row, heads)
    if row.exchange == "gather":
        n_bytes = 2 * row.context * row.tokens * heads.keys
        return [Message("cp", "all_gather", n_bytes), Message("cp", "all_to_all", n_bytes, backward=True)]
    there, back = row.tokens * (heads.queries + 2 * _sent(row, heads)), row.tokens * heads.queries
    return [Message("cp", "all_to_all", n, backward=backward) for n in (there, back) for backward in (False, True)]


def _ring(row: RowShape, heads: HeadBytes) -> list[Message]:
    """Of the rank that sends most."""
    tokens, device = row.context * row.tokens, torch.device("cpu")
    cuts = [context_row((0, tokens), {heads.window: 1}, row.context, rank, device) for rank in range(row.context)]
    found = [ring_messages(cut, heads.window, 2 * heads.keys) for cut in cuts]
    return max(found, key=lambda messages: sum(message.n_bytes for message in messages))


def _sent(row: RowShape, heads: HeadBytes) -> int:
    """Bytes of a token's keys that "ulysses" sends: copies where there are fewer heads than ranks."""
    return heads.keys // heads.kv_heads * heads_sent(heads.kv_heads, row.context)


def kept_keys(row: RowShape, heads: HeadBytes) -> int | None:
    """Bytes of keys and values that come from other ranks and are kept in the place of this rank's own; None: own ones
    are kept."""
    if row.context == 1 or in_ring(row):
        return None
    return 2 * row.tokens * (row.context * heads.keys if row.exchange == "gather" else _sent(row, heads))


def kept_outputs(row: RowShape, *, in_blocks: bool) -> int:
    """How often a layer keeps the output of attention: as the input of the next product; in the calls of a kernel that
    computes by document, or other heads; a ring keeps one, with its statistics, however it is computed."""
    calls = row.attention_by_document or (row.context > 1 and row.exchange == "ulysses")
    return 1 + (calls and not in_blocks and not in_ring(row))


def in_ring(row: RowShape) -> bool:
    return row.context > 1 and row.exchange == "ring"
