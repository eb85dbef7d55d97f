"""What autograd really keeps between the forward and the backward pass of a stage."""

from __future__ import annotations

from typing import Any

import torch

from internlm_lite.apps.planner.holdings import StageShare
from internlm_lite.apps.planner.memory import Terms, shape_of, stage_terms
from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.layers.loss import TokenLosses
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import Share, Transformer, placement
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import build_stages


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


def run_stage(stage: Transformer, config: Config) -> tuple[TokenLosses, list[torch.Tensor]]:
    """(what a whole model gives for one row, the row's tensors)."""
    initialise(stage, seed=1)
    n_tokens = config.data.micro_bsz * config.data.seq_len
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, config.model.vocab_size, (2, n_tokens), generator=generator)
    positions, borders = torch.arange(n_tokens), (0, 5, 16, n_tokens)
    attend = packed(AttentionBackend.SDPA, torch.tensor(borders, dtype=torch.int32), borders, n_tokens)
    losses = stage.losses(stage.hidden(tokens, positions, attend), labels, torch.tensor(1.0))
    return losses, [tokens, labels, positions]


def kept_bytes(mesh: Mesh, config: Config) -> int:
    """Storages that one micro-batch leaves behind, each once; not the parameters, not the batch."""
    (stage,) = build_stages(config, mesh, AttentionBackend.SDPA).values()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # alive, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, batch = run_stage(stage, config)
    for tensor in (*stage.parameters(), *batch):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    # The loss keeps its gradients on its node, past the hooks of saved tensors.
    kept.update((made.data_ptr(), made.untyped_storage()) for made in losses.scaled_sum.grad_fn.gradients)
    return sum(storage.nbytes() for storage in kept.values())


def waiting_bytes(config: Config) -> int:
    """Storages that weight gradients which are put off hold on to, after the backward pass of one micro-batch."""
    place = placement(config.model, single_process_mesh(), by_sequence=False, defer_weight_grads=True)
    share = Share(range(config.model.num_layers), first=True, last=True)
    stage = Transformer(config.model, 0.0, place, AttentionBackend.SDPA, share)
    run_stage(stage, config)[0].scaled_sum.backward()
    tensors = [tensor for _, *pair in place.weight_grads._waiting for tensor in pair]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def planned(config: Config) -> Terms:
    """The planner's terms for the same."""
    stage = StageShare(0, range(config.model.num_layers), first=True, last=True)
    return stage_terms(shape_of(config, AttentionBackend.SDPA, "cpu"), stage, config.model.recomputed_layers)
