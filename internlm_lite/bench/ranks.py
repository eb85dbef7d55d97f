"""(b) Two data-parallel ranks: ours against DistributedDataParallel + ZeroRedundancyOptimizer, time and peak memory.

Time alternates both sides inside one pair of processes. Memory is measured in a fresh pair per side, as growth of the
peak resident set (CPU) or of allocated memory (CUDA) from before the model is built.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from internlm_lite.bench.bare import BareDecoder
from internlm_lite.bench.shapes import bench_config, random_batch
from internlm_lite.bench.step import our_step
from internlm_lite.bench.timing import alternate
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of
from internlm_lite.runtime.device import torch_dtype

TIMEOUT = timedelta(minutes=5)


def ddp_step(config: Config, mesh: Mesh, seed: int) -> Callable[[], object]:
    """One call is one step of DDP with gradient accumulation under no_sync and ZeRO-1 over fused AdamW."""
    torch.manual_seed(seed)
    bare = BareDecoder(config.model, config.data.seq_len, torch_dtype(config.model.dtype)).to(mesh.device)
    model = DistributedDataParallel(bare, gradient_as_bucket_view=True)
    adam = config.adam
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=torch.optim.AdamW,
        lr=adam.lr,
        betas=(adam.adam_beta1, adam.adam_beta2),
        fused=True,
    )
    batch = random_batch(config, seed + mesh.dp.rank, mesh.device)
    shape = (config.data.micro_num, config.data.micro_bsz, config.data.seq_len)
    tokens, labels = batch.tokens.view(shape), batch.labels.view(shape)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with model.no_sync():
            for micro in range(config.data.micro_num - 1):
                (model(tokens[micro], labels[micro]) / config.data.micro_num).backward()
        (model(tokens[-1], labels[-1]) / config.data.micro_num).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.hybrid_zero_optimizer.clip_grad_norm)
        optimizer.step()

    return step


SIDES: dict[str, Callable[[Config, Mesh, int], Callable[[], object]]] = {"ours": our_step, "ddp": ddp_step}


def _time_sides(mesh: Mesh, config: Config, rounds: int) -> dict[str, float]:
    steps = {name: build(config, mesh, 1) for name, build in SIDES.items()}

    def together(step: Callable[[], object]) -> None:
        dist.barrier()
        step()

    return alternate({name: partial(together, step) for name, step in steps.items()}, rounds, mesh.device)


def _peak_bytes(mesh: Mesh, config: Config, rounds: int, side: str) -> int:
    warm = torch.randn(256, 256) @ torch.randn(256, 256)  # loads the matrix library before the base line
    del warm
    dist.barrier()
    base = _resident_peak(mesh.device)
    step = SIDES[side](config, mesh, 1)
    for _ in range(rounds):
        step()
    return _resident_peak(mesh.device) - base


def _resident_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _rank_main(
    pipe: Connection, work: Callable[..., Any], rank: int, size: int, file: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    on_gpu = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    mesh = build_mesh(sizes_of(size, 1, 1, -1), rank, device, TIMEOUT)
    pipe.send(work(mesh, *args))
    dist.barrier()
    os._exit(0)


def _on_ranks(size: int, work: Callable[..., Any], *args: Any) -> Any:
    """work(mesh, *args) on `size` fresh processes; rank 0's answer."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            processes.append(
                context.Process(
                    target=_rank_main, args=(theirs, work, rank, size, f"{folder}/store", args), daemon=True
                )
            )
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        answers = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join(30)
    return answers[0]


@dataclass(frozen=True)
class RanksResult:
    """Medians of one step; peak bytes of rank 0 above an idle process."""

    shape: str
    ours_seconds: float
    ddp_seconds: float
    time_ratio: float
    ours_peak_bytes: int
    ddp_peak_bytes: int
    memory_ratio: float


def bench_ranks(size: int, rounds: int, **shape: Any) -> RanksResult:
    """`size` ranks on this machine."""
    config = bench_config(**shape)
    seconds = _on_ranks(size, _time_sides, config, rounds)
    peaks = {side: _on_ranks(size, _peak_bytes, config, 3, side) for side in SIDES}
    return RanksResult(
        shape=f"ranks={size}, " + ", ".join(f"{key}={value}" for key, value in shape.items()),
        ours_seconds=seconds["ours"],
        ddp_seconds=seconds["ddp"],
        time_ratio=seconds["ours"] / seconds["ddp"],
        ours_peak_bytes=peaks["ours"],
        ddp_peak_bytes=peaks["ddp"],
        memory_ratio=peaks["ours"] / peaks["ddp"],
    )
