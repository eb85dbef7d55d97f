"""Builds the model, the engine and the optimizer of this rank, and runs optimizer steps and evaluations.

    loss of a micro-batch = (sum of losses over its labels) * loss_scale / tokens of the global batch

The divisor is known before the forward pass; the optimizer replaces it by the number of labels in the global batch,
which is summed with the gradient norm (optim/grad_norm.py). Gradients are reduced in optim/reduce.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn

from internlm_lite.batch import Batch
from internlm_lite.config.run_stages import stages_of
from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import TrainingSample, ValidationData
from internlm_lite.layers.dropout import Site, token_keys
from internlm_lite.layers.flash import choose_backend
from internlm_lite.layers.fp8 import require_float8
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import Stages, build_stages
from internlm_lite.monitor.metrics import Collected, FolderMetrics
from internlm_lite.optim.grad_norm import Requests
from internlm_lite.optim.step_decision import StepOutcome
from internlm_lite.runtime.device import torch_dtype
from internlm_lite.train.engines import build_engines
from internlm_lite.train.own_rows import OwnRow, own_rows, source_row
from internlm_lite.train.profiling import Stopwatch


@dataclass(frozen=True)
class BatchTask:
    """Runs one batch's micro-batches through this rank's stages: a `pipeline.engine.Task`."""

    stages: Stages
    batch: Batch
    rows: Sequence[OwnRow]
    """This rank's part of each micro-batch."""
    scale: torch.Tensor
    """Device scalar that multiplies the loss to differentiate."""
    metrics: FolderMetrics
    """Accumulates losses and accuracy."""
    loss_sum: torch.Tensor
    """fp64 device scalar that accumulates the training loss."""
    token_keys: torch.Tensor | None = None
    """[M, 2, T], for dropout; None: nothing is dropped."""
    source_keys: torch.Tensor | None = None
    """[M, 2, S], of source tokens."""

    def forward(self, stage: int, micro: int, hidden: torch.Tensor | None) -> torch.Tensor:
        batch, row, model = self.batch, self.rows[micro], self.stages[stage]
        keys = None if self.token_keys is None else self.token_keys[micro]
        attend = row.attend(model.backend, model.weight_drop(keys))
        tokens = row.cut(batch.tokens[micro]) if hidden is None else hidden
        positions = batch.positions[micro]
        own_keys = None if keys is None else row.cut(keys)
        source_keys = None if self.source_keys is None else self.source_keys[micro]
        drops = model.weight_drop(source_keys), model.weight_drop(keys, Site.CROSS_WEIGHTS)
        source = source_row(batch, micro, model.backend, drops, source_keys)
        lengths = row.lengths(positions) if model.rotates_by_length else None
        return model.hidden(tokens, row.cut(positions), attend, lengths, own_keys, source)

    def loss(self, micro: int, hidden: torch.Tensor) -> torch.Tensor:
        row, last = self.rows[micro], self.stages[max(self.stages)]
        labels, folders = row.cut(self.batch.labels[micro]), row.cut(self.batch.folders[micro])
        losses = last.losses(hidden, labels, self.scale)
        self.metrics.add(folders, labels, losses.token_loss, losses.correct, losses.train_loss_sum)
        self.loss_sum.add_(losses.train_loss_sum.detach())
        return losses.scaled_sum


