"""What a layer costs, said by the layer itself: operations, memory kept for the backward pass, messages.

The planner, the step line, MFU and the split into pipeline stages add up what the layers say. A layer of other layers
costs what they cost, unless it overrides a method. tests/models/test_costs.py compares every layer with torch's
FlopCounterMode, with the tensors that autograd saves, and fails for a layer that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

Bytes = dict[str, int]
"""Bytes by component. The names appear in plans."""


@dataclass(frozen=True)
class RowShape:
    """One micro-batch, a row of packed tokens, and what it runs on."""

    tokens: int
    device: str = "cuda"
    """"cuda" or "cpu": a few kernels save other tensors, and the loss takes other chunks."""
    attention_by_document: bool = False
    """The reference attention: one call per document, whose outputs are copied into one row."""


@dataclass(frozen=True)
class Message:
    """`times` collectives of one kind over an axis of the mesh."""

    axis: str
    kind: str
    """all_reduce, reduce_scatter, all_gather, all_to_all or send."""
    n_bytes: int
    """The whole tensor: what all ranks of the group hold together, or each of them for all_reduce."""
    times: int = 1
    backward: bool = False
    """Of the backward pass. A layer that is recomputed sends its forward messages twice."""

    def sent(self, size: int) -> Fraction:
        """Bytes that one rank of a group of `size` sends (ring or pairwise exchange, the least that is possible)."""
        if self.kind == "send":
            return Fraction(self.times * self.n_bytes)
        passes = 2 if self.kind == "all_reduce" else 1  # a reduce-scatter, then an all-gather
        return Fraction(passes * (size - 1) * self.times * self.n_bytes, size)


class CostedLayer(nn.Module):
    """A layer that says what it costs."""

    def units(self) -> Iterator[CostedLayer]:
        """The layers that this one consists of."""
        for child in self.children():
            if isinstance(child, CostedLayer):
                yield child

    def flops_per_token(self, seq_len: int) -> int:
        """Of its matrix products in a forward pass over documents of `seq_len` tokens, on all tensor-parallel ranks
        together; attention counts all pairs of tokens. The backward pass takes twice as many."""
        return sum(unit.flops_per_token(seq_len) for unit in self.units())

    def saved_bytes(self, row: RowShape) -> Bytes:
        """Tensors that this rank keeps from the forward to the backward pass, each storage once."""
        return add_bytes(*(unit.saved_bytes(row) for unit in self.units()))

    def messages(self, row: RowShape) -> list[Message]:
        """What this rank sends in a forward and a backward pass."""
        return [message for unit in self.units() for message in unit.messages(row)]

    def deferred_bytes(self, row: RowShape) -> int:
        """Inputs and output gradients that are kept after the backward pass while weight gradients are deferred."""
        return sum(unit.deferred_bytes(row) for unit in self.units())

    def workspace_bytes(self, row: RowShape) -> int:
        """An estimate of the most that one of its computations takes for itself while it runs."""
        return max((unit.workspace_bytes(row) for unit in self.units()), default=0)


def add_bytes(*many: Bytes) -> Bytes:
    """The sum by component."""
    names = dict.fromkeys(name for terms in many for name in terms)
    return {name: sum(terms.get(name, 0) for terms in many) for name in names}
