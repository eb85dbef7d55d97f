"""(f) One GPU, bf16: a 1B and a 7B shape, ours next to the bare loop: tokens per second, MFU, peak memory.

Each side runs alone in a new process, so that the peak memory is its own. The bare loop keeps weights, gradients and
moments in bf16 (8 bytes a parameter), ours fp32 masters, moments and gradients (18 bytes): a 7B model takes
about 121 GB before activations. A model that does not fit gets fewer layers, as stated in its row, on both sides.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import bare_side, our_side
from internlm_lite.apps.bench.torch_layouts import Builder
from internlm_lite.apps.bench.worlds import mesh_of, on_ranks, peak_bytes
from internlm_lite.config.schema import Config
from internlm_lite.models.stages import model_flops_per_token
from internlm_lite.monitor.flops import mfu
from internlm_lite.runtime.device import device_name, peak_flops

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden": 2048, "layers": 20, "heads": 16, "vocab": 32768, "seq_len": 4096, "micro_bsz": 2, "micro_num": 4},
    "7B": {"hidden": 4096, "layers": 32, "heads": 32, "vocab": 32768, "seq_len": 4096, "micro_bsz": 1, "micro_num": 4},
}
SIDES: dict[str, Builder] = {"ours": our_side, "bare loop": bare_side}
WARM_UP = 2
"""Steps before the measurement."""


@dataclass(frozen=True)
class SingleRow:
    """One side at one shape. Both sides of a shape have the same number of layers."""

    model: str
    side: str
    device: str
    layers: int
    tokens_per_second: float
    mfu: float | None
    """Fraction of the device's dense peak FLOP/s; None if the peak is unknown."""
    peak_bytes: int


def bench_single(shapes: dict[str, dict[str, Any]], dtype: str, steps: int) -> list[SingleRow]:
    """Medians over `steps` steps. Raises RuntimeError when even a quarter of the layers does not fit."""
    rows = []
    for model, shape in shapes.items():
        layers = shape["layers"]
        for share in (layers, 7 * layers // 8, 3 * layers // 4, layers // 2, layers // 4):
            config = bench_config(**{**shape, "layers": share}, dtype=dtype, bucket_size=512 * 1024**2)
            measured = [on_ranks(1, _measure, config, model, side, steps) for side in SIDES]
            if None not in measured:
                rows += measured
                break
        else:
            raise RuntimeError(f"found too little memory for a quarter of the {model} model's layers: use a larger GPU")
    return rows


def _measure(rank: int, device: torch.device, config: Config, model: str, side: str, steps: int) -> SingleRow | None:
    """One measurement; None when the GPU runs out of memory."""
    mesh, seconds = mesh_of(config, rank, device), []
    try:
        built = SIDES[side](config, mesh, 1)
        for index in range(WARM_UP + steps):
            start = time.perf_counter()
            built.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if index >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return None
    data, step_seconds = config.data, statistics.median(seconds)
    tokens = data.micro_num * data.micro_bsz * data.seq_len
    flops = model_flops_per_token(config.model, data.seq_len)
    peak = peak_flops(device, config.model.dtype)
    return SingleRow(
        model=model,
        side=side,
        device=device_name(device),
        layers=config.model.num_layers,
        tokens_per_second=tokens / step_seconds,
        mfu=mfu(flops, tokens, step_seconds, 1, peak),
        peak_bytes=peak_bytes(device),
    )
