"""New processes for a measurement, one per rank, each with its share of the cores or a GPU."""

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
    """Run work(rank, device, *args) in `size` new processes of one world; returns rank 0's result.

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
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    try:
        pipe.send((True, work(rank, device, *args)))
    except Exception:  # noqa: BLE001 (whatever it is, the parent shows it)
        pipe.send((False, traceback.format_exc()))
    else:
        dist.barrier()  # no rank exits while another may still read from it
    os._exit(0)


def device_of(rank: int, size: int) -> torch.device:
    """Device of one of `size` ranks: its own GPU if there are enough for all, else the CPU."""
    usable = torch.cuda.is_available()  # device_count may be positive although CUDA cannot start
    return torch.device("cuda", rank) if usable and torch.cuda.device_count() >= size else torch.device("cpu")


def mesh_of(config: Config, rank: int, device: torch.device) -> Mesh:
    """The mesh of the config's layout. Collective."""
    parallel = config.parallel
    sizes = sizes_of(
        dist.get_world_size(), parallel.tensor, parallel.pipeline.size, parallel.zero1, parallel.context.size
    )
    return build_mesh(sizes, rank, device, TIMEOUT)


def peak_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
