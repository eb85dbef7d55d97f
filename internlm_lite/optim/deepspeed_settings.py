"""DeepSpeed's settings as our config says them, and what has to be installed for them.

Only what is asked for is loaded, so that a run of our own engine never imports DeepSpeed (5 seconds).
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version

from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError, MissingPackageError, first_line
from internlm_lite.runtime.dist_env import set_deepspeed_variables

_OLDEST = Version("0.19")
"""Older ones update the state of torch's optimizers once when they are built, and decay the weights by it."""
_INSTALL = "DS_BUILD_OPS=0 pip install internlm_lite[deepspeed]"
_COMPILED_COMM = "deepspeed_shm_comm"
"""Collectives in shared memory that DeepSpeed would compile when it meets gloo: a minute, and a compiler."""


def require_deepspeed(config: Config, device: torch.device) -> None:
    """Raises MissingPackageError or ConfigError if engine.name is "deepspeed" and this process cannot serve `engine`.
    Call it before there is a process group."""
    engine = config.engine
    if engine.name != "deepspeed":
        return
    if find_spec("deepspeed") is None:
        raise MissingPackageError(f'engine.name="deepspeed" needs deepspeed, which is not installed: {_INSTALL}')
    if (found := Version(version("deepspeed"))) < _OLDEST:
        raise MissingPackageError(f"found deepspeed {found}, expected {_OLDEST} or newer: {_INSTALL}")
    if engine.overlap and device.type == "cpu":
        raise ConfigError(
            "engine.overlap: found True on a CPU, which has no streams for it; set it to False, or run on a GPU"
        )
    import_deepspeed(device)
    if engine.offload == "nvme":
        _require_async_io(engine.nvme_path or "")


def _require_async_io(path: str) -> None:
    """Load DeepSpeed's library of asynchronous files, which the first run on a host compiles for minutes: here, where
    no rank waits for another one. Raises an error that names what is missing."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder, reason = AsyncIOBuilder(), ""
    if not installed_ops.get(builder.name) and not builder.is_compatible(verbose=False):
        reason = "found no libaio"
    else:
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError) as error:
            reason = first_line(error)
    if reason:
        raise MissingPackageError(
            'engine.offload="nvme" needs the library of asynchronous files, which a C++ compiler builds once with '
            f'libaio; {reason}: apt-get install libaio-dev g++, or take offload="cpu"'
        )
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"engine.nvme_path: {path} cannot be made: {error.strerror}; expected a folder") from error


def import_deepspeed(device: torch.device) -> ModuleType:
    """The package, told which device this process has; on a CPU without the kernels that it would compile. Raises
    MissingPackageError if it is installed but does not load, as without CUDA's compiler or beside another torch."""
    set_deepspeed_variables(device.type, device.index or 0)
    try:
        import deepspeed
    except Exception as error:  # of any class: its import runs probes for compilers and drivers
        text = f"deepspeed is installed but does not load: {type(error).__name__}: {first_line(error)}; {_INSTALL}"
        raise MissingPackageError(text) from error

    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # it calls them
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__[_COMPILED_COMM] = False
    return deepspeed


def settings(config: Config, device: torch.device, largest: int) -> dict[str, Any]:
    """DeepSpeed's config. `largest`: elements of the model; no bucket is larger.

    Norm, clipping, skipped steps, learning rate and loss scale are ours (optim/deepspeed_engine.py), so it has none.
    """
    engine, half = config.engine, config.model.torch_dtype_name == "bfloat16"
    bucket = min(config.hybrid_zero_optimizer.reduce_bucket_size, largest)
    zero: dict[str, Any] = {
        "stage": engine.stage,
        "overlap_comm": engine.overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * bucket,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": bucket,
    }
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": engine.offload, "pin_memory": device.type == "cuda"}
    if engine.offload == "nvme":
        zero["offload_optimizer"]["nvme_path"] = engine.nvme_path
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": 0.0,  # else it is 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
