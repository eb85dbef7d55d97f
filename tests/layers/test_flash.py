"""Packed attention: the reference against plain softmax per document, and the choice of a kernel."""

import math
import sys
from itertools import pairwise

import pytest
import torch

from internlm_lite.layers.flash import AttentionBackend, choose_backend, packed
from tests.models.small import small_config


def plain(q, k, v):
    """softmax(q k^T / sqrt(D)) v of one document, [T, H, D], written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(dim=-1), v)


def heads(n_tokens, kv_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((n_tokens, 4, 8), (n_tokens, kv_heads, 8), (n_tokens, kv_heads, 8))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def choose(dtype, device, head_dim=64, use_flash_attn=True):
    config = small_config(dtype=str(dtype), hidden_size=8 * head_dim, use_flash_attn=use_flash_attn)
    return choose_backend(config, device)


def attend(boundaries, q, k, v, backend=AttentionBackend.SDPA):
    longest = max(b - a for a, b in pairwise(boundaries))
    return packed(backend, torch.tensor(boundaries, dtype=torch.int32), tuple(boundaries), longest)(0, q, k, v)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "boundaries", [[0, 24], [0, 8, 16, 24], [0, 5, 10, 11, 12, 24], [0, 23, 24, 24, 24], [0, 1, 24]]
)
def test_packed_equals_each_document_alone(boundaries, kv_heads):
    q, k, v = heads(24, kv_heads)
    ours = attend(boundaries, q, k, v)
    parts = [slice(a, b) for a, b in pairwise(boundaries)]
    expected = torch.cat([plain(q[part], k[part], v[part]) for part in parts])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    weights = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_close(dtype):
    q, k, v = heads(24, 2, dtype)
    ours = attend([0, 5, 10, 24], q, k, v)
    ours.sum().backward()
    assert ours.dtype == dtype and q.grad.isfinite().all()
    expected = attend([0, 5, 10, 24], *(x.detach().double() for x in (q, k, v)))
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_nothing_is_seen_across_a_border_or_ahead():
    q, k, v = (x.detach() for x in heads(24, 2))
    before = attend([0, 10, 24], q, k, v)
    k[:10], v[:10] = 1e3, -1e3
    k[20:], v[20:] = 1e3, -1e3
    after = attend([0, 10, 24], q, k, v)
    assert torch.equal(before[10:20], after[10:20])
    assert not torch.equal(before[:10], after[:10])


def test_kernels_are_chosen_only_where_they_run(monkeypatch: pytest.MonkeyPatch):
    for dtype in (torch.bfloat16, torch.float64):
        assert choose(dtype, torch.device("cpu")) is AttentionBackend.SDPA
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert choose(torch.bfloat16, cuda) is AttentionBackend.SDPA
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose(torch.bfloat16, cuda, head_dim=36) is AttentionBackend.SDPA
    assert choose(torch.bfloat16, cuda, head_dim=512) is AttentionBackend.SDPA
    assert choose(torch.float32, cuda) is AttentionBackend.SDPA
    assert choose(torch.bfloat16, cuda, use_flash_attn=False) is AttentionBackend.SDPA
    assert choose(torch.bfloat16, cuda) is not AttentionBackend.SDPA


@pytest.mark.parametrize(
    ("content", "found", "logged"),
    [
        ({"__init__.py": "def flash_attn_varlen_func(): ..."}, AttentionBackend.FLASH_ATTN, None),
        ({"__init__.py": "raise ImportError('undefined symbol')"}, AttentionBackend.TORCH_VARLEN, "undefined symbol"),
        ({"notes.txt": ""}, AttentionBackend.TORCH_VARLEN, "flash_attn_varlen_func"),
        ({}, AttentionBackend.TORCH_VARLEN, None),
    ],
    ids=["there", "of another torch", "a folder without a package", "not there"],
)
def test_flash_attn_is_chosen_where_it_can_be_imported(content, found, logged, tmp_path, monkeypatch, caplog):
    for name, text in content.items():
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / name).write_text(text)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "flash_attn", raising=False)
        assert choose(torch.bfloat16, torch.device("cuda")) is found
        sys.modules.pop("flash_attn", None)
    assert [
        record.getMessage() for record in caplog.records if logged is None or logged not in record.getMessage()
    ] == []
    assert len(caplog.records) == (logged is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen kernels need a GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_chosen_kernel_equals_the_reference_on_a_gpu(kv_heads):
    device = torch.device("cuda")
    q, k, v = (x.detach().repeat(1, 1, 8).to(device).requires_grad_() for x in heads(24, kv_heads, torch.bfloat16))
    boundaries = [0, 5, 10, 24, 24]
    backend = choose(torch.bfloat16, device)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    ours = packed(backend, cu_seqlens, tuple(boundaries), 14)(0, q, k, v)
    expected = packed(AttentionBackend.SDPA, cu_seqlens, tuple(boundaries), 14)(0, q, k, v)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.03)
    grads = torch.autograd.grad(ours.sum(), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.1)
