"""Packed causal attention. The kernel is chosen once, when the model is built:

    flash-attn   varlen kernel, if the package can be imported     half precision on CUDA
    torch        torch.nn.attention.varlen                         half precision on CUDA
    sdpa         the reference, one call per document              every device and dtype

All take a row of T packed tokens and its document boundaries; no token attends to another document.
"""

from __future__ import annotations

import enum
import inspect
import logging
from collections.abc import Callable
from importlib.util import find_spec
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import ModelConfig
from internlm_lite.runtime.device import torch_dtype

logger = logging.getLogger("internlm_lite")

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer number, q [T, H, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, H, D]; q, k are rotated, v may be strided."""


class AttentionBackend(enum.Enum):
    """Attention kernels; the value is the name that the log shows."""

    FLASH_ATTN = "flash-attn"
    TORCH_VARLEN = "torch.nn.attention.varlen"
    SDPA = "scaled_dot_product_attention"


def choose_backend(config: ModelConfig, device: torch.device) -> AttentionBackend:
    """The fastest backend for this model and device; SDPA when model.use_flash_attn is False.

    Varlen kernels need half precision, compute capability >= 8.0 (A100), head_dim a multiple of 8 and at most 256.
    """
    if device.type != "cuda" or not varlen_fits(config):
        return AttentionBackend.SDPA
    if torch.cuda.get_device_capability(device) < (8, 0):
        return AttentionBackend.SDPA
    return AttentionBackend.FLASH_ATTN if _has_flash_attn() else AttentionBackend.TORCH_VARLEN


def varlen_fits(config: ModelConfig) -> bool:
    """Whether a varlen kernel supports this model on a GPU of compute capability 8.0 or higher."""
    half = torch_dtype(config.dtype) in (torch.float16, torch.bfloat16)
    return config.use_flash_attn and half and config.head_size % 8 == 0 and config.head_size <= 256


def _has_flash_attn() -> bool:
    """Imports it, because finding the package does not show that its build fits this torch."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        if find_spec("flash_attn"):
            logger.warning(f"flash_attn is there, but cannot be imported: {error}; torch's own attention is used")
        return False
    return True


def packed(
    backend: AttentionBackend, cu_seqlens: torch.Tensor, cu_seqlens_host: tuple[int, ...], max_seqlen: int
) -> Attend:
    """Attention within each document of one packed row.

    `cu_seqlens` [n + 1] int32 on the device: 0, document ends ..., T, padded by repeats of T; `cu_seqlens_host`: the
    same on the host, padded or not; `max_seqlen`: at least the longest document's length. See `batch.Batch`.
    """
    if backend is AttentionBackend.FLASH_ATTN:
        return _packed_flash_attn(cu_seqlens, max_seqlen)
    if backend is AttentionBackend.TORCH_VARLEN:
        return _packed_torch_varlen(cu_seqlens, max_seqlen)
    return packed_sdpa(cu_seqlens_host)


def _packed_flash_attn(cu_seqlens: torch.Tensor, max_seqlen: int) -> Attend:
    from flash_attn import flash_attn_varlen_func

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_varlen_func(
            *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return attend


def _packed_torch_varlen(cu_seqlens: torch.Tensor, max_seqlen: int) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    kernel: Callable[..., Any] = varlen_attn
    # torch releases name the causal and the grouped-query options differently.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if "enable_gqa" not in known:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return kernel(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)

    return attend


def packed_sdpa(boundaries: tuple[int, ...]) -> Attend:
    """The reference: scaled_dot_product_attention on each document. `boundaries`: 0, document ends ..., T.

    row:   [ 0 . . . | 1 . . . | 2 . . ]     neighbours of equal length share a call: [2, length], then [1, length]

    No mask over the row, so the work is the sum of the squared lengths, not T^2. Runs on every device and dtype.
    """
    lengths = [stop - start for start, stop in pairwise(boundaries) if stop > start]
    runs = [(len(list(equal)), length) for length, equal in groupby(lengths)]
    sizes = [count * length for count, length in runs]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(runs) == 1:
            return _causal(q, k, v, *runs[0])
        # One split instead of slices, because its backward pass is one concatenation.
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), runs, strict=True)
        return torch.cat([_causal(q, k, v, *run) for q, k, v, run in parts])

    return attend


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Attention of `count` consecutive documents of `length` tokens; q, k, v [count * length, heads, head_dim]."""
    q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype.itemsize > 2:  # grouped heads would take the kernel that stores all scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(0, 1)