class Trainer:
    """The stages of this rank, the engine that runs them, the optimizer that updates them. Methods are collective."""

    def __init__(
        self, config: Config, mesh: Mesh, folders: Sequence[str] = ("data",), *, draw_weights: bool = True
    ) -> None:
        """`folders`: names of the data folders, by a batch's folder index. `draw_weights` False: until all weights are
        loaded, or drawn by the method of that name, they are arbitrary numbers."""
        self.mesh, self._seed, dtype = mesh, config.seed, torch_dtype(config.model.dtype)
        self._rope_bases = [
            stage.rope_base or config.model.rope_base for stage in stages_of(config.data, config.stages)
        ]
        self._row_tokens = 0
        self._has_dropout = config.model.has_dropout
        self.backend = choose_backend(config.model, mesh.device)
        if config.model.fp8:
            require_float8(mesh.device)
        self.stages = build_stages(config, mesh, self.backend)
        self.optimizer, self.engine = build_engines(config, mesh, self.stages, dtype)
        if draw_weights and mesh.device.type != "meta":  # where tensors have no values
            self.draw_weights()
        self._own_rows = own_rows(config, mesh)
        self.metrics = FolderMetrics(folders, mesh)
        """Metrics of the training steps since they were last collected."""
        self.fwd_bwd_time = Stopwatch(mesh.device)
        """Time of forward and backward passes since it was last taken."""

    def draw_weights(self) -> None:
        """Initialise the weights from `config.seed`. Not collective."""
        for units in self.optimizer.to_draw():
            initialise(nn.ModuleList(units), self._seed)

    def enter_stage(self, stage: int) -> None:
        """Rotate by the base of stage number `stage` of the run, in evaluations and samples, too. Not collective."""
        for model in self.stages.values():
            if model.config.rope_base != self._rope_bases[stage]:
                model.set_rope_base(self._rope_bases[stage])

    def _forget_graphs(self, row_tokens: int) -> None:
        """Where rows have another length than in the step before: the compiler keeps graphs of few shapes only."""
        if self._row_tokens not in (0, row_tokens) and next(iter(self.stages.values())).tp_ctx.compiled:
            torch.compiler.reset()
        self._row_tokens = row_tokens

    def _set_rows(self, batch: Batch) -> None:
        tp_ctx = next(iter(self.stages.values())).tp_ctx
        source = 0 if batch.source is None else batch.source.tokens.shape[1]
        self.engine.set_rows(tp_ctx.rows(batch.tokens.shape[1] // self.mesh.cp.size) + tp_ctx.rows(source))

    def step(
        self,
        batch: Batch,
        step: int,
        *,
        requests: Callable[[], Requests] = Requests,
        before_update: Callable[[], object] = lambda: None,
    ) -> StepOutcome:
        """One optimizer step on `batch`; `step`: number of training steps before. Does not read the device.

        `requests` is called after the backward pass; its result is summed over all ranks with the gradient norm.
        `before_update` is called between backward pass and update, where ranks begin to wait for each other.
        """
        self.enter_stage(batch.stage)
        self._forget_graphs(batch.tokens.shape[1])
        self._set_rows(batch)
        global_tokens = batch.tokens.numel() * self.mesh.dp.size
        scale = self.optimizer.loss_scale.double() / global_tokens  # fp64: no rounding error in an fp64 model
        self.fwd_bwd_time.start()
        self.optimizer.begin(batch.micro_num)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        sides = (batch.tokens, None if batch.source is None else batch.source.tokens)
        keys = [
            None if side is None or not self._has_dropout else token_keys(self._seed, step, batch.rows, side.shape[1])
            for side in sides
        ]
        task = BatchTask(self.stages, batch, self._own_rows(batch), scale, self.metrics, loss_sum, *keys)
        self.engine.train(task, batch.micro_num)
        self.fwd_bwd_time.stop()
        before_update()
        return self.optimizer.step(step, batch.stats.num_labels, global_tokens, requests(), loss_sum)

    @torch.no_grad()
    def evaluate(
        self, data: ValidationData | TrainingSample, batch_done: Callable[[], object] = lambda: None
    ) -> Collected:
        """Loss and accuracy per folder, over all ranks; calls `batch_done` after each batch.

        Does not change training: no gradients, no random numbers, separate metrics. Reads the device at the end.
        """
        device, metrics = self.mesh.device, FolderMetrics(data.folders, self.mesh)
        one, loss_sum = torch.ones((), device=device), torch.zeros((), dtype=torch.float64, device=device)
        with closing(data.batches(pin=device.type == "cuda")) as batches:
            for host_batch in batches:
                batch = host_batch.to(device)
                self._set_rows(batch)
                task = BatchTask(self.stages, batch, self._own_rows(batch), one, metrics, loss_sum)
                self.engine.evaluate(task, batch.micro_num)
                batch_done()
        return metrics.collect()
