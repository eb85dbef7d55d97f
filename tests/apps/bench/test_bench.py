"""The benchmarks run and measure what they say, on shapes too small to mean anything. No test asserts a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.bench.bare import BareDecoder
from internlm_lite.apps.bench.data_loading import bench_loader
from internlm_lite.apps.bench.gemm import linear_layers
from internlm_lite.apps.bench.ranks import bench_ranks
from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.apps.bench.step import bench_step
from internlm_lite.apps.bench.worlds import device_of
from internlm_lite.config.schema import LossConfig
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import build_model
from internlm_lite.models.initialise import initialise
from internlm_lite.runtime.device import device_name

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 4, "vocab": 64, "dtype": "torch.float32"}
SHAPE |= {"seq_len": 16, "micro_bsz": 2, "micro_num": 2}


def test_the_bare_decoder_is_the_same_model():
    """Same weights, same batch, same loss: the bench compares equals."""
    config = bench_config(**{**SHAPE, "dtype": "torch.float64"})
    ours = build_model(config.model, LossConfig(), single_process_mesh(), AttentionBackend.SDPA)
    initialise(ours, seed=3)
    bare = BareDecoder(config.model, config.data.seq_len, torch.float64)
    bare.model.load_state_dict(ours.state_dict())
    batch = random_batch(config, 0, CPU)
    attend = packed(AttentionBackend.SDPA, batch.cu_seqlens[0], batch.cu_seqlens_host[0], batch.max_seqlen)
    hidden = ours.hidden(batch.tokens[0], batch.positions[0], attend)
    losses = ours.losses(hidden, batch.labels[0], torch.ones((), dtype=torch.float64))
    expected = bare(batch.tokens[0].view(2, 16), batch.labels[0].view(2, 16))
    # The bare loop takes its loss in fp32.
    torch.testing.assert_close((losses.train_loss_sum / 30).float(), expected.float(), rtol=1e-6, atol=0)


def test_step_reports_ratios():
    result = bench_step(CPU, rounds=2, **SHAPE)
    assert result.ratio == result.ours_seconds / result.bare_seconds > 0
    assert result.device == device_name(CPU)
    assert result.gemm_share == result.matmul_flops_per_second / result.gemm_rate > 0


def test_linear_layers_hold_all_matrices():
    config = bench_config(**SHAPE)
    model = build_model(config.model, LossConfig(), single_process_mesh(), AttentionBackend.SDPA)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "tok_embeddings.weight")
    assert sum(layer.inputs * layer.outputs * layer.count for layer in linear_layers(config.model)) == matrices


def test_two_ranks_report_time_and_memory():
    result = bench_ranks(2, rounds=1, **SHAPE)
    assert result.time_ratio > 0 and result.device == device_name(device_of(0, 2))
    assert result.ours_peak_bytes > 0
    assert result.ddp_peak_bytes > 0


def test_two_ranks_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(0, 2), device_of(1, 2), device_of(0, 1)] == [CPU, CPU, torch.device("cuda", 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(0, 1) == CPU, "counted, but CUDA cannot start"


def test_loader_reports_a_rate(tmp_path: Path):
    result = bench_loader(tmp_path, n_tokens=10_000_000, mean_length=500, n_batches=3)
    assert result.corpus_tokens > 9_000_000
    assert result.tokens_per_second > 0
