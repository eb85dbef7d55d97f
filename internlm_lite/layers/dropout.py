"""Dropout whose masks are a function of (seed, step, layer, site, token, feature), and of nothing else.

    token keys     (seed, step, token of the global batch) -> two numbers     once a step
    mask           token keys, (layer, site), feature -> one number, which is below p * 2^32 where x is dropped

So a mask is the same in every layout, after a resume and wherever it is computed again: no generator has a state, and
the backward pass keeps no mask. All numbers are of 32 bits, in int64, whose products do not overflow: the same bits on
every device and in graphs of torch.compile. The mixing is "lowbias32" (github.com/skeeto/hash-prospector).
"""

from __future__ import annotations

import enum
from typing import Any, TypeVar, cast

import torch
from torch.utils.checkpoint import checkpoint

from internlm_lite.layers.compiled import compiled_in_training
from internlm_lite.layers.costs import CostedLayer, Pass, RowShape
from internlm_lite.layers.scores import Drop
from internlm_lite.layers.tensor_parallel import TensorParallelContext

Word = TypeVar("Word", int, torch.Tensor)
"""A number from 0 to 2^32 - 1, or an int64 tensor of such."""

_ALL = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # modulo 2^32; of less than 32 bits, for products of less than 64
_SPREAD = 0x9E3779B1 - 2**32
_STARTS = (0x243F6A88, 0x85A308D3)


class Site(enum.IntEnum):
    """Where something is dropped."""

    EMBEDDING = 0
    ATTENTION_WEIGHTS = 1
    ATTENTION_OUTPUT = 2
    FEED_FORWARD = 3
    SOURCE_EMBEDDING = 4
    CROSS_WEIGHTS = 5
    CROSS_OUTPUT = 6
    FEED_FORWARD_INNER = 7


def _mixed(x: Word) -> Word:
    """A permutation of the numbers in which every bit of the result depends on all of x."""
    x = ((x ^ (x >> 16)) * _FIRST) & _ALL
    x = ((x ^ (x >> 15)) * _SECOND) & _ALL
    return x ^ (x >> 16)


def _hash(start: int, *numbers: int) -> int:
    for number in numbers:
        for word in (number & _ALL, (number >> 32) & _ALL):
            start = _mixed(start ^ word)
    return start


def site_key(layer: int, site: Site) -> tuple[int, int]:
    """Of a layer of the whole model."""
    first, second = (_hash(start, layer, site) for start in _STARTS)
    return first, second


