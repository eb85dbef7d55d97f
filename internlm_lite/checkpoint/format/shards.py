"""Descriptions of the shards that a rank holds, without their bytes."""

from __future__ import annotations

from typing import NamedTuple

from internlm_lite.checkpoint.format.regions import Region
from internlm_lite.checkpoint.format.tensor_file import DTYPE_NAMES
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.layout import Box, LocalShard


class ShardDescriptor(NamedTuple):
    """The description of a shard that ranks exchange."""

    role: str
    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    box: Box
    flat_range: tuple[int, int]
    """(start, stop) of the box's elements, also for a whole box."""
    dtype: str


def describe(piece: LocalShard) -> ShardDescriptor:
    """Raises CheckpointError if the tensor is not contiguous, not of its region's size, or of an unsupported dtype."""
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
