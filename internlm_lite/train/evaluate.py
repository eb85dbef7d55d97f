"""Loss and accuracy on the validation folders. Never changes training: no gradient, no random number, own metrics."""

from __future__ import annotations

import torch

from internlm_lite.data.loader import ValidationData
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.decoder import Transformer
from internlm_lite.monitor.metrics import Collected, FolderMetrics
from internlm_lite.train.step import forward


@torch.no_grad()
def evaluate(model: Transformer, data: ValidationData, mesh: Mesh) -> Collected:
    """Figures per validation folder over all data-parallel ranks. Collective over the mesh."""
    metrics = FolderMetrics(data.folders, mesh.dp, mesh.device)
    one = torch.ones((), device=mesh.device)
    for host_batch in data.batches():
        batch = host_batch.to(mesh.device)
        for micro in range(batch.micro_num):
            losses = forward(model, batch, micro, one)
            metrics.add(
                batch.folders[micro], batch.labels[micro], losses.token_loss, losses.correct, losses.train_loss_sum
            )
    return metrics.collect()
