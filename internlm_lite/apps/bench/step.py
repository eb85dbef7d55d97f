"""(a) Our training step against the bare loop, and (d) its fraction of the machine's matrix-product rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from internlm_lite.apps.bench.bare import BareDecoder
from internlm_lite.apps.bench.gemm import linear_layers, measured_rate
from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.apps.bench.timing import Side, alternate
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.runtime.device import device_name, torch_dtype
from internlm_lite.train.trainer import Trainer


def our_side(config: Config, mesh: Mesh, seed: int) -> Side:
    """One call is one full optimizer step of ours, metrics included, on a fixed random batch."""
    return our_training(config, mesh, seed)[0]


def our_training(config: Config, mesh: Mesh, seed: int) -> tuple[Side, HybridZeroOptimizer]:
    """(`our_side`, its optimizer)"""
    trainer = Trainer(config.model_copy(update={"seed": seed}), mesh)
    batch = random_batch(config, seed + mesh.dp.rank, mesh.device)
    optimizer = cast(HybridZeroOptimizer, trainer.optimizer)
    return Side(lambda: trainer.step(batch, step=0), optimizer.wait_weights), optimizer


def bare_side(config: Config, mesh: Mesh, seed: int) -> Side:
    """One call is one step of the bare loop on the same tokens: accumulate, clip, fused AdamW. It returns the norm."""
    device = mesh.device
    with device:  # drawing a billion weights on the CPU takes a minute
        model = BareDecoder(config.model, config.data.seq_len, torch_dtype(config.model.dtype))
    adam = config.adam
    optimizer = torch.optim.AdamW(model.parameters(), lr=adam.lr, betas=(adam.adam_beta1, adam.adam_beta2), fused=True)
    batch = random_batch(config, seed, device)
    shape = (config.data.micro_num, config.data.micro_bsz, config.data.seq_len)
    tokens, labels = batch.tokens.view(shape), batch.labels.view(shape)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        for micro in range(config.data.micro_num):
            (model(tokens[micro], labels[micro]) / config.data.micro_num).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.hybrid_zero_optimizer.clip_grad_norm)
        optimizer.step()
        return norm

    return Side(step)


@dataclass(frozen=True)
class StepResult:
    """Seconds are medians of one optimizer step."""

    shape: str
    device: str
    ours_seconds: float
    bare_seconds: float
    ratio: float
    tokens_per_second: float
    matmul_flops_per_second: float
    gemm_rate: float
    gemm_share: float


def bench_step(device: torch.device, rounds: int, **shape: Any) -> StepResult:
    """Alternate our step and the bare step in one process."""
    config = bench_config(**shape)
    mesh = single_process_mesh(device)
    seconds = alternate(
        {"ours": our_side(config, mesh, seed=1).step, "bare": bare_side(config, mesh, seed=1).step},
        rounds,
        device,
    )
    tokens = config.data.micro_num * config.data.micro_bsz * config.data.seq_len
    layers = linear_layers(config.model)
    flops = 6 * tokens * sum(layer.count * layer.inputs * layer.outputs for layer in layers)
    rate = measured_rate(layers, config.data.micro_bsz * config.data.seq_len, torch_dtype(config.model.dtype), device)
    return StepResult(
        shape=", ".join(f"{key}={value}" for key, value in shape.items()),
        device=device_name(device),
        ours_seconds=seconds["ours"],
        bare_seconds=seconds["bare"],
        ratio=seconds["ours"] / seconds["bare"],
        tokens_per_second=tokens / seconds["ours"],
        matmul_flops_per_second=flops / seconds["ours"],
        gemm_rate=rate,
        gemm_share=flops / seconds["ours"] / rate,
    )
