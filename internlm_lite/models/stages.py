"""The pipeline stages of a model that one rank holds. One rank without a pipeline holds the one stage there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from internlm_lite.config.schema import Config
from internlm_lite.layers.attention import Attend
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.comm import broadcast
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.decoder import Share, Transformer, placement
from internlm_lite.monitor.flops import block_flops, embedding_flops, head_flops
from internlm_lite.pipeline.split import home_of, split_layers, stages_on

Stages = dict[int, Transformer]
"""By stage number, in the order of the layers."""


def build_stages(config: Config, mesh: Mesh, backend: AttentionBackend) -> Stages:
    """The uninitialised stages of this rank, on `mesh.device`."""
    model, schedule = config.model, config.schedule
    layers = layers_of_stages(config)
    place = placement(model, mesh, config.parallel.sequence_parallel, defer_weight_grads=schedule == "zbv")
    numbers = stages_on(mesh.pp.rank, mesh.pp.size, model.num_chunks, schedule)
    last = len(layers) - 1
    one_home = mesh.pp.size == 1 or schedule == "zbv"  # the first and the last stage are on one rank
    tied_over = ("ends",) if model.tie_word_embeddings and not one_home else ()
    stages: Stages = {}
    for number in numbers:
        share = Share(layers[number], number == 0, number == last, tied_over)
        embedding = stages[0].tok_embeddings if model.tie_word_embeddings and 0 in stages else None
        tied = None if embedding is None else embedding.weight
        if tied is not None and share.last:
            tied.backwards = 2
        stages[number] = Transformer(model, config.loss.label_smoothing, place, backend, share, tied)
    return stages


def layers_of_stages(config: Config) -> list[range]:
    """The layers of every stage of the pipeline, balanced by floating point operations."""
    model, seq_len, size = config.model, config.data.seq_len, config.parallel.pipeline.size
    homes = [home_of(stage, size, config.schedule) for stage in range(size * model.num_chunks)]
    return split_layers(model.num_layers, homes, block_flops(model, seq_len), embedding_flops(model), head_flops(model))


def units_of(stages: Stages) -> list[nn.Module]:
    """The modules that hold parameters, in the order of the layers; see `Transformer.units`."""

    def units() -> Iterator[nn.Module]:
        for stage in stages.values():
            yield from stage.units()

    return list(units())


class WholeModel:
    """The stages of all pipeline ranks as one function, one after another: for use outside the training step."""

    def __init__(self, stages: Stages, mesh: Mesh, homes: Sequence[int] = (0,)) -> None:
        """`homes`: the pipeline rank of each stage of the model."""
        self._stages, self._pp, self._homes = stages, mesh.pp, homes
        self.any_stage = next(iter(stages.values()))
        self.device = mesh.device

    def logits(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, vocab] for tokens [T] at positions [T], or of `rows` [R] only, on every rank. Collective over tp, pp."""
        place = self.any_stage.place
        x = tokens
        with place.whole_activations():
            for number, home in enumerate(self._homes):
                if number in self._stages:
                    x = self._stages[number].hidden(x, positions, attend)
                else:
                    x = torch.empty(
                        len(tokens), self.any_stage.config.hidden_size, dtype=place.dtype, device=self.device
                    )
                broadcast(x, self._pp, home).wait()
            if rows is not None:
                x = x[rows]
            last = len(self._homes) - 1
            if last in self._stages:
                logits = self._stages[last].logits(x)
            else:
                logits = torch.empty(len(x), self.any_stage.config.vocab_size, dtype=place.dtype, device=self.device)
            broadcast(logits, self._pp, self._homes[last]).wait()
        return logits


def whole_model(config: Config, mesh: Mesh, stages: Stages) -> WholeModel:
    """The model of a run."""
    size, schedule = mesh.pp.size, config.schedule
    homes = [home_of(stage, size, schedule) for stage in range(size * config.model.num_chunks)]
    return WholeModel(stages, mesh, homes)
