"""The global gradient norm, the same for every mesh, and the clip factor.

Each element of the model counts once: a rank contributes its ZeRO shards, unless another rank contributes the same
elements (replicas of the shard, tensor-parallel ranks for parameters that are not split over them, the second copy of a
tied weight). Infinities and NaN count on every rank, because they may be in one copy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import SHARD_ALIGNMENT, Bucket, BucketSpec


@dataclass(frozen=True)
class Requests:
    """Requests of one rank to the run during a step (`train.control`); summed over all ranks."""

    signalled: float = 0.0
    """1: this rank received a signal."""
    stop_file: float = 0.0
    """The number in the stop file, on the rank that reads it; 0 on the others."""


@dataclass(frozen=True)
class Totals:
    """Sums over the whole model and the global batch: fp64 device scalars, the same on every rank."""

    square_model_dtype: torch.Tensor
    """Sum of squared gradients of parameters in the model's dtype."""
    square_fp32: torch.Tensor
    """Sum of squared gradients of parameters kept in fp32 in a half-precision model."""
    num_labels: torch.Tensor
    """Tokens with a label in the global batch."""
    signalled: torch.Tensor
    """`Requests.signalled` summed over all ranks."""
    stop_file: torch.Tensor
    """`Requests.stop_file` summed over all ranks."""
    loss: torch.Tensor
    """Training loss summed over the tokens with a label."""


def reduce_totals(
    buckets: list[Bucket],
    model_dtype: torch.dtype,
    num_labels: int,
    requests: Requests,
    loss_sum: torch.Tensor | float,
    mesh: Mesh,
) -> Totals:
    """One all-reduce of six fp64 numbers over the world; does not read the device. Collective.

    `num_labels`, `requests`, `loss_sum`: this rank's."""
    sums = torch.zeros(6, dtype=torch.float64, device=mesh.device)
    groups: dict[tuple[int, bool], list[torch.Tensor]] = {}
    for bucket in buckets:
        key = int(bucket.kind.dtype != model_dtype), _counts(bucket.kind, mesh)
        groups.setdefault(key, []).append(bucket.grad_shard)
    for (index, counts), shards in groups.items():
        squares = square_sums(shards)
        if not counts:  # a copy contributes only infinities and NaN
            squares = squares.masked_fill(squares.isfinite(), 0)
        sums[index] += squares.sum()
    return sum_totals(sums, num_labels, requests, loss_sum, mesh)


def sum_totals(
    sums: torch.Tensor, num_labels: int, requests: Requests, loss_sum: torch.Tensor | float, mesh: Mesh
) -> Totals:
    """`sums` [6] fp64 holds this rank's squares in the order of `Totals`, and zeros; the rest as `reduce_totals`."""
    counts = mesh.tp.rank == 0 and mesh.cp.rank == 0 and mesh.pp.rank == mesh.pp.size - 1
    for index, value in enumerate((num_labels * counts, requests.signalled, requests.stop_file), start=2):
        sums[index] += value  # a host number is a kernel argument; copying a host tensor would synchronise
    # Tensor-parallel ranks compute the same loss, so only one counts; context-parallel ranks know the labels of whole
    # rows, but have losses of their own tokens. No test for the last stage: on other stages the loss is 0.
    sums[5] += loss_sum * (mesh.tp.rank == 0)
    comm.all_reduce(sums, mesh.world).wait()
    return Totals(*sums.unbind())


def _counts(kind: BucketSpec, mesh: Mesh) -> bool:
    """Whether this rank, not another with a copy, contributes the finite squares of a bucket of this kind."""
    first_copy = "ends" not in kind.partial_over or mesh.ends.rank == 0
    return mesh.replica.rank == 0 and (kind.tp_sharded or mesh.tp.rank == 0) and first_copy


def square_sums(shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n] fp64: the sum of squares of each of n 1-D tensors, whose lengths are multiples of SHARD_ALIGNMENT.

    A GPU reads all of them in one kernel, which adds in fp64. On the CPU that would copy them to fp64."""
    if shards[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(shards), 2, dtype=torch.float64)).square()
    return torch.stack([_square_sum(shard) for shard in shards])


def _square_sum(shard: torch.Tensor) -> torch.Tensor:
    """Rows are summed in fp32, their sums in fp64: one fp32 sum over 4 M elements had an error of 2e-4 on the CPU."""
    wide = torch.float64 if shard.dtype == torch.float64 else torch.float32
    rows = torch.linalg.vector_norm(shard.view(-1, SHARD_ALIGNMENT), dim=1, dtype=wide)
    return rows.double().square().sum()


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)); 1 when `max_norm` is 0 (no clipping)."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
