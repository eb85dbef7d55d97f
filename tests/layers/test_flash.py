"""Packed attention: the reference against plain softmax per document, and the choice of a kernel."""

import importlib
import math
import sys
from itertools import pairwise

import pytest
import torch

from internlm_lite.errors import ConfigError
from internlm_lite.layers import flash
from internlm_lite.layers.flash import (
    AttentionBackend,
    choose_backend,
    expected_backend,
    kernel_problem,
    packed,
    packed_sdpa,
)
from internlm_lite.layers.scores import AttentionRule
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


PLAIN = AttentionRule()


def attend(boundaries, q, k, v, backend=AttentionBackend.SDPA):
    longest = max(b - a for a, b in pairwise(boundaries))
    return packed(backend, torch.tensor(boundaries, dtype=torch.int32), tuple(boundaries), longest)(PLAIN, q, k, v)


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


def by_value(bounds, rule, q, k, v):
    """A varlen kernel for the CPU: reads the boundaries that it is given."""
    for most in (bounds.most_queries, bounds.most_keys):
        assert type(most) is int, "flash-attn 4 compiles again for every tensor that it is given as a length"
    boundaries = bounds.queries.tolist()
    assert boundaries == bounds.keys.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == len(q) and all(a < b for a, b in pairwise(boundaries))
    return packed(AttentionBackend.SDPA, bounds.queries, tuple(boundaries), bounds.most_queries)(rule, q, k, v)


def random_boundaries(generator, tokens=96):
    """Many short documents, documents of 32 and 48 tokens alone and side by side, and padding."""
    lengths = []
    while sum(lengths) < tokens:
        lengths.append([1, 2, 5, 32, 32, 48][int(torch.randint(6, (), generator=generator))])
    ends = torch.tensor(lengths).cumsum(0).clamp(max=tokens).tolist()
    return [0, *ends, *[tokens] * int(torch.randint(3, (), generator=generator))]


def test_long_and_short_documents_of_a_row_take_different_kernels(monkeypatch: pytest.MonkeyPatch):
    dense = []

    def causal(rule, q, k, v, docs):
        dense.append((docs.count, docs.length))
        return flash.attend_within(rule, q, k, v, docs)

    monkeypatch.setattr(flash, "LONG", 32)
    monkeypatch.setattr(flash, "TILE", 16)
    monkeypatch.setattr(flash, "_by_cudnn", causal)
    monkeypatch.setattr(flash, "_torch_varlen", by_value)
    generator = torch.Generator().manual_seed(0)
    for boundaries in ([0, 96], [0, 32, 64, 96], [0, 1, 2, 96, 96], *(random_boundaries(generator) for _ in range(20))):
        q, k, v = heads(96, 2)
        weights = torch.randn(96, 4, 8, generator=generator, dtype=torch.float64)
        dense.clear()
        sides = []
        for backend in (AttentionBackend.CUDNN, AttentionBackend.SDPA):
            y = attend(boundaries, q, k, v, backend)
            sides.append([y, *torch.autograd.grad((y * weights).sum(), (q, k, v))])
        for ours, reference in zip(*sides, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)
        lengths = [b - a for a, b in pairwise(boundaries)]
        long = [length for length in lengths if length >= 32 and length % 16 == 0]
        assert [length for count, length in dense for _ in range(count)] == long, boundaries


def test_cudnn_gets_no_tail_of_a_tile():
    """Its backward pass has made NaNs where the last tile of keys is half full, and of single queries."""
    assert [n for n in (1, 64, 704, 2048, 2049, 2112, 4096) if flash._suits_cudnn(n)] == [2048, 4096]


