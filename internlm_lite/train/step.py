"""One optimizer step: forward and backward over the micro-batches, reduce, update.

    loss of a micro-batch = sum over its labels * loss_scale / tokens of the global batch

The divisor is a constant known before the forward pass; the optimizer replaces it by the true number of labels, which
it learns in the same collective as the gradient norm (optim/norm.py). Gradients are reduced in optim/reduce.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from internlm_lite.batch import Batch
from internlm_lite.layers.flash import packed
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import Stages
from internlm_lite.monitor.metrics import FolderMetrics
from internlm_lite.optim.zero import HybridZeroOptimizer, StepOutcome
from internlm_lite.pipeline.engine import Engine
from internlm_lite.train.stopwatch import Stopwatch


@dataclass(frozen=True)
class BatchTask:
    """The micro-batches of one batch through this rank's stages (`pipeline.engine.Task`)."""

    stages: Stages
    batch: Batch
    scale: torch.Tensor
    """Device scalar that multiplies the differentiable sum."""
    metrics: FolderMetrics
    """Gets the losses."""
    loss_sum: torch.Tensor
    """fp64 device scalar; the training loss is added to it."""

    def forward(self, stage: int, micro: int, hidden: torch.Tensor | None) -> torch.Tensor:
        batch, model = self.batch, self.stages[stage]
        attend = packed(model.backend, batch.cu_seqlens[micro], batch.cu_seqlens_host[micro], batch.max_seqlen)
        return model.hidden(batch.tokens[micro] if hidden is None else hidden, batch.positions[micro], attend)

    def loss(self, micro: int, hidden: torch.Tensor) -> torch.Tensor:
        labels, last = self.batch.labels[micro], self.stages[max(self.stages)]
        losses = last.losses(hidden, labels, self.scale)
        self.metrics.add(self.batch.folders[micro], labels, losses.token_loss, losses.correct, losses.train_loss_sum)
        self.loss_sum.add_(losses.train_loss_sum.detach())
        return losses.scaled_sum


def train_step(
    stages: Stages,
    engine: Engine,
    optimizer: HybridZeroOptimizer,
    batch: Batch,
    step: int,
    mesh: Mesh,
    metrics: FolderMetrics,
    fwd_bwd: Stopwatch,
    requests: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
    updating: Callable[[], object] = lambda: None,
) -> StepOutcome:
    """Train on `batch`; its losses are added to `metrics`, its time to `fwd_bwd`; `requests` are asked for late in the
    step, and summed. Collective.

    `updating` is called between backward and update, where ranks wait for each other.
    """
    global_tokens = batch.tokens.numel() * mesh.dp.size
    scale = optimizer.loss_scale.double() / global_tokens  # fp64, so that an fp64 model is exact to its own rounding
    fwd_bwd.start()
    optimizer.begin(batch.micro_num)
    loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
    engine.train(BatchTask(stages, batch, scale, metrics, loss_sum), batch.micro_num)
    fwd_bwd.stop()
    updating()
    return optimizer.step(step, batch.stats.num_labels, global_tokens, requests(), loss_sum)
