"""Attention over some of the keys that a query sees, and how such results become attention over all of them.

Over keys A a query has an output o_A and the log-sum-exp l_A of its scores; over A and B together it has

    l = log(exp(l_A) + exp(l_B))          o = exp(l_A - l) o_A + exp(l_B - l) o_B

(flash-attn's way to split keys, arXiv:2205.14135, section 3.1; over ranks: arXiv:2310.01889). Both are kept in
the dtype of sums, so the error does not grow with the number of parts. The backward pass needs the l of all keys: a
weight is exp(score - l), whatever part its key is in.

    ReferenceParts    the formula, in blocks of scores: every device, dtype and rule, dropped weights
    FlashParts        torch's own flash kernels: half precision on CUDA, no soft cap, nothing dropped
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from internlm_lite.layers.context_parallel.kernel_calls import KernelCall, kernel_calls
from internlm_lite.layers.context_parallel.ring_parts import Part, Range
from internlm_lite.layers.scores import AttentionRule, Drop, capped_scores, of_groups, scale_of, weighted_values
from internlm_lite.layers.tensor_parallel import accumulation_dtype

_AT_ONCE = 2**22
"""Scores of a block of the reference: 16 MiB in fp32."""
_FEWEST = 16
"""Queries of a block."""


@dataclass(frozen=True)
class KeyBlock:
    """Keys of one rank, as the queries of another see them."""

    parts: tuple[Part, ...]
    device: torch.device
    queries: torch.Tensor | None = None
    """[n] numbers in the row of the rank's tokens. For dropped weights alone, as `keys`."""
    keys: torch.Tensor | None = None
    """[m] of the block's tokens, as `parts` count them."""

    @cached_property
    def calls(self) -> tuple[KernelCall, ...]:
        """Of a kernel that computes the parts; made once for all layers of a window."""
        return kernel_calls(self.parts, self.device)


@dataclass(frozen=True)
class Mixed:
    """What queries have of the keys so far."""

    out: torch.Tensor  # [n, H, D]
    lse: torch.Tensor  # [n, H], natural logarithm; both in the dtype of sums

    @staticmethod
    def nothing(q: torch.Tensor) -> Mixed:
        wide = accumulation_dtype(q.dtype)
        return Mixed(q.new_zeros(q.shape, dtype=wide), q.new_full(q.shape[:2], -math.inf, dtype=wide))

    def add(self, rows: Range, out: torch.Tensor, lse: torch.Tensor) -> None:
        """`out` [rows, H, D], `lse` [rows, H]: of other keys, finite."""
        mine, mine_lse = self.out[slice(*rows)], self.lse[slice(*rows)]
        lse = lse.to(mine_lse.dtype)
        total = torch.logaddexp(mine_lse, lse)
        mine.mul_((mine_lse - total).exp_().unsqueeze(-1)).addcmul_(
            out.to(mine.dtype), (lse - total).exp_().unsqueeze(-1)
        )
        mine_lse.copy_(total)


@dataclass(frozen=True)
class Known:
    """What the backward pass of a rank's queries knows. The first three are in the dtype of the model."""

    q: torch.Tensor  # [n, H, D]
    out: torch.Tensor  # [n, H, D], over all keys
    grad: torch.Tensor  # [n, H, D], of out, contiguous
    lse: torch.Tensor  # [n, H], over all keys, in the dtype of sums

    @cached_property
    def delta(self) -> torch.Tensor:
        """[n, H]: the sum over features of out * grad, in the dtype of sums."""
        return (self.out.to(self.lse.dtype) * self.grad).sum(-1)


class Parts(Protocol):
    """Computes blocks. k, v [m, Hkv, D] may be strided."""

    @property
    def rule(self) -> AttentionRule: ...

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: KeyBlock, mixed: Mixed) -> None:
        """Add what q [n, H, D] see in `block` to `mixed`."""

    def backward(
        self, known: Known, k: torch.Tensor, v: torch.Tensor, block: KeyBlock, grads: tuple[torch.Tensor, ...]
    ) -> None:
        """Add the block's part to `grads`: of q [n, H, D], of k and of v [m, Hkv, D], in the dtype of sums."""