def token_keys(seed: int, step: int, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """[M, 2, tokens] int64 for the rows with numbers `rows` [M] in the step's global batch. Reads no tensor."""
    first, second = (_hash(start, seed, step) for start in _STARTS)
    number = rows[:, None] * tokens + torch.arange(tokens, device=rows.device)
    # One lane adds and one does not: else two steps might have the same masks for other tokens.
    return torch.stack((_mixed((number & _ALL) ^ first), _mixed((number + second) & _ALL)), dim=1)


def _is_dropped(first: torch.Tensor, second: torch.Tensor, features: torch.Tensor, p: float) -> torch.Tensor:
    """bool, of two keys and of features' numbers, which broadcast."""
    x = first ^ (((features & _ALL) * _SPREAD) & _ALL)
    x.mul_(_FIRST).bitwise_and_(_ALL).bitwise_xor_(second)
    x.bitwise_xor_(x >> 15).mul_(_SECOND).bitwise_and_(_ALL)
    return x < round(p * 2**32)


def _drop(x: torch.Tensor, dropped: torch.Tensor, p: float) -> torch.Tensor:
    return (x * (1 / (1 - p))).masked_fill(dropped, 0)


def _drop_features(x: torch.Tensor, keys: torch.Tensor, key: torch.Tensor, p: float, start: int) -> torch.Tensor:
    """x [T, n] of features from number `start`, keys [2, T], key [2] -> as x."""
    first, second = (keys ^ key[:, None]).unsqueeze(-1)
    features = torch.arange(start, start + x.shape[-1], device=x.device)
    return _drop(x, _is_dropped(first, second, features, p), p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keys: torch.Tensor, key: torch.Tensor, p: float, start: int) -> torch.Tensor:
        ctx.save_for_backward(keys, key)
        ctx.p, ctx.start = p, start
        return _drop_features(x, keys, key, p, start)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        keys, key = ctx.saved_tensors
        return _drop_features(grads[0], keys, key, ctx.p, ctx.start), None, None, None, None


def _dropout(x: torch.Tensor, keys: torch.Tensor, key: torch.Tensor, p: float, start: int) -> torch.Tensor:
    if torch.compiler.is_compiling():  # the compiler would keep the mask
        dropped = checkpoint(_drop_features, x, keys, key, p, start, use_reentrant=False, preserve_rng_state=False)
    else:
        dropped = _Dropout.apply(x, keys, key, p, start)
    return cast(torch.Tensor, dropped)


class Dropout(CostedLayer):
    """x [T, hidden] outside split layers -> the same, where each number is 0 with probability `p`, else x / (1 - p)."""

    key: torch.Tensor

    def __init__(self, p: float, layer: int, site: Site, hidden_size: int, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        self.p, self.hidden_size, self.tp_ctx = p, hidden_size, tp_ctx
        # A tensor, so that no graph depends on the layer.
        self.register_buffer("key", torch.tensor(site_key(layer, site), device=tp_ctx.device), persistent=False)
        self._dropout = compiled_in_training(_dropout, wanted=tp_ctx.compiled)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """`keys` [2, T]: those of all tokens of the row; None: nothing is dropped."""
        if keys is None or not self.p:
            return x
        return self._dropout(x, self._keys_of(keys), self.key, self.p, self._start)

    def _keys_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Of the tokens of x."""
        return self.tp_ctx.own_tokens(keys, 1)

    @property
    def _start(self) -> int:
        """The number of the first feature of x."""
        return 0

    def passes(self, row: RowShape) -> list[Pass]:
        if not self.p:
            return []
        numbers = self._numbers(row)
        x = numbers * self.tp_ctx.dtype.itemsize
        if "block" in row.fused:  # joined to the addition; of two gradients one is joined to others
            return [Pass("fused", 3 * x // 2, backward=True)]
        if "activation" in row.fused:
            return [Pass("fused", 2 * x), Pass("fused", 2 * x, backward=True)]
        return [Pass("elementwise", 138 * numbers + 4 * x, 16, backward=back) for back in (False, True)]

    def workspace_bytes(self, row: RowShape) -> int:
        """Two words of each number, unless compiled."""
        return 16 * self._numbers(row) if self.p and not self.tp_ctx.compiled else 0

    def _numbers(self, row: RowShape) -> int:
        return self.tp_ctx.rows(row.tokens) * self.hidden_size


class SplitDropout(Dropout):
    """Inside split layers: x [T, hidden / group size], this rank's range of features of all tokens."""

    def _keys_of(self, keys: torch.Tensor) -> torch.Tensor:
        return keys

    @property
    def _start(self) -> int:
        return self.hidden_size // self.tp_ctx.group.size * self.tp_ctx.group.rank

    def _numbers(self, row: RowShape) -> int:
        return row.tokens * self.hidden_size // self.tp_ctx.group.size


def dropped_weights(p: float, keys: torch.Tensor, first_head: int, site: Site = Site.ATTENTION_WEIGHTS) -> Drop:
    """The `Drop` of a row whose tokens have `keys` [2, T], on a rank whose query heads start with number `first_head`.

    A weight is known by its query, its head, and how far its key is before the query, in documents that begin
    together."""

    def drop(
        layer: int, weights: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        keys_of_site = site_key(layer, site)
        first, second = (
            of_token[queries] ^ _mixed((heads + first_head) ^ of_site)
            for of_token, of_site in zip(keys, keys_of_site, strict=True)
        )
        return _drop(weights, _is_dropped(first, second, queries - seen, p), p)

    return drop
