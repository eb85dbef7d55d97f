"""Each layer reports its own costs: FLOPs, memory kept for the backward pass, messages, passes over memory.

The planner, the step line, MFU and the split into pipeline stages sum these reports. By default a layer's cost is the
sum over its child layers. tests/models/test_costs.py compares every layer with torch's FlopCounterMode and with the
tensors that autograd saves; it fails for a layer without such a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import nn

Bytes = dict[str, int]
"""Component -> bytes. `plan` prints the names."""


@dataclass(frozen=True)
class RowShape:
    """One micro-batch (a row of packed tokens) and the kernels that run it."""

    tokens: int
    """Of this rank: with context parallelism its part of the row."""
    device: str = "cuda"
    """"cuda" or "cpu": a few kernels save different tensors, and the loss uses chunks of another size."""
    attention_by_document: bool = False
    """True: attention in several calls, whose outputs are concatenated."""
    reference: bool = False
    """True: attention of no kernel that knows a soft cap, which layers/scores.py computes."""
    selective: bool = False
    """True: what is cheap to compute is computed again in the backward pass (layers/recompute.py)."""
    offloaded: int = 0
    """The number of the model's first layers that keep their activations on the host (layers/offload.py)."""
    fused: frozenset[str] = frozenset()
    """What takes one kernel instead of several, see `FUSIONS`."""
    fp8: bool = False
    """The products of the blocks are those of layers/fp8.py."""
    context: int = 1
    """Ranks that share the row, each with `tokens` of it."""
    exchange: str = "gather"
    """How keys and values reach other ranks of it (parallel.context.exchange)."""

    source_tokens: int = 0
    """Of the source row beside it, for an encoder-decoder."""

    @property
    def of_source(self) -> RowShape:
        """The source row, in the place of the target row."""
        return replace(self, tokens=self.source_tokens)


FUSIONS = {
    "off": frozenset[str](),
    "parts": frozenset({"rotary", "activation"}),
    "blocks": frozenset({"rotary", "activation", "block"}),
}
"""What model.compile fuses in parts of blocks (beside tensor parallelism and zbv), and in whole ones. Others: "loss",
and "gradients" of weights that are added in the matrix product, as always in half precision on CUDA."""


@dataclass(frozen=True)
class Message:
    """`times` equal collectives (or sends) over an axis of the mesh."""

    axis: str
    kind: str
    """all_reduce, reduce_scatter, all_gather, all_to_all or send."""
    n_bytes: int
    """Of one whole tensor: all shards together; for all_reduce, the tensor that every rank holds."""
    times: int = 1
    backward: bool = False
    """True: sent in the backward pass. A recomputed layer sends its forward messages twice."""

    def sent(self, size: int) -> Fraction:
        """Bytes that one rank of a group of `size` sends: the lower bound, which rings and pairwise exchange reach."""
        if self.kind == "send":
            return Fraction(self.times * self.n_bytes)
        passes = 2 if self.kind == "all_reduce" else 1  # a reduce-scatter, then an all-gather
        return Fraction(passes * (size - 1) * self.times * self.n_bytes, size)


@dataclass(frozen=True)
class Pass:
    """Kernels that together read and write `n_bytes` of device memory, of which their time consists."""

    kind: str
    """How they go through memory: a field of apps/planner/device_file.py:KernelFractions, which states how fast that
    is. "product" and "attention" with 0 bytes: kernels whose time follows from their operations."""
    n_bytes: int
    kernels: int = 1
    backward: bool = False
    part: str = "elementwise"
    """Row of the plan that counts them."""


class CostedLayer(nn.Module):
    """A module that reports its costs. Each method sums over `units` unless a subclass overrides it."""

    def units(self) -> Iterator[CostedLayer]:
        """The direct child layers that report costs."""
        for child in self.children():
            if isinstance(child, CostedLayer):
                yield child

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs per token of the matrix products in a forward pass over documents of `seq_len` tokens, summed over the
        tensor-parallel ranks; attention counts pairs as `ModelConfig.attention_pairs`. Backward: twice as many."""
        return sum(unit.flops_per_token(seq_len) for unit in self.units())

    def saved_bytes(self, row: RowShape) -> Bytes:
        """Bytes of the tensors that this rank keeps for the backward pass; each storage is counted once."""
        return add_bytes(*(unit.saved_bytes(row) for unit in self.units()))

    def messages(self, row: RowShape) -> list[Message]:
        """The messages of this rank in one forward and one backward pass."""
        return [message for unit in self.units() for message in unit.messages(row)]

    def passes(self, row: RowShape) -> list[Pass]:
        """The kernels of this rank in one forward and one backward pass on a GPU."""
        return [found for unit in self.units() for found in unit.passes(row)]

    def deferred_bytes(self, row: RowShape) -> int:
        """Bytes of inputs and output gradients kept after the backward pass for deferred weight gradients."""
        return sum(unit.deferred_bytes(row) for unit in self.units())

    def workspace_bytes(self, row: RowShape) -> int:
        """Estimated peak of temporary bytes: the maximum over its computations, which do not run at the same time."""
        return max((unit.workspace_bytes(row) for unit in self.units()), default=0)


def add_bytes(*many: Bytes) -> Bytes:
    """The sum by component."""
    names = dict.fromkeys(name for terms in many for name in terms)
    return {name: sum(terms.get(name, 0) for terms in many) for name in names}