PACKAGES = {
    AttentionBackend.FLASH_ATTN: ["flash_attn/__init__.py"],
    AttentionBackend.FLASH_ATTN_3: ["flash_attn_interface.py"],
    AttentionBackend.FLASH_ATTN_4: ["flash_attn/__init__.py", "flash_attn/cute/__init__.py"],
}
KERNEL = """
from itertools import pairwise
import torch
from internlm_lite.layers.flash import packed_sdpa
from internlm_lite.layers.scores import AttentionRule
calls, options = [], []
def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                           causal=False, deterministic=False, **more):
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and causal
    options.append(more)
    left, right = more.get("window_size", (-1, 0))
    assert right == 0
    rule = AttentionRule(0, left + 1 or None, more.get("softcap"), more.get("softmax_scale"))
    calls.append((cu_seqlens_q.tolist(), max_seqlen_q, deterministic))
    return {result}
"""
RIGHT = "packed_sdpa(tuple(cu_seqlens_q.tolist()))(rule, q, k, v)"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(backend, result): that flash-attn is installed, whose kernel returns `result`."""
    ours = [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(backend, result=RIGHT):
        for name in PACKAGES[backend]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")
        (tmp_path / PACKAGES[backend][-1]).write_text(KERNEL.format(result=result))
        importlib.invalidate_caches()

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]


@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("result", [RIGHT, f"({RIGHT}, None)"], ids=["output", "output and statistics"])
def test_packages_are_called_alike(backend, result, package):
    package(backend, result)
    q, k, v = heads(24, 2)
    boundaries = [0, 5, 10, 24, 24, 24]  # kernels have hung at documents without tokens
    assert torch.equal(attend(boundaries, q, k, v, backend), attend(boundaries, q, k, v))
    torch.use_deterministic_algorithms(True)
    try:
        attend(boundaries, q, k, v, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    calls = sys.modules[flash.NEEDS[backend].module].calls
    assert calls == [([0, 5, 10, 24], 14, False), ([0, 5, 10, 24], 14, True)]


RULES = {
    "window": (AttentionRule(2, window=6), {"window_size": (5, 0)}),
    "cap": (AttentionRule(2, softcap=0.5), {"softcap": 0.5}),
    "scale": (AttentionRule(2, scale=0.9), {"softmax_scale": 0.9}),
    "all": (AttentionRule(2, 3, 0.5, 0.9), {"window_size": (2, 0), "softcap": 0.5, "softmax_scale": 0.9}),
}


@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_are_given_the_rule_of_each_layer(backend, package):
    package(backend)
    q, k, v = heads(24, 2)
    kernel = packed(backend, torch.tensor([0, 5, 10, 24], dtype=torch.int32), (0, 5, 10, 24), 14)
    for rule in [PLAIN, *(rule for rule, _ in RULES.values())]:
        assert torch.equal(kernel(rule, q, k, v), packed_sdpa((0, 5, 10, 24))(rule, q, k, v))
    options = sys.modules[flash.NEEDS[backend].module].options
    assert options == [{}, *(expected for _, expected in RULES.values())]


def test_torchs_varlen_kernel_is_given_windows_and_scales(monkeypatch):
    given = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        given.append((scale, window_size))
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    q, k, v = heads(24, 2)
    kernel = packed(AttentionBackend.TORCH_VARLEN, torch.tensor([0, 24], dtype=torch.int32), (0, 24), 24)
    for rule in (PLAIN, AttentionRule(window=6), AttentionRule(scale=0.9), AttentionRule(0, 1, None, 0.5)):
        kernel(rule, q, k, v)
    assert given == [(None, (-1, 0)), (None, (5, 0)), (0.9, (-1, 0)), (0.5, (0, 0))]


def test_an_older_torch_has_no_windows_in_its_varlen_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, is_causal=False: q)
    cuda = torch.device("cuda")
    for key, option in (("sliding_window", "window_size"), ("attention_scale", "scale")):
        config = small_config(dtype="torch.bfloat16", hidden_size=512, attention="torch_varlen", **{key: 5})
        with pytest.raises(ConfigError, match=f"newer torch for model.{key}: varlen_attn has no {option}"):
            choose_backend(config, cuda)
        assert choose_backend(config, cuda, strict=False) is AttentionBackend.SDPA


@pytest.mark.parametrize(
    ("model", "found", "logged"),
    [
        ({"sliding_window": 5}, AttentionBackend.TORCH_VARLEN, 0),
        ({"sliding_window": 5, "attention_scale": 0.2}, AttentionBackend.TORCH_VARLEN, 0),
        ({"attention_scale": 0.2}, AttentionBackend.CUDNN, 0),
        ({"attention_softcap": 5.0}, AttentionBackend.SDPA, 1),
    ],
)
def test_auto_takes_a_kernel_that_has_what_the_model_asks_for(model, found, logged, monkeypatch, caplog, package):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = small_config(dtype="torch.bfloat16", hidden_size=512, **model)
    assert choose_backend(config, torch.device("cuda")) is found
    assert flash.expected_backend(config, deterministic=False) is found
    assert len(caplog.records) == logged
    package(AttentionBackend.FLASH_ATTN_3)
    assert choose_backend(config, torch.device("cuda")) is AttentionBackend.FLASH_ATTN_3
    assert len(caplog.records) == logged


def test_rows_whose_offsets_leave_32_bits_are_refused(package):
    package(AttentionBackend.FLASH_ATTN_4)
    q = torch.empty(2**17, 128, 128, device="meta")
    with pytest.raises(ConfigError, match=r"131072 tokens .*lower data.micro_bsz, or .*torch_varlen"):
        attend([0, 2**17], q, q, q, AttentionBackend.FLASH_ATTN_4)
    joined = torch.empty(225_304, 96, 3, 128, device="meta")  # the row fits, its place among keys and values does not
    with pytest.raises(ConfigError, match="lies over 8305606656 numbers"):
        attend([0, len(joined)], *joined.unbind(2), AttentionBackend.FLASH_ATTN_4)


def test_kernels_get_gradients_without_gaps(package):
    package(AttentionBackend.FLASH_ATTN_4)
    mixed = attend([0, 24], *(x.requires_grad_() for x in heads(24, 2)), AttentionBackend.FLASH_ATTN_4)
    seen = []
    mixed.register_hook(lambda grad: seen.append(grad.is_contiguous()))
    mixed.backward(torch.ones_like(mixed).transpose(0, 1).contiguous().transpose(0, 1))
    assert seen == [True]


NOISE = f"{RIGHT} + 0.5 * torch.randn_like(q)"
ORDER = f"{RIGHT} * (1 + 0.008 * len(calls))"


@pytest.mark.parametrize(
    ("result", "deterministic", "problem"),
    [
        (RIGHT, True, ""),
        (NOISE, False, "relative error"),
        (f"{RIGHT} * float('nan')", False, "relative error nan"),
        ("1 / 0", False, None),
        ("torch.ones(3) + torch.ones(2)", False, "RuntimeError"),
        (ORDER, False, ""),
        (ORDER, True, "other gradients each time"),
    ],
)
def test_a_kernel_is_compared_with_the_reference_before_it_is_used(
    result, deterministic, problem, package, monkeypatch
):
    """A release of flash-attn 3 dropped `deterministic` on the way to its backward pass."""
    monkeypatch.setattr(flash, "LONG", 128)
    package(AttentionBackend.FLASH_ATTN_3, result)
    config = small_config(dtype="torch.bfloat16")
    torch.use_deterministic_algorithms(deterministic)
    try:
        if problem is None:
            with pytest.raises(ZeroDivisionError):
                kernel_problem(AttentionBackend.FLASH_ATTN_3, config, torch.device("cpu"))
            return
        found = kernel_problem(AttentionBackend.FLASH_ATTN_3, config, torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert problem in found and bool(found) == bool(problem)


@pytest.mark.parametrize(
    ("model", "forgotten"),
    [
        ({"sliding_window": 4096}, "window=None"),
        ({"sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]}, "window=None"),
        ({"attention_softcap": 50.0}, "softcap=None"),
        ({"attention_scale": 0.7}, "scale=None"),
    ],
    ids=str,
)
def test_a_kernel_that_forgets_an_option_is_found_out(model, forgotten, package, monkeypatch):
    """Scores around 1 tell nothing about a cap of 50, nor documents about a longer window: the check lowers both."""
    monkeypatch.setattr(flash, "LONG", 128)
    config = small_config(dtype="torch.bfloat16", **model)
    package(AttentionBackend.FLASH_ATTN_3, RIGHT)
    assert kernel_problem(AttentionBackend.FLASH_ATTN_3, config, torch.device("cpu")) == ""
    del sys.modules["flash_attn_interface"]
    package(
        AttentionBackend.FLASH_ATTN_3, RIGHT.replace("rule", f"__import__('dataclasses').replace(rule, {forgotten})")
    )
    problem = kernel_problem(AttentionBackend.FLASH_ATTN_3, config, torch.device("cpu"))
    assert problem.startswith("went wrong: relative error")


@pytest.mark.parametrize(
    ("attention", "model", "device", "capability", "refusal"),
    [
        ("flash_attn_3", {}, "cpu", (9, 0), "needs a GPU of compute capability 9.x, found cpu"),
        ("flash_attn_3", {}, "cuda", (10, 0), "needs a GPU of compute capability 9.x, found 10.0"),
        (
            "flash_attn_3",
            {},
            "cuda",
            (9, 0),
            "needs flash_attn_interface, which is not installed: build the folder hopper",
        ),
        ("flash_attn_4", {}, "cuda", (9, 0), "needs flash_attn.cute, which is not installed: pip install flash-attn-4"),
        ("flash_attn_4", {"hidden_size": 320}, "cuda", (9, 0), ".*to be a multiple of 32 up to 128, found 40"),
        ("flash_attn", {"dtype": "torch.float32"}, "cuda", (9, 0), "needs model.dtype torch.bfloat16 or torch.float16"),
        ("torch_varlen", {}, "cuda", (7, 5), "needs a GPU of compute capability 8.x or 9.x .* found 7.5"),
        ("cudnn", {"hidden_size": 2048}, "cuda", (9, 0), ".*to be a multiple of 8 up to 128, found 256"),
        (
            "cudnn",
            {"sliding_window": 9},
            "cuda",
            (9, 0),
            "needs model.sliding_window=None, found 9: its kernel does not",
        ),
        ("cudnn", {"attention_softcap": 9}, "cuda", (9, 0), "needs model.attention_softcap=None, found 9.0: "),
        ("torch_varlen", {"attention_softcap": 9.0}, "cuda", (9, 0), "needs model.attention_softcap=None, found 9.0: "),
        ("torch_varlen", {"attention_dropout": 0.1}, "cuda", (9, 0), "drops attention weights by numbers of its own,"),
    ],
)
def test_a_named_kernel_that_cannot_run_is_refused(attention, model, device, capability, refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = small_config(**{"dtype": "torch.bfloat16", "hidden_size": 512, **model}, attention=attention)
    with pytest.raises(ConfigError, match=f"model.attention='{attention}' {refusal}"):
        choose_backend(config, torch.device(device))
    assert choose_backend(config, torch.device(device), strict=False) is not None


def test_no_kernel_drops_weights(package, monkeypatch, caplog):
    """And the log says what that costs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    package(AttentionBackend.FLASH_ATTN_3)
    config, cuda = small_config(dtype="torch.bfloat16", hidden_size=512, attention_dropout=0.1), torch.device("cuda")
    assert choose_backend(config, cuda) is AttentionBackend.SDPA
    assert expected_backend(config, deterministic=False) is AttentionBackend.SDPA
    assert "every kernel drops attention weights by numbers of its own" in caplog.text and "slower" in caplog.text
    assert choose_backend(config.model_copy(update={"attention_dropout": 0.0}), cuda) is AttentionBackend.FLASH_ATTN_3


