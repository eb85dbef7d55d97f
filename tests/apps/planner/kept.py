"""What autograd really keeps between the forward and the backward pass of a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from internlm_lite.apps.planner.memory import row_shape
from internlm_lite.config.schema import Config, LossConfig
from internlm_lite.layers.costs import Bytes
from internlm_lite.layers.dropout import Site, token_keys
from internlm_lite.layers.flash import AttentionBackend, Borders, packed, packed_across
from internlm_lite.mesh.mesh import Mesh, plan_mesh, single_process_mesh, sizes_of
from internlm_lite.models.decoder import SourceRow, StageSpec, Transformer, tensor_parallel_context
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import build_stages
from tests.models.counted import saved_bytes


def config(**changes: Any) -> Config:
    """Rows of 2 * 16 tokens; `parallel` a section, everything else keys of `model`."""
    parallel = changes.pop("parallel", {})
    model = {
        "num_attention_heads": 4,
        "hidden_size": 32,
        "num_layers": 3,
        "vocab_size": 96,
        "multiple_of": 16,
        "dtype": "torch.float32",
    }
    return Config.model_validate(
        {
            "data": {"seq_len": 16, "micro_bsz": 2, "micro_num": 1, "total_steps": 1},
            "lr_scheduler": {"total_steps": 1},
            "model": {**model, **changes},
            "parallel": parallel,
        }
    )


def row_of_stage(stage: Transformer, config: Config) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """(what computes the loss of one row by a whole model, the row's tensors)."""
    initialise(stage, seed=1)
    if stage.output is not None:  # as an optimizer gives it: the head keeps no gradient of its own
        stage.output.matrix.main_grad = torch.zeros_like(stage.output.matrix)
    n_tokens = config.data.micro_bsz * config.data.seq_len
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, config.model.vocab_size, (2, n_tokens), generator=generator)
    positions, boundaries = torch.arange(n_tokens), (0, 5, 16, n_tokens)
    keys = token_keys(1, 0, torch.tensor([0]), n_tokens)
    drop = stage.weight_drop(keys[0])
    attend = packed(AttentionBackend.SDPA, torch.tensor(boundaries, dtype=torch.int32), boundaries, n_tokens, drop)
    source = source_of(stage, keys[0]) if config.model.num_encoder_layers else None

    def run() -> torch.Tensor:
        hidden = stage.hidden(tokens, positions, attend, token_keys=keys[0], source=source)
        return stage.losses(hidden, labels, torch.tensor(1.0)).scaled_sum

    return run, [tokens, labels, positions, keys, *([] if source is None else [source.tokens])]


def source_of(stage: Transformer, keys: torch.Tensor) -> SourceRow:
    """As many documents and tokens as the row of `row_of_stage`, which has these keys."""
    target, own = (0, 5, 16, keys.shape[1]), (0, 9, 20, keys.shape[1])
    rows = [Borders(torch.tensor(ends, dtype=torch.int32), ends, ends[-1]) for ends in (target, own)]
    drops = stage.weight_drop(keys), stage.weight_drop(keys, Site.CROSS_WEIGHTS)
    inside = packed(AttentionBackend.SDPA, rows[1].cu_seqlens, own, own[-1], drops[0])
    positions = torch.arange(own[-1])
    return SourceRow(positions, positions, inside, packed_across(AttentionBackend.SDPA, *rows, drops[1]), keys)


def kept_bytes(mesh: Mesh, config: Config) -> int:
    """Of one micro-batch; see `tests.models.counted.saved_bytes`."""
    (stage,) = build_stages(config, mesh, AttentionBackend.SDPA).values()
    run, batch = row_of_stage(stage, config)
    return saved_bytes(run, stage, batch)


def waiting_bytes(config: Config) -> int:
    """Storages that deferred weight gradients keep after the backward pass of one micro-batch, without scalars."""
    tp_ctx = tensor_parallel_context(config.model, single_process_mesh(), by_sequence=False, defer_weight_grads=True)
    spec = StageSpec(range(config.model.num_blocks), first=True, last=True)
    stage = Transformer(config.model, LossConfig(), tp_ctx, AttentionBackend.SDPA, spec)
    run, _ = row_of_stage(stage, config)
    run().backward()
    tensors = [leaf for _, *pair in tp_ctx.weight_grads._waiting for leaf in tree_leaves(pair) if leaf.dim()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def planned_stage(config: Config) -> Transformer:
    """The whole model of a tensor-parallel rank, on the meta device."""
    parallel = config.parallel
    mesh = plan_mesh(sizes_of(parallel.tensor, parallel.tensor, 1, -1), 0, torch.device("meta"))
    (stage,) = build_stages(config, mesh, AttentionBackend.SDPA).values()
    return stage


def planned(config: Config) -> Bytes:
    """What the layers say that they keep of the same row."""
    return planned_stage(config).saved_bytes(row_shape(config, AttentionBackend.SDPA, "cpu"))
