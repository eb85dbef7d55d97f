"""Made-up training states for the tests: whole tensors by name, and the pieces that a rank of a layout holds."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from internlm_lite.checkpoint.format.regions import Region, volume
from internlm_lite.mesh.layout import Box, LocalShard

ROLES = ("master", "exp_avg", "exp_avg_sq")
# name -> (shape, dimension that tensor parallel ranks split or None)
MODEL: dict[str, tuple[tuple[int, ...], int | None]] = {
    "tok_embeddings.weight": ((12, 8), 1),
    "layers.0.attention.wqkv.weight": ((24, 8), 0),
    "layers.0.attention.wo.weight": ((8, 8), 1),
    "layers.0.attention.wo.bias": ((8,), None),
    "layers.0.scale": ((), None),
    "norm.weight": ((7,), None),
    "output.weight": ((12, 8), 0),
}


def whole(role: str, name: str, shape: Sequence[int]) -> torch.Tensor:
    """The true value of a whole tensor, fp32."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{role}/{name}".encode()))
    return torch.randn(list(shape), generator=generator)


def region_of(region: Region, tensor: torch.Tensor) -> torch.Tensor:
    """The region's elements of the whole tensor, 1-D."""
    part = tensor[tuple(slice(a, b) for a, b in region.box)].reshape(-1)
    return part[slice(*region.span)].clone()


def pieces_of(
    rank: int, *, tp: int = 1, zero: int = 1, roles: Sequence[str] = ROLES, fill: bool, uneven: bool = False
) -> list[LocalShard]:
    """Rank = dp * tp_size + tp. Each rank has its boxes one after another, cut in `zero` equal ranges."""
    tp_rank, zero_rank = rank % tp, rank // tp % zero
    boxes: list[tuple[str, tuple[int, ...], Box]] = []
    for name, (shape, dim) in MODEL.items():
        box = [(0, n) for n in shape]
        if dim is not None:
            part = shape[dim] // tp
            box[dim] = (part * tp_rank, part * (tp_rank + 1))
        boxes.append((name, shape, tuple(box)))
    total = sum(volume(box) for _, _, box in boxes)
    shard = -(-total // zero)
    low, high = shard * zero_rank, min(total, shard * (zero_rank + 1))
    if uneven and zero == 2:  # another bucket composition: the cut is elsewhere
        low, high = ((0, 100), (100, total))[zero_rank]
    found, offset = [], 0
    for name, shape, box in boxes:
        size = volume(box)
        flat = (min(max(low - offset, 0), size), min(max(high - offset, 0), size))
        offset += size
        for role in roles:
            region = Region(box, None if zero == 1 else flat)
            tensor = region_of(region, whole(role, name, shape))
            if zero == 1:
                tensor = tensor.view([b - a for a, b in box])
            found.append(
                LocalShard(
                    name, role, shape, box, region.flat_range, tensor if fill else torch.full_like(tensor, torch.nan)
                )
            )
    return found


def assert_true_values(pieces: Sequence[LocalShard], dtype: torch.dtype = torch.float32) -> None:
    """Every piece holds, bit for bit, its part of the true tensor."""
    for piece in pieces:
        expected = region_of(Region(piece.box, piece.flat_range), whole(piece.role, piece.name, piece.shape)).to(dtype)
        assert torch.equal(piece.tensor.reshape(-1), expected), (piece.role, piece.name, piece.box, piece.flat_range)
