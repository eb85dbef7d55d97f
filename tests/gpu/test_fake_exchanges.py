"""Ring and Ulysses on fake CUDA tensors, as one of two ranks: the kernels of a GPU, and nothing that the host reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm_lite.apps.bench.fake_cuda import HostWaits, fake_cuda
from internlm_lite.layers.context_parallel import flash_parts
from internlm_lite.layers.context_parallel.exchanges import EXCHANGES
from internlm_lite.layers.context_parallel.flash_parts import FlashParts
from internlm_lite.layers.context_parallel.row import context_row
from internlm_lite.layers.dropout import dropped_weights, token_keys
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group

BOUNDARIES = (0, 3, 90, 128, 128)
GROUP = Group("cp", (0, 1), 1, None)


def _nothing(*arguments: Any) -> comm.Work:
    return comm.Work([], GROUP)


@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
@pytest.mark.parametrize(
    ("dtype", "window", "dropout"),
    [(torch.bfloat16, None, 0.0), (torch.bfloat16, 16, 0.0), (torch.float32, None, 0.0), (torch.bfloat16, None, 0.1)],
)
def test_an_exchange_mixes_no_devices_and_reads_nothing(
    exchange: str, dtype: torch.dtype, window: int | None, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "send_and_receive", _nothing)
    monkeypatch.setattr(comm, "all_to_all", _nothing)
    monkeypatch.setattr(flash_parts, "parts_problem", lambda *arguments: "")
    half = dtype == torch.bfloat16 and not dropout
    backend = AttentionBackend.TORCH_VARLEN if half else AttentionBackend.SDPA
    called: list[str] = []
    flash = FlashParts._forward
    monkeypatch.setattr(FlashParts, "_forward", lambda *args: (called.append("flash"), flash(*args))[1])
    with fake_cuda() as device:
        keys = token_keys(1, 0, torch.zeros(1, dtype=torch.int64, device=device), BOUNDARIES[-1])[0]
        shapes = [(64, heads, 32) for heads in (8, 2, 2, 8)]
        q, k, v, grad = (torch.zeros(*shape, dtype=dtype, device=device) for shape in shapes)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with HostWaits() as waits:
            row = context_row(BOUNDARIES, {window: 1}, 2, 1, device)
            attend = EXCHANGES[exchange](row, GROUP, backend, dropped_weights(dropout, keys, 0) if dropout else None)
            out = attend(AttentionRule(window=window), *leaves)
            found = torch.autograd.grad(out, leaves, grad)
        assert not waits.found
        assert (out.shape, out.dtype, out.device) == (q.shape, dtype, device)
        assert [(x.shape, x.dtype, x.device) for x in found] == [(x.shape, dtype, device) for x in leaves]
    assert bool(called) == (half and exchange == "ring")
