"""The pipeline stages of a model that one rank holds. Without pipeline parallelism, one stage has all layers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import nn

from internlm_lite.config.schema import Config, LossConfig, ModelConfig
from internlm_lite.layers.cross_attention import Memory
from internlm_lite.layers.flash import Attend, AttentionBackend
from internlm_lite.mesh.comm import broadcast
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.models.decoder import (
    Block,
    EncoderBlock,
    SourceRow,
    StageSpec,
    Transformer,
    build_model,
    tensor_parallel_context,
)
from internlm_lite.pipeline.split import rank_to_stages, split_layers, stage_to_rank

Stages = dict[int, Transformer]
"""Stage number -> stage, in layer order."""


def build_stages(config: Config, mesh: Mesh, backend: AttentionBackend) -> Stages:
    """The uninitialised stages of this rank, on `mesh.device`. Raises ConfigError as `build_model` does."""
    model, schedule = config.model, config.schedule
    layers = layers_of_stages(config)
    tp_ctx = tensor_parallel_context(
        model,
        mesh,
        by_sequence=config.parallel.sequence_parallel,
        defer_weight_grads=schedule == "zbv",
        allocated=config.parallel.zero_stage < 3,
        source_share=config.source_share,
    )
    last = len(layers) - 1
    ends_on_one_rank = mesh.pp.size == 1 or schedule == "zbv"
    tied_over = ("ends",) if model.tie_word_embeddings and not ends_on_one_rank else ()
    stages: Stages = {}
    for number in rank_to_stages(mesh.pp.rank, mesh.pp.size, model.num_chunks, schedule):
        spec = StageSpec(layers[number], first=number == 0, last=number == last, tied_over=tied_over)
        embedding = stages[0].tok_embeddings if model.tie_word_embeddings and 0 in stages else None
        tied = None if embedding is None else embedding.weight
        stages[number] = Transformer(model, config.loss, tp_ctx, backend, spec, tied)
    return stages


def layers_of_stages(config: Config) -> list[range]:
    """The layer numbers of every stage of the pipeline, balanced by floating-point operations."""
    model, seq_len = config.model, config.data.seq_len
    sample = meta_model(model.model_copy(update={"num_layers": 1}), config.source_share)
    assert sample.tok_embeddings is not None and sample.output is not None
    layers = range(model.num_blocks)
    kinds = {(model.in_encoder(layer), model.window(layer)): layer for layer in layers}
    classes = {True: EncoderBlock, False: Block}
    costs = {
        kind: classes[kind[0]](model, layer, sample.tp_ctx).flops_per_token(seq_len) for kind, layer in kinds.items()
    }
    embeddings = [one for one in (sample.source_embeddings, sample.tok_embeddings) if one is not None]
    return split_layers(
        [costs[model.in_encoder(layer), model.window(layer)] for layer in layers],
        _stage_ranks(config),
        embedding=sum(one.lookup_ops_per_token() for one in embeddings),
        head=sample.output.flops_per_token(seq_len),
    )


def meta_model(config: ModelConfig, share: Fraction = Fraction(1)) -> Transformer:
    """The unsplit model on the meta device, which allocates no memory: to compute costs. `share`: of `Config`, its
    source_share."""
    mesh = single_process_mesh(torch.device("meta"))
    return build_model(config, LossConfig(), mesh, AttentionBackend.SDPA, source_share=share)


def model_flops_per_token(config: ModelConfig, seq_len: int, share: Fraction = Fraction(1)) -> int:
    """Forward and backward FLOPs of the matrix products per (target) token, without recomputation: the numerator of
    MFU. `share`: see Config.source_share."""
    return 3 * meta_model(config, share).flops_per_token(seq_len)


def _stage_ranks(config: Config) -> tuple[int, ...]:
    return stage_to_rank(config.parallel.pipeline.size, config.model.num_chunks, config.schedule)


def units_of(stages: Stages) -> list[nn.Module]:
    """The modules that hold parameters, in layer order; see `Transformer.units`."""
    return [unit for stage in stages.values() for unit in stage.units()]


def first_units(stages: Stages) -> list[int]:
    """The number of each stage's first module among `units_of`."""
    return list(accumulate((len(list(stage.units())) for stage in stages.values()), initial=0))[:-1]


class WholeModel:
    """Runs the stages of all pipeline ranks one after another, without micro-batches: for generation."""

    def __init__(
        self, stages: Stages, mesh: Mesh, stage_ranks: Sequence[int] = (0,), *, together: bool = False
    ) -> None:
        """`stage_ranks`: the pipeline rank of each stage of the model."""
        self.together = together
        """Data-parallel ranks gather weights for each pass (ZeRO stage 3), so all of them have to do the same ones."""
        self._stages, self._pp, self._stage_ranks = stages, mesh.pp, stage_ranks
        self.any_stage = next(iter(stages.values()))
        self.device = mesh.device

    def logits(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        rows: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        source: SourceRow | Memory | None = None,
    ) -> torch.Tensor:
        """Logits [T, vocab], or [R, vocab] of tokens `rows` [R] only, on every rank. Collective over tp and pp.

        `lengths`: see `layers.rope.Rotary`; needed where the row has parts of documents. `source`: see
        `Transformer.hidden`; a memory without rows."""
        tp_ctx, hidden_size = self.any_stage.tp_ctx, self.any_stage.config.hidden_size
        x, sent = tokens, len(tokens) + (len(source.positions) if isinstance(source, SourceRow) else 0)
        last = len(self._stage_ranks) - 1
        with tp_ctx.whole_activations():
            for number, rank in enumerate(self._stage_ranks):
                if number in self._stages:
                    x = self._stages[number].hidden(x, positions, attend, lengths, source=source)
                else:
                    n_rows = len(tokens) if number == last else sent
                    x = torch.empty(n_rows, hidden_size, dtype=tp_ctx.dtype, device=self.device)
                broadcast(x, self._pp, rank).wait()
            if rows is not None:
                x = x[rows]
            if last in self._stages:
                logits = self._stages[last].logits(x)
            else:
                logits = torch.empty(len(x), self.any_stage.config.vocab_size, dtype=tp_ctx.dtype, device=self.device)
            broadcast(logits, self._pp, self._stage_ranks[last]).wait()
        return logits


def whole_model(config: Config, mesh: Mesh, stages: Stages) -> WholeModel:
    """The `WholeModel` of a run's stages."""
    return WholeModel(stages, mesh, _stage_ranks(config), together=config.parallel.zero_stage == 3)
