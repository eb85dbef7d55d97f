"""Two ranks on one GPU, in every layout of two ranks: gradient norms must equal those on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from internlm_lite.apps.bench.gpu.measurement import Check
from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import our_training
from internlm_lite.apps.bench.worlds import mesh_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 zero": {},
    "dp2 zero1=1": {"parallel": {"zero1": 1}},
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sequence": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2 1f1b": {"parallel": {"pipeline": {"size": 2}}},
    "pp2 interleaved": {"parallel": {"pipeline": {"size": 2}}, "num_chunks": 2},
}
_GLOO_ON_CUDA = ("dp2 zero1=1", "tp2", "dp2 zero")
"""Layouts that gloo can run on CUDA tensors: it has no send and no all_to_all for them."""
_NCCL_ON_ONE_GPU = {
    **{"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
    **{"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"},
}
"""NCCL accepts two ranks on one GPU if their host ids differ; they communicate through sockets."""

Norms = dict[str, list[float] | str]
"""Layout -> gradient norms of three steps, or an error message."""


def worlds(check: Check, backend: str) -> None:
    """Compare gradient norms of all layouts on the GPU and on the CPU. `backend`: nccl or gloo."""
    names = list(LAYOUTS) if backend == "nccl" else list(_GLOO_ON_CUDA)
    seconds = 400 if check.smoke else 100
    with ThreadPoolExecutor(2) as pool:
        reference = pool.submit(_world, check.scratch / "cpu", "gloo", "cpu", names, seconds)
        tried = ("gloo", "cpu") if check.smoke else (backend, "cuda:0")
        measured = pool.submit(_world, check.scratch / "gpu", *tried, names, seconds)
        expected, got = reference.result(), measured.result()
    good = 0
    for name in names:
        ours, theirs = got.get(name), expected.get(name)
        if isinstance(ours, list) and isinstance(theirs, list):
            error = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
            check.note(f"{name}: gradient norms off by {error:.1e} from the same layout on the CPU")
            good += error < 1e-4
        else:
            check.wrong(f"{name}: here {ours}, on the CPU {theirs}, {got.get('ended', '')}")
    if good < len(names):
        check.wrong(f"{len(names) - good} layouts differ from the CPU")
    check.tell(f"{backend}: {good} of {len(names)} layouts of two ranks as on the CPU", expected=expected, got=got)


def _world(folder: Path, backend: str, device: str, names: list[str], seconds: float) -> Norms:
    """Results that rank 0 of two new processes reports within `seconds`."""
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    pipes, processes, found = [], [], Norms()
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        args = (theirs, rank, backend, str(folder / "store"), device, names)
        processes.append(context.Process(target=_rank, args=args, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and (pipes[0].poll(1) or processes[0].is_alive()):
            if pipes[0].poll(0):
                name, norms = pipes[0].recv()
                found[name] = norms
                if name == names[-1]:
                    break
    except EOFError:
        found["ended"] = f"rank 0 left with {processes[0].exitcode}"
    for process in processes:
        process.kill()
        process.join(10)
    return found


def _rank(pipe: Connection, rank: int, backend: str, store: str, device_name: str, names: list[str]) -> None:
    device = torch.device(device_name)
    torch.set_num_threads(1)  # four concurrent processes: more threads would only contend
    if backend == "nccl":
        as_own_host(os.environ, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=300 if device.type == "cpu" else 60),
        device_id=device if backend == "nccl" else None,
    )
    for name in names:
        try:
            pipe.send((name, _norms(rank, device, name)))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what was found)
            pipe.send((name, f"{type(error).__name__}: {str(error)[:300]}"))
            break
    time.sleep(5)  # the parent ends both ranks once it has all results
    os._exit(0)


def as_own_host(environment: MutableMapping[str, str], rank: int) -> None:
    """Let NCCL take the GPU of another rank."""
    environment.update(_NCCL_ON_ONE_GPU, NCCL_HOSTID=f"gpucheck{rank}")


def _norms(rank: int, device: torch.device, name: str) -> list[float]:
    shape = {"hidden": 128, "layers": 4, "heads": 4, "vocab": 512, "seq_len": 64, "micro_bsz": 2, "micro_num": 4}
    config = bench_config(**{**shape, **LAYOUTS[name]}, dtype="torch.float32", bucket_size=100_000)
    side = our_training(config, mesh_of(config, rank, device), 1)[0]
    norms = []
    for _ in range(3):
        outcome: Any = side.step()
        norms.append(float(outcome.norm_model_dtype.item()))
    side.finish()
    return norms