def test_what_auto_takes(package, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    assert choose(torch.bfloat16, cuda) is AttentionBackend.CUDNN
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(torch.bfloat16, cuda) is AttentionBackend.TORCH_VARLEN, "cuDNN adds in any order"
    finally:
        torch.use_deterministic_algorithms(False)
    package(AttentionBackend.FLASH_ATTN_4)
    assert choose(torch.bfloat16, cuda) is AttentionBackend.FLASH_ATTN_4
    package(AttentionBackend.FLASH_ATTN_3)
    assert choose(torch.bfloat16, cuda) is AttentionBackend.FLASH_ATTN_3
    with monkeypatch.context() as patch:  # on a GPU that gives wrong results, the next one
        patch.setattr(torch.cuda, "is_available", lambda: True)
        problems = {AttentionBackend.FLASH_ATTN_3: "went wrong: relative error 3e-1"}
        patch.setattr(flash, "kernel_problem", lambda backend, config, device: problems.get(backend, ""))
        assert choose(torch.bfloat16, cuda) is AttentionBackend.FLASH_ATTN_4


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen kernels need a GPU"),
]


@pytest.mark.parametrize("backend", [pytest.param(backend, marks=GPU, id=backend.name) for backend in flash.NEEDS])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "rule", [{}, {"sliding_window": 300}, {"attention_softcap": 5.0}, {"attention_scale": 0.2}], ids=str
)
def test_kernels_equal_the_reference_on_a_gpu(backend, kv_heads, head_dim, rule):
    device, heads = torch.device("cuda"), {"hidden_size": 8 * head_dim, "num_kv_attention_heads": kv_heads}
    config = small_config(dtype="torch.bfloat16", **heads, **rule)
    if missing := flash.unmet(backend, config, device):
        pytest.skip(f"{backend.name} {missing}")
    assert kernel_problem(backend, config, device) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen kernels need a GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_chosen_kernel_equals_the_reference_on_a_gpu(kv_heads):
    device = torch.device("cuda")
    q, k, v = (x.detach().repeat(1, 1, 8).to(device).requires_grad_() for x in heads(24, kv_heads, torch.bfloat16))
    boundaries = [0, 5, 10, 24, 24]
    backend = choose(torch.bfloat16, device)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    ours = packed(backend, cu_seqlens, tuple(boundaries), 14)(PLAIN, q, k, v)
    expected = packed(AttentionBackend.SDPA, cu_seqlens, tuple(boundaries), 14)(PLAIN, q, k, v)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.03)
    grads = torch.autograd.grad(ours.sum(), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.1)
