"""The device of this process, its numerics, and its peak speed.

GPUs of the host:  0 1 2 3        one process each: local rank i takes GPU i,
local ranks:       0 1 2 3        or GPU 0 if Slurm shows each task only its own
"""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path

import torch

from internlm_lite.config.schema import Config
from internlm_lite.errors import MeshError
from internlm_lite.runtime.dist_env import DistEnv

logger = logging.getLogger("internlm_lite")

# Dense peak FLOP/s in units of 1e12, from the makers' data sheets: (name contains, half precision, tf32, fp32, fp64).
# The first matching name wins, so longer names come first. Half precision with sums in fp32.
_PEAKS: tuple[tuple[str, float, float, float, float], ...] = (
    ("GB300", 2500, 1250, 80, 1.3),
    ("GB200", 2500, 1250, 80, 40),
    ("B300", 2250, 1125, 75, 1.2),
    ("B200", 2250, 1125, 75, 37),
    ("H200", 989.4, 494.7, 67, 67),
    ("H100 NVL", 835, 417.5, 60, 60),
    ("H100 PCIe", 756, 378, 51, 51),
    ("H100", 989.4, 494.7, 67, 67),
    ("H800", 989.4, 494.7, 67, 1),
    ("H20", 148, 74, 44, 1),
    ("A100", 312, 156, 19.5, 19.5),
    ("A800", 312, 156, 19.5, 19.5),
    ("A40", 149.7, 74.8, 37.4, 0.6),
    ("A30", 165, 82, 10.3, 10.3),
    ("A10", 125, 62.5, 31.2, 0.5),
    ("L40S", 362, 183, 91.6, 1.4),
    ("L40", 181, 90.5, 90.5, 1.4),
    ("L4", 121, 60, 30.3, 0.5),
    ("RTX 6000 Ada", 364, 182, 91.1, 1.4),
    ("RTX 4090", 165.2, 82.6, 82.6, 1.3),
    ("RTX 3090", 71, 35.6, 35.6, 0.6),
    ("MI325X", 1307.4, 653.7, 163.4, 163.4),
    ("MI300X", 1307.4, 653.7, 163.4, 163.4),
    ("V100", 125, 15.7, 15.7, 7.8),
)


def bind_device(dist_env: DistEnv, wanted: str = "auto") -> torch.device:
    """The device of this process, made current. `wanted`: auto (a GPU if there is one), cpu, cuda.

    Raises MeshError when GPUs are wanted and the host has none, or fewer than processes.
    """
    assert wanted in ("auto", "cpu", "cuda"), wanted
    visible = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and visible == 0:
        raise MeshError(
            f"--device cuda: no GPU is visible on host {dist_env.hostname} to torch {torch.__version__}; "
            "check the driver, CUDA_VISIBLE_DEVICES and the torch build, or pass --device cpu"
        )
    if visible == 0:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", _gpu_index(dist_env, visible))
        torch.cuda.set_device(device)
    name = device.type if device.index is None else device.index
    logger.info("process rank %d is bound to host:%s device: %s", dist_env.rank, dist_env.hostname, name)
    return device


def _gpu_index(dist_env: DistEnv, visible: int) -> int:
    if visible >= dist_env.local_world_size:
        return dist_env.local_rank
    if visible == 1 and dist_env.launcher == "slurm":
        return 0  # --gpus-per-task=1 hides the GPUs of the other tasks
    raise MeshError(
        f"host {dist_env.hostname}: {dist_env.local_world_size} processes but {visible} visible GPUs; "
        "start one process per GPU, or pass --device cpu"
    )


def apply_numerics(config: Config, device: torch.device, dist_env: DistEnv) -> None:
    """Set torch's process-wide switches: TF32, determinism, cudnn, and on the CPU the number of threads."""
    # fp32 matrix products stay fp32 unless the config says torch.tf32
    torch.set_float32_matmul_precision("high" if config.model.dtype == "torch.tf32" else "highest")
    # torch's default lets a product that is split along its sum add the parts in half precision.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.cudnn_deterministic or config.deterministic
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.set_num_threads(cpu_threads(dist_env, len(os.sched_getaffinity(0))))


def cpu_threads(dist_env: DistEnv, cores: int) -> int:
    """Threads for this process on a host with `cores` usable cores: as set, else an equal share."""
    return dist_env.cpu_threads or max(1, cores // dist_env.local_world_size)


def torch_dtype(name: str) -> torch.dtype:
    """The storage dtype of a config's name: "torch.tf32" is float32 (with TF32 products), "torch.half" is float16."""
    found = {"torch.tf32": torch.float32}.get(name) or getattr(torch, name.removeprefix("torch."))
    assert isinstance(found, torch.dtype), name
    return found


def device_name(device: torch.device) -> str:
    """'NVIDIA H200', or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: torch.dtype | str) -> float | None:
    """Dense peak FLOP/s of one device for matrix products in `dtype` (a torch dtype, or a config's "torch.tf32").

    None for CPUs, and with a warning for GPUs that are not in the table.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_of(name, str(dtype))
    if peak is None:
        logger.warning("no peak speed is known for %s, so no MFU is shown; add a row to runtime/device.py:_PEAKS", name)
    return peak


def peak_of(gpu: str, dtype: str) -> float | None:
    """peak_flops by the GPU's name and the dtype's, such as ("NVIDIA H200", "torch.bfloat16")."""
    columns = {"torch.tf32": 2, "torch.float32": 3, "torch.float64": 4}
    for row in _PEAKS:
        if row[0].lower() in gpu.lower():
            peak = row[columns.get(dtype, 1)]
            assert isinstance(peak, float | int)
            return peak * 1e12
    return None
