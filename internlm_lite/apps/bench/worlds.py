"""Fresh processes for a measurement: as many as a layout has ranks, each with its share of the cores or a GPU."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of

TIMEOUT = timedelta(minutes=5)


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> Any:
    """work(rank, device, *args) on `size` fresh processes in one world; rank 0's answer.

    Raises RuntimeError with the traceback of a rank that failed.
    """
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
        try:
            answers = [_answer(pipe) for pipe in pipes]
        except RuntimeError:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join(30)
    return answers[0]


def _answer(pipe: Connection) -> Any:
    try:
        good, value = pipe.recv()
    except EOFError:
        raise RuntimeError("a rank of the benchmark ended without an answer; is there enough memory?") from None
    if not good:
        raise RuntimeError(f"a rank of the benchmark failed:\n{value}")
    return value


def _rank_main(
    pipe: Connection, work: Callable[..., Any], rank: int, size: int, file: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    device = device_of(rank, size)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    try:
        pipe.send((True, work(rank, device, *args)))
    except Exception:  # noqa: BLE001 (whatever it is, the parent shows it)
        pipe.send((False, traceback.format_exc()))
    else:
        dist.barrier()  # nobody leaves while a neighbour may still be reading from it
    os._exit(0)


def device_of(rank: int, size: int) -> torch.device:
    """Of one of `size` ranks: a GPU each where there are enough, else the CPU for all."""
    usable = torch.cuda.is_available()  # GPUs are also counted where CUDA cannot start
    return torch.device("cuda", rank) if usable and torch.cuda.device_count() >= size else torch.device("cpu")


def mesh_of(config: Config, rank: int, device: torch.device) -> Mesh:
    """The groups of the config's layout. Collective."""
    parallel = config.parallel
    sizes = sizes_of(dist.get_world_size(), parallel.tensor, parallel.pipeline.size, parallel.zero1)
    return build_mesh(sizes, rank, device, TIMEOUT)


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
