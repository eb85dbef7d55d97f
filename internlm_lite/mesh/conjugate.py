"""Collectives inside the autograd graph. Each forward collective has its conjugate in the backward pass.

    copy_to_group     identity       | all-reduce        what enters a split layer
    reduce_from_group all-reduce     | identity          what leaves it
    gather_rows       all-gather     | reduce-scatter    the same two with sequence parallelism,
    scatter_rows      reduce-scatter | all-gather        where a rank holds a share of the rows outside
    gather_last       all-gather     | own slice         after a layer split along its last dimension
    columns_to_rows   all-to-all     | all-to-all        the same with sequence parallelism

(Megatron-LM, arXiv:1909.08053, section 3: f and g; arXiv:2205.05198, section 4.2.2: g and its conjugate along rows.)
"""

from __future__ import annotations

from typing import Any

import torch

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group


def start_gather_rows(part: torch.Tensor, group: Group) -> tuple[torch.Tensor, comm.Work]:
    """part [n, ...] -> ([size * n, ...], Work): the ranks' rows one after another, usable after `wait()`."""
    full = part.new_empty(group.size, *part.shape)
    full[group.rank] = part
    return full.flatten(0, 1), comm.all_gather(full.view(-1), group)


def start_scatter_rows(full: torch.Tensor, group: Group) -> tuple[torch.Tensor, comm.Work]:
    """full [size * n, ...], contiguous -> ([n, ...], Work): this rank's rows of the sum over ranks, after `wait()`."""
    part = full.new_empty(full.shape[0] // group.size, *full.shape[1:])
    return part, comm.reduce_scatter(part.view(-1), full.view(-1), group)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Reduced in place: other parts of the graph may hold the same gradient, and it may be an expanded view.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        comm.all_reduce(grad, ctx.group).wait()
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.mark_dirty(x)  # in place: x is the product of a split layer, which nothing else reads
        comm.all_reduce(x, group).wait()
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        full, work = start_gather_rows(x, group)
        work.wait()
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        part, work = start_scatter_rows(grads[0].contiguous(), ctx.group)
        work.wait()
        return part, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        part, work = start_scatter_rows(x.contiguous(), group)
        work.wait()
        return part

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        full, work = start_gather_rows(grads[0], ctx.group)
        work.wait()
        return full, None


class _ColumnsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        sent = x.contiguous().view(group.size, -1, x.shape[-1])  # [size, T / size, n]: block i for rank i
        received = torch.empty_like(sent)  # block i: our rows of rank i's columns
        comm.all_to_all(received.view(-1), sent.view(-1), group).wait()
        return received.movedim(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        size = ctx.group.size
        sent = grads[0].unflatten(1, (size, -1)).movedim(1, 0).contiguous()
        received = torch.empty_like(sent)
        comm.all_to_all(received.view(-1), sent.view(-1), ctx.group).wait()
        return received.flatten(0, 1), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        full = x.new_empty(group.size, *x.shape)
        full[group.rank] = x
        comm.all_gather(full.view(-1), group).wait()
        return full.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].chunk(ctx.group.size, dim=-1)[ctx.group.rank].contiguous(), None


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """x, whose gradient is summed over `group`."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """x, overwritten by its sum over `group`; the gradient is handed back unchanged. x is contiguous and no view."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def gather_last(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., n] -> [..., size * n], the ranks' parts side by side; each rank keeps its own slice of the gradient."""
    return x if group.size == 1 else _GatherLast.apply(x, group)


def gather_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, ...] -> [size * n, ...], the ranks' rows one after another; the gradient is summed over `group`, then cut."""
    return x if group.size == 1 else _GatherRows.apply(x, group)


def scatter_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[size * n, ...] -> [n, ...]: this rank's rows of the sum over `group`; the gradient is gathered."""
    return x if group.size == 1 else _ScatterRows.apply(x, group)


def columns_to_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[T, n] -> [T / size, size * n]: from all rows of this rank's columns to this rank's rows of all columns."""
    return x if group.size == 1 else _ColumnsToRows.apply(x, group)
