"""The bare decoder in torch's own layouts, each as a user would write it.

    ddp       DistributedDataParallel, fused AdamW on every rank
    ddp_zero  the same with ZeroRedundancyOptimizer
    fsdp      fully_shard per block, weights kept gathered over the micro-batches: ZeRO-1's traffic, or hybrid ZeRO's
    fsdp3     fully_shard per block as by default: weights come and go with each pass, gradients with each micro-batch
    tp        parallelize_module: column- and row-wise linear layers, loss parallel, SequenceParallel where asked for
    pp        Schedule1F1B

All clip the global gradient norm and use the same micro-batches as our step. `step` returns the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from internlm_lite.apps.bench.bare import BareDecoder, BareStage, mean_loss
from internlm_lite.apps.bench.shapes import random_batch
from internlm_lite.apps.bench.timing import Side
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Group, Mesh
from internlm_lite.models.stages import layers_of_stages
from internlm_lite.runtime.device import torch_dtype

Params = Sequence[nn.Parameter]


def ddp(config: Config, mesh: Mesh, seed: int) -> Side:
    """Every rank updates all weights."""
    model, params = _ddp_model(config, mesh)
    return _ddp_side(model, params, _adamw(params, config), config, mesh, seed)


def ddp_zero(config: Config, mesh: Mesh, seed: int) -> Side:
    """Every rank updates its share of the weights."""
    model, params = _ddp_model(config, mesh)
    optimizer = ZeroRedundancyOptimizer(
        params, optimizer_class=torch.optim.AdamW, lr=config.adam.lr, betas=_betas(config), fused=True
    )
    return _ddp_side(model, params, optimizer, config, mesh, seed)


def _ddp_model(config: Config, mesh: Mesh) -> tuple[DistributedDataParallel, Params]:
    model = DistributedDataParallel(_decoder(config, mesh), gradient_as_bucket_view=True)
    return model, list(model.parameters())


def _ddp_side(
    model: DistributedDataParallel,
    params: Params,
    optimizer: torch.optim.Optimizer,
    config: Config,
    mesh: Mesh,
    seed: int,
) -> Side:
    micros, count = micro_batches(config, mesh, seed), config.data.micro_num

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)  # the gradients are views of DDP's buckets
        with model.no_sync():
            for tokens, labels in micros[:-1]:
                (model(tokens, labels) / count).backward()
        tokens, labels = micros[-1]
        (model(tokens, labels) / count).backward()
        norm = _clip(params, config)
        optimizer.step()
        return norm

    return Side(step)


def fsdp(config: Config, mesh: Mesh, seed: int) -> Side:
    """Weights are sharded over `zero` and replicated over `replica`; gathered and reduced once per step."""
    return _fsdp_side(config, mesh, seed, sharded=False)


def fsdp3(config: Config, mesh: Mesh, seed: int) -> Side:
    """The same, but weights are gathered for each pass of a block, and gradients reduced after each micro-batch."""
    return _fsdp_side(config, mesh, seed, sharded=True)


def _fsdp_side(config: Config, mesh: Mesh, seed: int, *, sharded: bool) -> Side:
    bare, device_mesh = _decoder(config, mesh), _data_mesh(mesh)
    for block in bare.model.layers.values():
        fully_shard(block, mesh=device_mesh, reshard_after_forward=sharded)
    model: Any = fully_shard(bare, mesh=device_mesh, reshard_after_forward=False)
    params = list(bare.parameters())
    optimizer = _adamw(params, config)
    micros, count = micro_batches(config, mesh, seed), config.data.micro_num

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        for index, (tokens, labels) in enumerate(micros):
            last = sharded or index == count - 1
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
            (model(tokens, labels) / count).backward()
        norm = _clip(params, config)
        optimizer.step()
        return norm

    return Side(step)


def _data_mesh(mesh: Mesh) -> DeviceMesh:
    kind, zero, replica = mesh.device.type, mesh.zero.process_group, mesh.replica.process_group
    assert zero is not None, "fully_shard over one rank is no layout"
    if replica is None:
        return DeviceMesh.from_group(zero, kind)
    ranks = torch.arange(mesh.dp.size).view(mesh.replica.size, mesh.zero.size)
    return DeviceMesh.from_group([replica, zero], kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def tp(config: Config, mesh: Mesh, seed: int) -> Side:
    """Tensor parallel, with sequence parallelism if the config enables it."""
    assert mesh.tp.process_group is not None, "tensor parallelism over one rank is no layout"
    device_mesh = DeviceMesh.from_group(mesh.tp.process_group, mesh.device.type)
    bare = _decoder(config, mesh)
    plan = _plan(config.parallel.sequence_parallel, config.model.num_layers)
    parallelize_module(bare.model, device_mesh, plan)
    params = list(bare.parameters())
    optimizer = _adamw(params, config)
    micros, count = micro_batches(config, mesh, seed), config.data.micro_num

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        for tokens, labels in micros:
            with loss_parallel():
                (bare(tokens, labels) / count).backward()
        norm = _clip(params, config)
        optimizer.step()
        return norm

    return Side(step)


def _plan(by_sequence: bool, num_layers: int) -> dict[str, Any]:
    """The plan of torch's tensor-parallel tutorial and of torchtitan; one gather for wqkv, one for w1 and w3."""
    outside = Shard(1) if by_sequence else Replicate()
    plan: dict[str, Any] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "output": ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False),
    }
    if by_sequence:
        plan["norm"] = SequenceParallel()
    for number in range(num_layers):
        block = f"layers.{number}"
        plan |= {
            f"{block}.attention": PrepareModuleInput(
                input_layouts=(outside, None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            f"{block}.attention.wqkv": ColwiseParallel(),
            f"{block}.attention.wo": RowwiseParallel(output_layouts=outside),
            f"{block}.feed_forward": PrepareModuleInput(input_layouts=(outside,), desired_input_layouts=(Replicate(),)),
            f"{block}.feed_forward.w1": ColwiseParallel(),
            f"{block}.feed_forward.w3": ColwiseParallel(),
            f"{block}.feed_forward.w2": RowwiseParallel(output_layouts=outside),
        }
        if by_sequence:
            plan |= {f"{block}.attention_norm": SequenceParallel(), f"{block}.ffn_norm": SequenceParallel()}
    return plan


def pp(config: Config, mesh: Mesh, seed: int) -> Side:
    """One stage a rank, split over the layers as ours."""
    rank, size, model, data = mesh.pp.rank, mesh.pp.size, config.model, config.data
    dtype = torch_dtype(model.dtype)
    part = BareStage(model, data.seq_len, dtype, layers_of_stages(config)[rank]).to(mesh.device)
    tokens = torch.empty(data.micro_bsz, data.seq_len, dtype=torch.int64, device="meta")
    hidden = tokens.new_empty(*tokens.shape, model.hidden_size, dtype=dtype, requires_grad=True)
    logits = tokens.new_empty(*tokens.shape, model.vocab_size, dtype=dtype, requires_grad=True)
    stage = PipelineStage(
        part,
        rank,
        size,
        mesh.device,
        # Shapes are given, so that the first step needs no trial run to infer them.
        input_args=(tokens if rank == 0 else hidden,),
        output_args=(logits if rank == size - 1 else hidden,),
        group=mesh.pp.process_group,
    )
    schedule = Schedule1F1B(stage, data.micro_num, loss_fn=mean_loss)
    params = list(part.parameters())
    optimizer = _adamw(params, config)
    batch = random_batch(config, seed + mesh.dp.rank, mesh.device)
    rows = (data.micro_num * data.micro_bsz, data.seq_len)
    inputs = (batch.tokens.view(rows),) if rank == 0 else ()
    target = batch.labels.view(rows) if rank == size - 1 else None

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        schedule.step(*inputs, target=target, return_outputs=False)
        norm = _clip(params, config, mesh.pp)
        optimizer.step()
        return norm

    return Side(step)


def _decoder(config: Config, mesh: Mesh) -> BareDecoder:
    return BareDecoder(config.model, config.data.seq_len, torch_dtype(config.model.dtype)).to(mesh.device)


def micro_batches(config: Config, mesh: Mesh, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels), each [micro_bsz, seq_len]."""
    batch = random_batch(config, seed + mesh.dp.rank, mesh.device)
    shape = (config.data.micro_num, config.data.micro_bsz, config.data.seq_len)
    return list(zip(batch.tokens.view(shape), batch.labels.view(shape), strict=True))


def _betas(config: Config) -> tuple[float, float]:
    return config.adam.adam_beta1, config.adam.adam_beta2


def _kinds(params: Params) -> list[list[nn.Parameter]]:
    """DTensors and plain tensors as separate lists: torch's fused functions accept no mixture."""
    kinds = [[p for p in params if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    return [kind for kind in kinds if kind]


def _adamw(params: Params, config: Config) -> torch.optim.AdamW:
    groups = [{"params": kind} for kind in _kinds(params)]
    return torch.optim.AdamW(groups, lr=config.adam.lr, betas=_betas(config), fused=True)


@torch.no_grad()
def _clip(params: Params, config: Config, pp: Group | None = None) -> torch.Tensor:
    """Clip by the global norm over all parameters and pipeline ranks; returns the norm before. Collective."""
    kinds = _kinds(params)
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    squares = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).square().sum()
    if pp is not None:
        dist.all_reduce(squares, group=pp.process_group)
    norm = squares.sqrt()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, config.hybrid_zero_optimizer.clip_grad_norm, norm)
    return norm


Builder = Callable[[Config, Mesh, int], Side]