@dataclass(frozen=True)
class ReferenceParts:
    """The formula in the dtype of sums."""

    rule: AttentionRule
    drop: Drop | None = None

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: KeyBlock, mixed: Mixed) -> None:
        for part in self._pieces(block, q.shape[1]):
            scores = self._masked(part, capped_scores(self.rule, *self._of_part(part, q, k)))
            lse = scores.logsumexp(-1)
            weights = self._dropped(part, block, scores.sub_(lse.unsqueeze(-1)).exp_())
            out = weighted_values(weights, _heads_first(v, part.keys))
            mixed.add(part.queries, _tokens_first(out), _tokens_first(lse))

    def backward(
        self, known: Known, k: torch.Tensor, v: torch.Tensor, block: KeyBlock, grads: tuple[torch.Tensor, ...]
    ) -> None:
        of_q, of_k, of_v = grads
        wide, groups = known.lse.dtype, (k.shape[1], -1)
        scale = scale_of(self.rule, known.q.shape[-1])
        for part in self._pieces(block, known.q.shape[1]):
            q, keys = self._of_part(part, known.q, k)
            keys, values = keys.to(wide), _heads_first(v, part.keys).to(wide)
            grad, lse, delta = (
                _grouped(x, part.queries, groups).to(wide).contiguous() for x in (known.grad, known.lse, known.delta)
            )
            capped = capped_scores(self.rule, q, keys)
            weights = self._masked(part, capped.clone()).sub_(lse.unsqueeze(-1)).exp_()  # a masked cap would be a NaN
            left = self._dropped(part, block, weights)
            of_scores = self._dropped(part, block, of_groups(grad, values.mT)).sub_(delta.unsqueeze(-1)).mul_(weights)
            if self.rule.softcap is not None:
                of_scores *= 1 - (capped / self.rule.softcap) ** 2
            of_scores *= scale
            of_q[slice(*part.queries)] += _tokens_first(of_groups(of_scores, keys))
            of_k[slice(*part.keys)] += _summed_over_group(of_scores, q.to(wide)).transpose(0, 1)
            of_v[slice(*part.keys)] += _summed_over_group(left, grad).transpose(0, 1)

    def _pieces(self, block: KeyBlock, heads: int) -> Iterator[Part]:
        for part in block.parts:
            yield from part.cut(max(_FEWEST, _AT_ONCE // (heads * part.shape[1])))

    def _of_part(self, part: Part, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([Hkv, g, n, D], [Hkv, m, D])"""
        return _grouped(q, part.queries, (k.shape[1], -1)), _heads_first(k, part.keys)

    def _masked(self, part: Part, scores: torch.Tensor) -> torch.Tensor:
        """`scores` [Hkv, g, n, m], with -inf where a query does not see a key."""
        if not part.causal and part.left is None:
            return scores
        queries, keys = (torch.arange(size, device=scores.device) for size in part.shape)
        before = queries.unsqueeze(-1) + (part.shape[1] - part.shape[0]) - keys
        hidden = before < 0 if part.causal else torch.zeros_like(before, dtype=torch.bool)
        return scores.masked_fill_(hidden if part.left is None else hidden | (before > part.left), -math.inf)

    def _dropped(self, part: Part, block: KeyBlock, weights: torch.Tensor) -> torch.Tensor:
        if self.drop is None:
            return weights
        assert block.queries is not None and block.keys is not None
        heads = torch.arange(weights.shape[0] * weights.shape[1], device=weights.device)
        queries, keys = block.queries[slice(*part.queries)], block.keys[slice(*part.keys)]
        return self.drop(self.rule.layer, weights, heads.view(*weights.shape[:2], 1, 1), queries.unsqueeze(-1), keys)


def rows_of(x: torch.Tensor, ranges: Sequence[Range]) -> torch.Tensor:
    """The rows of x in `ranges`, one behind the other; a view if it can be one."""
    parts = [x[start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])


def add_to_rows(total: torch.Tensor, ranges: Sequence[Range], found: torch.Tensor) -> None:
    """Add rows that `rows_of` would take to where they come from."""
    parts = found.split([stop - start for start, stop in ranges])
    for (start, stop), part in zip(ranges, parts, strict=True):
        total[start:stop] += part


def _grouped(x: torch.Tensor, rows: Range, groups: tuple[int, int]) -> torch.Tensor:
    """x [n, H, ..] -> [Hkv, g, rows, ..], a view."""
    return x[slice(*rows)].unflatten(1, groups).movedim(0, 2)


def _heads_first(x: torch.Tensor, rows: Range) -> torch.Tensor:
    return x[slice(*rows)].transpose(0, 1)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """[Hkv, g, n, ..] -> [n, H, ..]"""
    return x.movedim(2, 0).flatten(1, 2)


def _summed_over_group(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """weights [Hkv, g, n, m], rows [Hkv, g, n, D] -> [Hkv, m, D]"""
    return weights.flatten(1, 2).mT @ rows.flatten(1, 2)
