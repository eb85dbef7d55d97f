"""Real training steps on random tokens."""

from __future__ import annotations

from typing import Any

import torch

from internlm_lite.batch import Batch, BatchStats, Position, SourceRows
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.train.trainer import Trainer


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


def random_batch(config: Config, mesh: Mesh) -> Batch:
    """Documents of unequal length."""
    data, generator = config.data, torch.Generator().manual_seed(mesh.dp.rank)
    n, shape = data.micro_bsz * data.seq_len, (data.micro_num, data.micro_bsz * data.seq_len)
    tokens, labels = torch.randint(0, config.model.vocab_size, (2, *shape), generator=generator)
    boundaries = (0, 5, *range(data.seq_len, n + 1, data.seq_len))
    positions = torch.arange(n).expand(shape)
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        folders=torch.zeros(shape, dtype=torch.int32),
        rows=torch.arange(data.micro_num),
        cu_seqlens=torch.tensor([boundaries] * data.micro_num, dtype=torch.int32),
        cu_seqlens_host=(boundaries,) * data.micro_num,
        max_seqlen=data.seq_len,
        after=Position(),
        stats=BatchStats(data.micro_num * data.micro_bsz, data.seq_len, data.micro_bsz, data.micro_bsz, n, n),
        source=_random_sources(config, len(boundaries), generator) if config.model.num_encoder_layers else None,
    )


def _random_sources(config: Config, borders: int, generator: torch.Generator) -> SourceRows:
    """As many documents, of which the last is the longest."""
    n, rows = config.source_tokens, config.data.micro_num
    boundaries = (*range(borders - 1), n)
    return SourceRows(
        tokens=torch.randint(0, config.model.source_vocab, (rows, n), generator=generator),
        positions=torch.arange(n).expand(rows, n),
        cu_seqlens=torch.tensor([boundaries] * rows, dtype=torch.int32),
        cu_seqlens_host=(boundaries,) * rows,
        max_seqlen=n,
    )


def run_step(trainer: Trainer, batch: Batch, step: int = 0) -> None:
    """Train on `batch`, and wait until the weights are gathered."""
    trainer.step(batch.to(trainer.mesh.device), step)
    trainer.optimizer.wait_weights()
