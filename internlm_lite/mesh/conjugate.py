"""Collectives inside the autograd graph. Each forward collective has its conjugate in the backward pass.

                      forward        | backward
    copy_to_group     identity       | all-reduce        input of a split layer
    reduce_from_group all-reduce     | identity          its output
    gather_rows       all-gather     | reduce-scatter    input and output with sequence parallelism:
    scatter_rows      reduce-scatter | all-gather        outside split layers a rank holds 1 / size of the rows
    gather_last       all-gather     | own slice         output of a layer split along its last dimension
    columns_to_rows   all-to-all     | all-to-all        the same with sequence parallelism

(Megatron-LM, arXiv:1909.08053, section 3: f and g; arXiv:2205.05198, section 4.2.2: g and its conjugate along rows.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group

Collective = Callable[[torch.Tensor, Group], torch.Tensor]


def start_gather_rows(part: torch.Tensor, group: Group) -> tuple[torch.Tensor, comm.Work]:
    """part [n, ...] -> ([size * n, ...] in rank order, valid after `wait()`, Work). Collective; not differentiable."""
    full = part.new_empty(group.size, *part.shape)
    full[group.rank] = part
    return full.flatten(0, 1), comm.all_gather(full.view(-1), group)


def start_scatter_rows(full: torch.Tensor, group: Group) -> tuple[torch.Tensor, comm.Work]:
    """Contiguous full [size * n, ...], not to be touched before `wait()` -> (this rank's [n, ...] of the sum, Work)."""
    part = full.new_empty(full.shape[0] // group.size, *full.shape[1:])
    return part, comm.reduce_scatter(part.view(-1), full.view(-1), group)


class _Pair(torch.autograd.Function):
    """Computes `there(x, group)` forward and `back(gradient, group)` backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, there: Collective, back: Collective) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        y = there(x, group)
        if y is x:  # autograd must know that x was changed in place
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.back(grads[0], ctx.group), None, None, None


def _pair(x: torch.Tensor, group: Group, there: Collective, back: Collective) -> torch.Tensor:
    return x if group.size == 1 else _Pair.apply(x, group, there, back)


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """x unchanged; its gradient is summed over `group`."""
    return _pair(x, group, _alias, _sum)


def reduce_from_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Overwrite x, contiguous and not a view, by its sum over `group`; the gradient passes unchanged."""
    return _pair(x, group, _sum_in_place, _same)


def gather_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, ...] -> [size * n, ...] in rank order; gradient: this rank's rows of the sum over `group`."""
    return _pair(x, group, _all_rows, _own_rows_of_sum)


def scatter_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[size * n, ...] -> [n, ...]: this rank's rows of the sum over `group`; gradient: gathered in rank order."""
    return _pair(x, group, _own_rows_of_sum, _all_rows)


def gather_last(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., n] -> [..., size * n], concatenated in rank order; gradient: this rank's slice."""
    return _pair(x, group, _all_columns, _own_columns)


def columns_to_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[T, n] -> [T / size, size * n]: from all rows of this rank's columns to this rank's rows of all columns."""
    return _pair(x, group, _columns_to_rows, _rows_to_columns)


def _same(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x


def _alias(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x.view_as(x)


def _sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    # Copied, because other nodes of the graph may use the same gradient, and it may be an expanded view.
    return _sum_in_place(x.clone(memory_format=torch.contiguous_format), group)


def _sum_in_place(x: torch.Tensor, group: Group) -> torch.Tensor:
    comm.all_reduce(x, group).wait()
    return x


def _all_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    full, work = start_gather_rows(x, group)
    work.wait()
    return full


def _own_rows_of_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    part, work = start_scatter_rows(x.contiguous(), group)
    work.wait()
    return part


def _all_columns(x: torch.Tensor, group: Group) -> torch.Tensor:
    return _all_rows(x, group).unflatten(0, (group.size, -1)).movedim(0, -2).flatten(-2)


def _own_columns(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x.chunk(group.size, dim=-1)[group.rank].contiguous()


def _columns_to_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    blocks = x.contiguous().view(group.size, -1, x.shape[-1])  # [size, T / size, n]: block i for rank i
    return _exchanged(blocks, group).movedim(0, 1).flatten(1)  # block i received: our rows of rank i's columns


def _rows_to_columns(x: torch.Tensor, group: Group) -> torch.Tensor:
    return _exchanged(x.unflatten(1, (group.size, -1)).movedim(1, 0).contiguous(), group).flatten(0, 1)


def _exchanged(blocks: torch.Tensor, group: Group) -> torch.Tensor:
    received = torch.empty_like(blocks)
    comm.all_to_all(received.view(-1), blocks.view(-1), group).wait()
    return received
