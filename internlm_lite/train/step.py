"""One optimizer step: forward and backward over the micro-batches, reduce, update.

    loss of a micro-batch = sum over its labels * loss_scale / tokens of the global batch

The divisor is a constant known before the forward pass; the optimizer replaces it by the true number of labels, which
it learns in the same collective as the gradient norm (optim/norm.py). Gradients are reduced in optim/reduce.py.
"""

from __future__ import annotations

import torch

from internlm_lite.batch import Batch
from internlm_lite.layers.flash import packed
from internlm_lite.layers.loss import TokenLosses
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.decoder import Transformer
from internlm_lite.monitor.metrics import FolderMetrics
from internlm_lite.optim.zero import HybridZeroOptimizer, StepOutcome
from internlm_lite.train.stopwatch import Stopwatch


def forward(model: Transformer, batch: Batch, micro: int, scale: torch.Tensor) -> TokenLosses:
    """Losses of micro-batch `micro`; `scale` (device scalar) multiplies the differentiable sum."""
    attend = packed(model.backend, batch.cu_seqlens[micro], batch.cu_seqlens_host[micro], batch.max_seqlen)
    return model(batch.tokens[micro], batch.positions[micro], batch.labels[micro], attend, scale)


def train_step(
    model: Transformer,
    optimizer: HybridZeroOptimizer,
    batch: Batch,
    step: int,
    mesh: Mesh,
    metrics: FolderMetrics,
    fwd_bwd: Stopwatch,
) -> StepOutcome:
    """Train on `batch`; its losses are added to `metrics`, its time to `fwd_bwd`. Collective."""
    global_tokens = batch.tokens.numel() * mesh.dp.size
    scale = optimizer.loss_scale.double() / global_tokens  # fp64, so that an fp64 model is exact to its own rounding
    fwd_bwd.start()
    for micro in range(batch.micro_num):
        losses = forward(model, batch, micro, scale)
        if micro == batch.micro_num - 1:
            optimizer.arm()
        losses.scaled_sum.backward()
        metrics.add(batch.folders[micro], batch.labels[micro], losses.token_loss, losses.correct, losses.train_loss_sum)
    fwd_bwd.stop()
    return optimizer.step(step, batch.stats.num_labels, global_tokens)
