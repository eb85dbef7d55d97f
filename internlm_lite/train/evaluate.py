"""Loss and accuracy on the validation folders. Never changes training: no gradient, no random number, own metrics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch

from internlm_lite.data.loader import ValidationData
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import Stages
from internlm_lite.monitor.metrics import Collected, FolderMetrics
from internlm_lite.pipeline.engine import Engine
from internlm_lite.train.step import BatchTask


@torch.no_grad()
def evaluate(
    stages: Stages, engine: Engine, data: ValidationData, mesh: Mesh, batch_done: Callable[[], object]
) -> Collected:
    """Figures per validation folder over the whole job. Collective over the mesh."""
    metrics = FolderMetrics(data.folders, mesh)
    one, loss_sum = torch.ones((), device=mesh.device), torch.zeros((), dtype=torch.float64, device=mesh.device)
    with closing(data.batches()) as batches:
        for host_batch in batches:
            batch = host_batch.to(mesh.device)
            engine.evaluate(BatchTask(stages, batch, one, metrics, loss_sum), batch.micro_num)
            batch_done()
    return metrics.collect()
