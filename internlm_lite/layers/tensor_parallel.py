"""Context of tensor-parallel layers: group, dtype, device, and the layout of activations outside split layers.

               outside       enter: forward | backward       leave: forward | backward
whole          [T, h]        identity | all-reduce           all-reduce | identity
by sequence    [T / tp, h]   all-gather | reduce-scatter     reduce-scatter | all-gather
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from internlm_lite.layers.costs import Message
from internlm_lite.layers.offload import HostOffload
from internlm_lite.layers.products import Products
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
from internlm_lite.mesh.layout import Parameter, ShardSpec, parameter
from internlm_lite.mesh.mesh import Group


@dataclass
class TensorParallelContext:
    """Shared by all layers of this rank that own parameters."""

    group: Group
    """The tensor-parallel ranks that split the layer."""
    dtype: torch.dtype
    device: torch.device
    by_sequence: bool = False
    """Sequence parallelism: outside split layers a rank holds T / tp tokens. False in a group of size one."""
    products: Products = field(default_factory=Products)
    """Matrix products of the linear layers, in training."""
    weight_grads: WeightGrads = field(default_factory=WeightGrads)
    compiled: bool = False
    """Training passes are compiled, where no collective is inside (model.compile)."""
    selective: bool = False
    """Layers keep what made their inputs instead of them (layers/recompute.py)."""
    allocated: bool = True
    """Of parameters when they are made; False with ZeRO stage 3, where they never are all in memory."""
    offload: HostOffload | None = None
    """Moves what blocks keep to the host. None: it stays."""
    source_share: Fraction = Fraction(1)
    """Source tokens for each target token of a row, of an encoder-decoder: for costs alone."""

    def parameter(self, layout: ShardSpec, dtype: torch.dtype | None = None) -> Parameter:
        """An uninitialised parameter of a layer of this rank; `dtype` None: the model's."""
        return parameter(layout, dtype or self.dtype, self.device, allocated=self.allocated)

    @contextmanager
    def whole_activations(self) -> Iterator[None]:
        """Turn sequence parallelism off inside the block: a forward pass may have any number of tokens there."""
        before, self.by_sequence = self.by_sequence, False
        try:
            yield
        finally:
            self.by_sequence = before

    @property
    def partial_over(self) -> tuple[str, ...]:
        """`ShardSpec.partial_over` of an unsplit parameter that is applied to activations outside split layers."""
        return ("tp",) if self.by_sequence else ()

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Activations outside -> the input [T, h] of a split layer, whole on every rank. Collective; differentiable."""
        return gather_rows(x, self.group) if self.by_sequence else copy_to_group(x, self.group)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """Partial sums [T, h], may be overwritten -> their sum as activations outside. Collective; differentiable."""
        return scatter_rows(y, self.group) if self.by_sequence else reduce_from_group(y, self.group)

    def start_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, comm.Work]:
        """`enter` without autograd: ([T, h], Work); valid after `wait()`."""
        return start_gather_rows(x, self.group) if self.by_sequence else (x, comm.Work([], self.group))

    def start_sum(self, y: torch.Tensor) -> tuple[torch.Tensor, comm.Work]:
        """`leave` without autograd: (activations outside, Work); overwrites y; valid after `wait()`."""
        return start_scatter_rows(y, self.group) if self.by_sequence else (y, comm.all_reduce(y, self.group))

    def own_tokens(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The part, along `dim`, of a tensor about all tokens that is about those of this rank outside split layers."""
        return x.chunk(self.group.size, dim)[self.group.rank] if self.by_sequence else x

    def rows(self, tokens: int) -> int:
        """Rows of activations outside, for `tokens` packed tokens."""
        return tokens // self.group.size if self.by_sequence else tokens

    def hidden_bytes(self, tokens: int, hidden_size: int) -> int:
        """Bytes of activations outside on this rank."""
        return self.rows(tokens) * hidden_size * self.dtype.itemsize

    def gather_messages(self, n_elements: int, *, backward: bool = False) -> list[Message]:
        """The message of one `enter` of [T, h], where `n_elements` is T * h: none without sequence parallelism."""
        n_bytes = n_elements * self.dtype.itemsize
        return [Message(self.group.name, "all_gather", n_bytes, backward=backward)] if self.by_sequence else []

    def sum_messages(self, n_elements: int, *, backward: bool = False) -> list[Message]:
        """The message of one `leave` of [T, h], where `n_elements` is T * h."""
        kind = "reduce_scatter" if self.by_sequence else "all_reduce"
        return [Message(self.group.name, kind, n_elements * self.dtype.itemsize, backward=backward)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float32 for half precision, else `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
