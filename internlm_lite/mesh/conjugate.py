"""Collectives inside the autograd graph. Each forward collective has its conjugate in the backward pass.

    copy_to_group     identity   | all-reduce         before a column-parallel linear layer
    reduce_from_group all-reduce | identity           after a row-parallel linear layer
    gather_last       all-gather | own slice          after a layer split along its last dimension

(Megatron-LM, arXiv:1909.08053, section 3: f and g.)
"""

from __future__ import annotations

from typing import Any

import torch

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        comm.all_reduce(grad, ctx.group).wait()
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.mark_dirty(x)
        comm.all_reduce(x, group).wait()
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


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
