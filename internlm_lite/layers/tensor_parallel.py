"""Where a layer's parameters are, and what its activations look like outside the part that is split over the ranks.

               outside       enter: forward | backward       leave: forward | backward
whole          [T, h]        identity | all-reduce           all-reduce | identity
by sequence    [T / tp, h]   all-gather | reduce-scatter     reduce-scatter | all-gather
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from internlm_lite.layers.costs import Message
from internlm_lite.layers.weight_grads import WeightGrads
from internlm_lite.mesh import comm
from internlm_lite.mesh.conjugate import (
    copy_to_group,
    gather_rows,
    reduce_from_group,
    scatter_rows,
    start_gather_rows,
    start_scatter_rows,
)
from internlm_lite.mesh.mesh import Group


@dataclass
class TensorParallelContext:
    """Passed to every layer that owns parameters; one for all layers of a model."""

    group: Group
    """The tensor-parallel ranks that split the layer."""
    dtype: torch.dtype
    device: torch.device
    by_sequence: bool = False
    """Outside split layers a rank holds T / tp of the tokens (sequence parallelism). False in a group of size one."""
    weight_grads: WeightGrads = field(default_factory=WeightGrads)

    @contextmanager
    def whole_activations(self) -> Iterator[None]:
        """Without sequence parallelism inside the block: for forward passes over any number of tokens."""
        before, self.by_sequence = self.by_sequence, False
        try:
            yield
        finally:
            self.by_sequence = before

    @property
    def partial_over(self) -> tuple[str, ...]:
        """Axes over which the gradient of a parameter that works on activations outside is a partial sum."""
        return ("tp",) if self.by_sequence else ()

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Activations on their way into a split layer: [T, h] on every rank."""
        return gather_rows(x, self.group) if self.by_sequence else copy_to_group(x, self.group)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """Partial sums [T, h], which may be overwritten, summed over the group."""
        return scatter_rows(y, self.group) if self.by_sequence else reduce_from_group(y, self.group)

    def start_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, comm.Work]:
        """([T, h], Work) of activations outside; not differentiable. Usable after `wait()`."""
        return start_gather_rows(x, self.group) if self.by_sequence else (x, comm.Work([], self.group))

    def start_sum(self, y: torch.Tensor) -> tuple[torch.Tensor, comm.Work]:
        """(activations outside, Work) of partial sums [T, h], which are overwritten; not differentiable."""
        return start_scatter_rows(y, self.group) if self.by_sequence else (y, comm.all_reduce(y, self.group))

    def rows(self, tokens: int) -> int:
        """Of activations outside, for a row of `tokens` tokens."""
        return tokens // self.group.size if self.by_sequence else tokens

    def hidden_bytes(self, tokens: int, hidden_size: int) -> int:
        """Of activations outside."""
        return self.rows(tokens) * hidden_size * self.dtype.itemsize

    def gather_messages(self, n_elements: int, *, backward: bool = False) -> list[Message]:
        """What one gather of [T, h] sends, T * h being `n_elements`."""
        n_bytes = n_elements * self.dtype.itemsize
        return [Message(self.group.name, "all_gather", n_bytes, backward=backward)] if self.by_sequence else []

    def sum_messages(self, n_elements: int, *, backward: bool = False) -> list[Message]:
        """What one sum of [T, h] over the group sends."""
        kind = "reduce_scatter" if self.by_sequence else "all_reduce"
        return [Message(self.group.name, kind, n_elements * self.dtype.itemsize, backward=backward)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over many elements: float32 for half precision, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
