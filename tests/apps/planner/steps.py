"""Real training steps, put together from the trainer's own parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.batch import Batch, BatchStats, Position
from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import Stages, build_stages, units_of
from internlm_lite.monitor.metrics import FolderMetrics
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.pipeline.engine import Engine
from internlm_lite.runtime.device import torch_dtype
from internlm_lite.train.build import build_engine
from internlm_lite.train.step import train_step
from internlm_lite.train.stopwatch import Stopwatch


def small(**sections: dict[str, Any]) -> Config:
    """4 micro-batches of 2 * 16 tokens, 4 layers; keyword arguments change sections."""
    values: dict[str, dict[str, Any]] = {
        "data": {"seq_len": 16, "micro_bsz": 2, "micro_num": 4, "total_steps": 4},
        "lr_scheduler": {"total_steps": 4},
        "hybrid_zero_optimizer": {"reduce_bucket_size": 3000},
        "model": {
            "num_attention_heads": 4,
            "hidden_size": 32,
            "num_layers": 4,
            "vocab_size": 256,
            "multiple_of": 16,
            "dtype": "torch.float32",
        },
        "grad_scaler": {},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return Config.model_validate(values)


@dataclass
class Trainer:
    """This rank's parts of a run on `mesh`."""

    config: Config
    mesh: Mesh
    stages: Stages
    optimizer: HybridZeroOptimizer
    engine: Engine
    metrics: FolderMetrics

    @classmethod
    def build(cls, config: Config, mesh: Mesh, backend: AttentionBackend = AttentionBackend.SDPA) -> Trainer:
        stages = build_stages(config, mesh, backend)
        if mesh.device.type != "meta":
            for stage in stages.values():
                initialise(stage, config.seed)
        optimizer = HybridZeroOptimizer(units_of(stages), config, mesh, torch_dtype(config.model.dtype))
        metrics = FolderMetrics(("dummy",), mesh)
        return cls(config, mesh, stages, optimizer, build_engine(config, mesh, stages), metrics)

    def batch(self) -> Batch:
        """Random tokens in documents of unequal length."""
        data, generator = self.config.data, torch.Generator().manual_seed(self.mesh.dp.rank)
        n, shape = data.micro_bsz * data.seq_len, (data.micro_num, data.micro_bsz * data.seq_len)
        tokens, labels = torch.randint(0, self.config.model.vocab_size, (2, *shape), generator=generator)
        boundaries = (0, 5, *range(data.seq_len, n + 1, data.seq_len))
        positions = torch.arange(n).expand(shape)
        return Batch(
            tokens=tokens,
            labels=labels,
            positions=positions,
            folders=torch.zeros(shape, dtype=torch.int32),
            cu_seqlens=torch.tensor([boundaries] * data.micro_num, dtype=torch.int32),
            cu_seqlens_host=(boundaries,) * data.micro_num,
            max_seqlen=data.seq_len,
            after=Position(),
            stats=BatchStats(data.micro_num * data.micro_bsz, data.seq_len, data.micro_bsz, data.micro_bsz, n, n),
        )

    def step(self, index: int = 0) -> None:
        batch = self.batch().to(self.mesh.device)
        train_step(
            self.stages,
            self.engine,
            self.optimizer,
            batch,
            index,
            self.mesh,
            self.metrics,
            Stopwatch(self.mesh.device),
        )
        self.optimizer.wait_weights()
