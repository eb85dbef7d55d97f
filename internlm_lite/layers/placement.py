"""Where a layer's parameters live: which ranks share them, in which dtype, on which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from internlm_lite.mesh.mesh import Group


@dataclass(frozen=True)
class Placement:
    """Handed to every layer that owns parameters."""

    group: Group
    """The tensor-parallel ranks that split the layer."""
    dtype: torch.dtype
    device: torch.device


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over many elements are taken: float32 for half precision, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
