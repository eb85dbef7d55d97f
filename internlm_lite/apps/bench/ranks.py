"""(b) Two data-parallel ranks: ours against DistributedDataParallel + ZeroRedundancyOptimizer, time and peak memory.

For times, both sides alternate in one pair of processes. Memory is measured in a new pair per side, as growth of the
peak resident set (CPU) or of allocated memory (CUDA) from before the model is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import our_side
from internlm_lite.apps.bench.timing import alternate_ranks
from internlm_lite.apps.bench.torch_layouts import Builder, ddp_zero
from internlm_lite.apps.bench.worlds import device_of, mesh_of, on_ranks, peak_bytes
from internlm_lite.config.schema import Config
from internlm_lite.runtime.device import device_name

SIDES: dict[str, Builder] = {"ours": our_side, "ddp": ddp_zero}


def _time_sides(rank: int, device: torch.device, config: Config, rounds: int) -> dict[str, float]:
    mesh = mesh_of(config, rank, device)
    return alternate_ranks({name: build(config, mesh, 1) for name, build in SIDES.items()}, rounds, device)


def _peak_bytes(rank: int, device: torch.device, config: Config, rounds: int, side: str) -> int:
    mesh = mesh_of(config, rank, device)
    warm = torch.randn(256, 256) @ torch.randn(256, 256)  # loads the matrix library before the baseline is measured
    del warm
    dist.barrier()
    base = peak_bytes(device)
    step = SIDES[side](config, mesh, 1).step
    for _ in range(rounds):
        step()
    return peak_bytes(device) - base


@dataclass(frozen=True)
class RanksResult:
    """Medians of one step; peak bytes of rank 0 above an idle process."""

    shape: str
    device: str
    ours_seconds: float
    ddp_seconds: float
    time_ratio: float
    ours_peak_bytes: int
    ddp_peak_bytes: int
    memory_ratio: float


def bench_ranks(size: int, rounds: int, **shape: Any) -> RanksResult:
    """Measure with `size` ranks on this machine."""
    config = bench_config(**shape)
    seconds = on_ranks(size, _time_sides, config, rounds)
    peaks = {side: on_ranks(size, _peak_bytes, config, 3, side) for side in SIDES}
    return RanksResult(
        shape=f"ranks={size}, " + ", ".join(f"{key}={value}" for key, value in shape.items()),
        device=device_name(device_of(0, size)),
        ours_seconds=seconds["ours"],
        ddp_seconds=seconds["ddp"],
        time_ratio=seconds["ours"] / seconds["ddp"],
        ours_peak_bytes=peaks["ours"],
        ddp_peak_bytes=peaks["ddp"],
        memory_ratio=peaks["ours"] / peaks["ddp"],
    )
