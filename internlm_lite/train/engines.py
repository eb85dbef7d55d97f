"""Who shards, reduces and updates, and who runs the micro-batches: one choice, by engine.name and the layout."""

from __future__ import annotations

from functools import partial

import torch

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import Stages, first_units, units_of
from internlm_lite.optim.deepspeed_engine import DeepSpeedOptimizer, ModelParts
from internlm_lite.optim.training_optimizer import TrainingOptimizer
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.pipeline.engine import Engine, HiddenShape, OneRank, Pipeline, Task


class DeepSpeedPasses:
    """As `OneRank`, with the passes that DeepSpeed watches."""

    def __init__(self, optimizer: DeepSpeedOptimizer) -> None:
        self._optimizer = optimizer

    def train(self, task: Task, micro_num: int) -> None:
        for micro in range(micro_num):
            self._optimizer.accumulate(partial(_loss, task, micro), last=micro == micro_num - 1)

    def evaluate(self, task: Task, micro_num: int) -> None:
        for micro in range(micro_num):
            self._optimizer.compute(partial(_loss, task, micro))
        self._optimizer.release()

    def set_rows(self, rows: int) -> None:
        pass


def _loss(task: Task, micro: int) -> torch.Tensor:
    return task.loss(micro, task.forward(0, micro, None))


def build_engines(
    config: Config, mesh: Mesh, stages: Stages, model_dtype: torch.dtype
) -> tuple[TrainingOptimizer, Engine]:
    """The optimizer of this rank's `stages`, and what runs micro-batches through them. Collective."""
    if config.engine.name == "native":
        units, firsts = units_of(stages), first_units(stages)
        native = HybridZeroOptimizer(units, config, mesh, model_dtype, firsts)
        return native, build_engine(config, mesh, stages)
    optimizer = DeepSpeedOptimizer(_parts(stages), config, mesh, model_dtype)
    return optimizer, DeepSpeedPasses(optimizer)


def _parts(stages: Stages) -> ModelParts:
    """Of the one stage that there is without a pipeline."""
    (stage,) = stages.values()
    units = list(stage.units())
    borrowed = [(unit, param) for unit in units for param in getattr(unit, "borrowed", ())]
    return ModelParts(units=units, blocks=stage.blocks(), borrowed=borrowed)


def build_engine(config: Config, mesh: Mesh, stages: Stages) -> Engine:
    """The engine for this rank's `stages`: `OneRank` without pipeline parallelism, else `Pipeline`."""
    if mesh.pp.size == 1:
        return OneRank()
    tp_ctx = next(iter(stages.values())).tp_ctx
    return Pipeline(
        stages,
        mesh.pp,
        schedule=config.schedule,
        shape=HiddenShape(
            rows=tp_ctx.rows(config.data.micro_bsz * config.data.seq_len // mesh.cp.size)
            + tp_ctx.rows(config.source_tokens),
            hidden_size=config.model.hidden_size,
            dtype=tp_ctx.dtype,
            device=mesh.device,
        ),
        early_receive=config.parallel.pipeline.interleaved_overlap,
        pop_deferred=tp_ctx.weight_grads.pop_deferred,
    )
