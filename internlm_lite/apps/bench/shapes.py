"""Model and batch shapes that the benchmarks use, as ordinary configs."""

from __future__ import annotations

from typing import Any

import torch

from internlm_lite.batch import IGNORE, Batch, BatchStats, Position
from internlm_lite.config.schema import Config


def bench_config(
    *,
    hidden: int,
    layers: int,
    heads: int,
    vocab: int,
    seq_len: int,
    micro_bsz: int,
    micro_num: int,
    dtype: str,
    parallel: dict[str, Any] | None = None,
    num_chunks: int = 1,
    bucket_size: int = 4 * 1024**2,
) -> Config:
    """Config of a decoder without biases, eager as its peers. Buckets of 4 M elements are small enough to overlap
    communication.

    `parallel`: that section of the config.
    """
    return Config.model_validate(
        {
            "data": {"seq_len": seq_len, "micro_bsz": micro_bsz, "micro_num": micro_num, "total_steps": 1000},
            "lr_scheduler": {"total_steps": 1000, "warmup_ratio": 0.0, "eta_min": 1e-4},
            "adam": {"lr": 1e-4},
            "hybrid_zero_optimizer": {"reduce_bucket_size": bucket_size},
            "grad_scaler": {},
            "model": {
                "num_attention_heads": heads,
                "vocab_size": vocab,
                "hidden_size": hidden,
                "num_layers": layers,
                "no_bias": True,
                "multiple_of": 64,
                "dtype": dtype,
                "num_chunks": num_chunks,
                "compile": False,
            },
            "parallel": parallel or {},
        }
    )


def random_batch(config: Config, seed: int, device: torch.device) -> Batch:
    """micro_num rows of micro_bsz documents, each exactly seq_len tokens: a plain [batch, length] batch."""
    data, vocab = config.data, config.model.vocab_size
    row = data.micro_bsz * data.seq_len
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (data.micro_num, row), generator=generator)
    labels = tokens.roll(-1, dims=1)
    labels[:, data.seq_len - 1 :: data.seq_len] = IGNORE
    borders = tuple(range(0, row + 1, data.seq_len))
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=torch.arange(row).remainder(data.seq_len).expand(data.micro_num, row).contiguous(),
        folders=torch.zeros(data.micro_num, row, dtype=torch.int32),
        rows=torch.arange(data.micro_num),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32).expand(data.micro_num, -1).contiguous(),
        cu_seqlens_host=(borders,) * data.micro_num,
        max_seqlen=data.seq_len,
        after=Position(batch=1, packs=data.micro_num),
        stats=BatchStats(
            num_samples=data.micro_num * data.micro_bsz,
            largest_length=data.seq_len,
            largest_batch=data.micro_bsz,
            smallest_batch=data.micro_bsz,
            num_tokens=tokens.numel(),
            num_labels=int((labels != IGNORE).sum()),
        ),
    ).to(device)
