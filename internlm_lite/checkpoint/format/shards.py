"""What a rank holds of a whole tensor, without its bytes."""

from __future__ import annotations

from typing import NamedTuple

from internlm_lite.checkpoint.format.regions import Region
from internlm_lite.checkpoint.format.tensor_file import DTYPE_NAMES
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.layout import Box, LocalShard


class ShardDescriptor(NamedTuple):
    """What ranks exchange about a shard."""

    role: str
    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    flat_range: tuple[int, int]
    """Elements of the box, explicit also for the whole box."""
    dtype: str


def describe(piece: LocalShard) -> ShardDescriptor:
    """Raises CheckpointError when the tensor does not have the size its region says."""
    region, tensor = Region(piece.box, piece.flat_range), piece.tensor
    what = f"{piece.role} of {piece.name}"
    if tensor.numel() != region.count or not tensor.is_contiguous():
        raise CheckpointError(
            f"{what}: a {'contiguous ' if tensor.is_contiguous() else 'strided '}tensor of "
            f"{tensor.numel()} elements, expected a contiguous one of {region.count} for {region}"
        )
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise CheckpointError(f"{what}: {tensor.dtype} cannot be stored; use {[*DTYPE_NAMES]}")
    return ShardDescriptor(piece.role, piece.name, tuple(piece.shape), piece.box, region.span, dtype)
