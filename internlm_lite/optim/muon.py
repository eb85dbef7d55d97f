"""Muon: the momentum of a matrix, orthogonalised (arXiv:2502.16982, section 2).

    momentum = mu * momentum + (1 - mu) * grad                          as torch.optim.Muon keeps it; the role "exp_avg"
    direction = mu * momentum + (1 - mu) * grad                         Nesterov; else the momentum
    weights -= lr * (scale * orthogonalised(direction) + weight_decay * weights)

A rank of `zero` has whole parameters, or the parts of whole parameters that it holds as a tensor-parallel rank
(`optim.whole`). A fused projection is divided into its matrices (`Parameter.matrix_rows`), and every matrix is iterated
on alone, as a contiguous tensor of its own: so its bits depend neither on who does it nor on what lies beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from internlm_lite.mesh.layout import Parameter
from internlm_lite.optim.groups import ParamGroup
from internlm_lite.optim.newton_schulz import iteration_flops, orthogonalised, update_scale
from internlm_lite.optim.update_rule import Shard, UpdateRule
from internlm_lite.optim.whole import WholeParameters
from internlm_lite.runtime.device import torch_dtype


class Muon(UpdateRule):
    """For parameters with `matrix_rows`; those of a shard are whole or split over `shard.holders` alone."""

    roles = ("exp_avg",)
    whole_matrices = True

    def __init__(self, shards: Sequence[Shard], group: ParamGroup) -> None:
        super().__init__(shards, group)
        loads: dict[int, list[int]] = {}
        self._wholes = []
        for shard in shards:
            size = shard.holders.size if shard.holders else 1
            costs = [self.product_flops(piece.param, group) for piece in shard.pieces]
            self._wholes.append(WholeParameters(shard, costs, loads.setdefault(size, [0] * size)))

    @classmethod
    def operations(cls, group: ParamGroup) -> int:
        return 3 + 3 * _nesterov(group) + 3  # momentum; direction; scale, times lr, minus

    @classmethod
    def product_flops(cls, param: Parameter, group: ParamGroup) -> int:
        return sum(iteration_flops(rows, cols, group.options.ns_steps) for rows, cols in matrix_shapes(param))

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for shard, grad, wholes in zip(self._shards, grads, self._wholes, strict=True):
            before, mu = shard.state["exp_avg"], self._group.momentum
            momentum = before.lerp(grad, 1 - mu)
            step = grad.lerp_(momentum, mu) if _nesterov(self._group) else momentum.clone()
            before.copy_(torch.where(skipped, before, momentum))
            del momentum
            collected = wholes.collect(step)
            wholes.hand_out([self._direction(*pair) for pair in zip(collected, wholes.owned, strict=True)], step)
            if self._group.weight_decay:
                step.add_(shard.weights, alpha=self._group.weight_decay)
            # In a skipped step +0 is subtracted, which keeps the bits of every number, also of -0.0.
            shard.weights.sub_(step.mul_(lr).masked_fill_(skipped, 0.0))

    def _direction(self, whole: torch.Tensor, param: Parameter) -> torch.Tensor:
        """[R, C] in the dtype of `whole` [R, C], which is that of a parameter."""
        options, directions = self._group.options, torch.empty_like(whole)
        dtype = iteration_dtype(options.ns_dtype, whole)
        for matrix, out in zip(matrices_of(whole, param), matrices_of(directions, param), strict=True):
            flat = matrix.reshape(-1, matrix.shape[-1])
            scale = update_scale(options.update_scale, *flat.shape)
            out.copy_(orthogonalised(flat, options.ns_steps, dtype).view(matrix.shape)).mul_(scale)
        return directions


def _nesterov(group: ParamGroup) -> bool:
    return group.options.nesterov is not False


def iteration_dtype(wanted: str | None, gradient: torch.Tensor) -> torch.dtype:
    """optimizer.ns_dtype of the config, for a gradient in the dtype of the master weights."""
    if gradient.dtype == torch.float64:
        return torch.float64
    if wanted is not None:
        return torch_dtype(wanted)
    return torch.bfloat16 if gradient.is_cuda else gradient.dtype


def _rows_of(param: Parameter) -> tuple[int, ...]:
    assert param.matrix_rows is not None, "groups give Muon the parameters that are matrices"
    return param.matrix_rows


def matrices_of(whole: torch.Tensor, param: Parameter) -> tuple[torch.Tensor, ...]:
    """Views [blocks, rows of the matrix in a block, C] of a whole parameter [R, C], one for each of its matrices."""
    rows = _rows_of(param)
    return whole.view(-1, sum(rows), whole.shape[1]).split(list(rows), dim=1)


def matrix_shapes(param: Parameter) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix of a whole parameter."""
    rows, (total, cols) = _rows_of(param), param.shard_spec.shape
    return [(total // sum(rows) * part, cols) for part in rows]
