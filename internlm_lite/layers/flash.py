"""Packed attention. The kernel is chosen once, when the model is built (model.attention):

    flash_attn_3   varlen kernel of flash-attn 3                       Hopper
    flash_attn_4   varlen kernel of flash-attn 4                       Hopper, Blackwell
    flash_attn     varlen kernel of flash-attn 2                       half precision on CUDA
    cudnn          cuDNN's kernel over long documents, torch's varlen  half precision on Hopper and Blackwell
                   kernel over the short ones between them
    torch_varlen   torch.nn.attention.varlen                           half precision on CUDA
    sdpa           the reference, one call per document, in which      every device and dtype
                   layers/scores.py takes the place of SDPA where a
                   rule has what that lacks

All take a row of T packed tokens and its document boundaries; no token attends to another document. Keys may be those
of another row with as many documents (`packed_across`). Whether a layer is causal, its window, soft cap and scale come
with each call. A kernel is compared with the reference on the rank's GPU, by the rules of
the model, before it is used: all but torch's varlen kernel without windows and scales.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from internlm_lite.config.schema import UNKNOWN_TO_KERNELS, ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.scores import (
    AttentionRule,
    Drop,
    EqualDocuments,
    across_rule,
    attend_in_blocks,
    attention_rule,
)
from internlm_lite.runtime.device import torch_dtype

logger = logging.getLogger("internlm_lite")

Attend = Callable[[AttentionRule, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rule of the layer, q [T, H, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, H, D]; q, k are rotated, v may be strided."""

Dense = Callable[..., torch.Tensor]
"""(rule, q, k, v, docs): `Attend` of documents of one length."""
LONG = 2048
"""Documents of so many tokens are worth a call of their own to cuDNN's kernel: on an H100 four of 2048 tokens take
0.79 ms where the varlen kernel takes 1.42 (docs/benchmarks), and a call costs the host 0.2 ms."""
TILE = 128
"""Lengths that are no multiple of this end inside a tile of keys; cuDNN's backward pass has made NaNs of such tails."""


KERNEL_LIMIT = 2e-2
"""Of a kernel's relative error in half precision."""
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionBackend(enum.Enum):
    """Attention kernels; the value is the name that the log shows."""

    FLASH_ATTN_3 = "flash-attn 3"
    FLASH_ATTN_4 = "flash-attn 4"
    FLASH_ATTN = "flash-attn"
    CUDNN = "cuDNN and torch.nn.attention.varlen"
    TORCH_VARLEN = "torch.nn.attention.varlen"
    SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Needs:
    """What a kernel runs on, forward and backward, in half precision."""

    majors: tuple[int, ...]
    """Compute capabilities, by their first number."""
    head_dim: int = 256
    """Largest."""
    multiple: int = 8
    """Of which head_dim must be."""
    repeats: bool = True
    """Its backward pass can give the same bits each time."""
    module: str = ""
    """The package with its `flash_attn_varlen_func`."""
    install: str = ""


_NO_DROPOUT = "drops attention weights by numbers of its own, which no other layout or start repeats"
REPEATS = 10
"""Backward passes whose bits are compared."""
AMPERE_AND_LATER = (8, 9, 10, 11, 12)
NEEDS = {
    AttentionBackend.FLASH_ATTN_3: Needs(
        (9,), module="flash_attn_interface", install="build the folder hopper of github.com/Dao-AILab/flash-attention"
    ),
    AttentionBackend.FLASH_ATTN_4: Needs(
        (9, 10), 128, 32, module="flash_attn.cute", install="pip install flash-attn-4"
    ),
    AttentionBackend.CUDNN: Needs((9, 10), 128, repeats=False),
    AttentionBackend.FLASH_ATTN: Needs(AMPERE_AND_LATER, module="flash_attn", install="pip install flash-attn"),
    AttentionBackend.TORCH_VARLEN: Needs(AMPERE_AND_LATER),
}
"""In the order in which "auto" tries them."""


def choose_backend(config: ModelConfig, device: torch.device, *, strict: bool = True) -> AttentionBackend:
    """The backend of model.attention. "auto": the first of `NEEDS` that fits this model and device, else SDPA.

    Raises ConfigError for a named kernel that does not fit; takes "auto" instead unless `strict`.
    """
    wanted = config.attention if config.use_flash_attn else "sdpa"
    if wanted != "auto":
        backend = AttentionBackend[wanted.upper()]
        refusal = _refusal(backend, config, device)
        if not refusal:
            return backend
        if strict:
            raise ConfigError(f"model.attention='{wanted}' {refusal}; or set model.attention='auto'")
    for backend in NEEDS:
        refusal = _refusal(backend, config, device)
        if not refusal:
            return backend
        if "went wrong" in refusal:
            logger.warning(f"attention: {backend.value} {refusal}; another kernel is used")
    if config.attention_dropout and device.type == "cuda":
        logger.warning(f"attention: every kernel {_NO_DROPOUT}: plain operations take its place, which are slower")
    elif config.attention_softcap is not None and device.type == "cuda":
        logger.warning(
            "attention: no kernel here has model.attention_softcap: scores are computed block by block, exactly but "
            "slowly; flash-attn has it, in half precision"
        )
    return AttentionBackend.SDPA


def expected_backend(config: ModelConfig, *, deterministic: bool) -> AttentionBackend:
    """What an H100 without flash-attn takes, for a plan; of a named kernel, whether or not it is installed."""
    wanted = config.attention if config.use_flash_attn else "sdpa"
    if wanted != "auto":
        return AttentionBackend[wanted.upper()]
    for backend in (AttentionBackend.CUDNN, AttentionBackend.TORCH_VARLEN):
        if not unfit(backend, config) and (NEEDS[backend].repeats or not deterministic):
            return backend
    return AttentionBackend.SDPA


def _refusal(backend: AttentionBackend, config: ModelConfig, device: torch.device) -> str:
    """Why `backend` cannot run this model on `device`, or must not; empty: it can."""
    plain = config.sliding_window is None and config.attention_scale is None and not config.num_encoder_layers
    own = backend is AttentionBackend.SDPA or (backend is AttentionBackend.TORCH_VARLEN and plain)
    tried = torch.cuda.is_available() and not own
    return unmet(backend, config, device) or (kernel_problem(backend, config, device) if tried else "")


def unmet(backend: AttentionBackend, config: ModelConfig, device: torch.device) -> str:
    """What `backend` needs for this model and lacks on `device`; empty: nothing."""
    needs = NEEDS.get(backend)
    if needs is None:
        return ""
    capabilities = " or ".join(f"{major}.x" for major in needs.majors)
    if device.type != "cuda":
        return f"needs a GPU of compute capability {capabilities}, found {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in needs.majors:
        return f"needs a GPU of compute capability {capabilities}, found {major}.{minor}"
    if problem := unfit(backend, config):
        return problem
    if torch.are_deterministic_algorithms_enabled() and not needs.repeats:
        return "needs deterministic=False: its backward pass adds in any order"
    return _import_problem(needs) if needs.module else _varlen_problem(config)


def unfit(backend: AttentionBackend, config: ModelConfig) -> str:
    """What `backend` cannot compute of this model, on whatever GPU; empty: nothing."""
    needs = NEEDS[backend]
    if torch_dtype(config.dtype) not in (torch.float16, torch.bfloat16):
        return f"needs model.dtype torch.bfloat16 or torch.float16, found {config.dtype}"
    if config.head_size % needs.multiple or config.head_size > needs.head_dim:
        wanted = f"a multiple of {needs.multiple} up to {needs.head_dim}"
        return f"needs heads to be {wanted}, found {config.head_size}"
    if config.attention_dropout:
        return f"{_NO_DROPOUT}, found model.attention_dropout={config.attention_dropout:g}"
    for key in UNKNOWN_TO_KERNELS.get(backend.name.lower(), ()):
        if (found := getattr(config, key)) is not None:
            return f"needs model.{key}=None, found {found}: its kernel does not have it"
    return ""


def _import_problem(needs: Needs) -> str:
    """Imports the package, because finding it does not show that its build fits this torch."""
    try:
        importlib.import_module(needs.module).flash_attn_varlen_func  # noqa: B018
    except ModuleNotFoundError as error:
        if error.name and needs.module.startswith(error.name):
            return f"needs {needs.module}, which is not installed: {needs.install}"
        return f"went wrong: {needs.module} cannot be imported: {error}; {needs.install}"
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"went wrong: {needs.module} cannot be imported: {error}; {needs.install}"
    return ""


def _varlen_problem(config: ModelConfig) -> str:
    from torch.nn.attention.varlen import varlen_attn

    options = {"sliding_window": "window_size", "attention_scale": "scale"}
    known = inspect.signature(varlen_attn).parameters
    absent = [key for key, option in options.items() if getattr(config, key) is not None and option not in known]
    return f"needs a newer torch for model.{absent[0]}: varlen_attn has no {options[absent[0]]}" if absent else ""


def packed(
    backend: AttentionBackend,
    cu_seqlens: torch.Tensor,
    cu_seqlens_host: tuple[int, ...],
    max_seqlen: int,
    drop: Drop | None = None,
) -> Attend:
    """Attention within each document of one packed row. Does not read the device.

    `cu_seqlens` [n + 1] int32 on the device: 0, document ends ..., T, padded by repeats of T; `cu_seqlens_host`: the
    same on the host, padded or not; `max_seqlen`: at least the longest document's length. See `batch.Batch`.
    `drop`: of the reference alone.
    """
    assert drop is None or backend is AttentionBackend.SDPA, backend
    if backend is AttentionBackend.SDPA:
        return packed_sdpa(cu_seqlens_host, drop)
    last = cu_seqlens_host.index(cu_seqlens_host[-1])  # kernels have failed at documents without tokens
    boundaries, cu_seqlens = cu_seqlens_host[: last + 1], cu_seqlens[: last + 1]
    kernel = varlen_kernel(backend)

    def varlen(run: slice) -> Attend:
        own = cu_seqlens[run]
        own = own - own[0] if run.start else own
        return partial(kernel, Bounds(own, own, max_seqlen, max_seqlen))

    if backend is AttentionBackend.CUDNN:
        return in_runs(boundaries, _suits_cudnn, _by_cudnn, varlen)
    return varlen(slice(0, len(boundaries)))


def _suits_cudnn(length: int) -> bool:
    return length >= LONG and length % TILE == 0


def _by_cudnn(
    rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, docs: EqualDocuments
) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend_within(rule, q, k, v, docs)


@dataclass(frozen=True)
class Borders:
    """Of the documents of one packed row, as `packed` takes them."""

    cu_seqlens: torch.Tensor
    cu_seqlens_host: tuple[int, ...]
    max_seqlen: int


def packed_across(backend: AttentionBackend, queries: Borders, keys: Borders, drop: Drop | None = None) -> Attend:
    """Attention of document i of one packed row to document i of another: the keys' row may have another length. Of the
    documents the last may be empty in one of them: without keys a query gets zeros. Does not read the device."""
    assert len(queries.cu_seqlens_host) == len(keys.cu_seqlens_host), "documents come in pairs"
    if backend is AttentionBackend.SDPA:
        return _across_sdpa(queries.cu_seqlens_host, keys.cu_seqlens_host, drop)
    ends = list(zip(queries.cu_seqlens_host, keys.cu_seqlens_host, strict=True))
    count = sum(start[0] < stop[0] and start[1] < stop[1] for start, stop in pairwise(ends))
    bounds = Bounds(queries.cu_seqlens[: count + 1], keys.cu_seqlens[: count + 1], queries.max_seqlen, keys.max_seqlen)
    kernel, (q_end, k_end) = varlen_kernel(backend), ends[count]

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mixed = kernel(bounds, rule, q[:q_end], k[:k_end], v[:k_end])
        return mixed if q_end == len(q) else torch.cat((mixed, torch.zeros_like(q[q_end:])))

    return attend


def _across_sdpa(queries: tuple[int, ...], keys: tuple[int, ...], drop: Drop | None) -> Attend:
    """One call for neighbours of one length on both sides."""
    lengths = [(q[1] - q[0], k[1] - k[0]) for q, k in zip(pairwise(queries), pairwise(keys), strict=True)]
    calls: list[tuple[EqualDocuments, tuple[int, int]]] = []
    start = 0
    for (n_queries, n_keys), group in groupby(lengths):
        count = len(list(group))
        docs = EqualDocuments(count, n_queries, start, before=n_keys - n_queries)
        calls.append((docs, (count * n_queries, count * n_keys)))
        start += count * n_queries
    sizes = [[size[side] for _, size in calls] for side in (0, 1, 1)]

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(calls, *(x.split(of) for x, of in zip((q, k, v), sizes, strict=True)), strict=True)
        mixed = [
            attend_within(rule, q, k, v, docs, drop) if min(size) else torch.zeros_like(q)
            for (docs, size), q, k, v in parts
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    return attend


@dataclass(frozen=True)
class Bounds:
    """Where the queries and the keys of each sequence begin and end, in one call of a kernel. The last query of a
    causal sequence sees all of its keys, each one before it one key less."""

    queries: torch.Tensor
    """[n + 1] int32 on the device, from 0; no sequence without tokens."""
    keys: torch.Tensor
    most_queries: int
    """At least those of the longest sequence."""
    most_keys: int


def varlen_kernel(backend: AttentionBackend) -> Callable[..., torch.Tensor]:
    """(bounds, rule, q, k, v) -> as q, of a backend that has a kernel."""
    module = NEEDS[backend].module
    return partial(_flash_attn, module) if module else _torch_varlen


def _flash_attn(
    module: str,
    bounds: Bounds,
    rule: AttentionRule,
    *qkv: torch.Tensor,
) -> torch.Tensor:
    """A flash-attn package's kernel; its versions 2 to 4 name these arguments alike."""
    q = qkv[0]
    reach = max(x.shape[0] * x.stride(0) for x in qkv)  # a view of all heads' projections reaches further than it has
    if reach >= 2**31:
        raise ConfigError(
            f"a row of {q.shape[0]} tokens with {q.shape[1]} heads of {q.shape[2]} lies over {reach} numbers, and the "
            "kernels of flash-attn count in 32 bits: lower data.micro_bsz, or set model.attention='torch_varlen'"
        )
    options: dict[str, object] = {}
    if rule.window is not None:
        options["window_size"] = (rule.window - 1, 0 if rule.causal else rule.window - 1)
    if rule.softcap is not None:
        options["softcap"] = rule.softcap
    if rule.scale is not None:
        options["softmax_scale"] = rule.scale
    out = importlib.import_module(module).flash_attn_varlen_func(
        *qkv,
        cu_seqlens_q=bounds.queries,
        cu_seqlens_k=bounds.keys,
        max_seqlen_q=bounds.most_queries,
        max_seqlen_k=bounds.most_keys,
        causal=rule.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )
    mixed: torch.Tensor = out[0] if isinstance(out, tuple) else out  # some releases also return the log-sum-exp
    if mixed.requires_grad:
        mixed.register_hook(torch.Tensor.contiguous)  # the backward pass counts the gradient's places in 32 bits, too
    return mixed


def _torch_varlen(
    bounds: Bounds, rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    kernel: Callable[..., Any] = varlen_attn
    # torch releases name the causal and the grouped-query options differently.
    known = inspect.signature(varlen_attn).parameters
    left = -1 if rule.window is None else rule.window - 1
    options: dict[str, object] = {"is_causal": rule.causal}
    if "window_size" in known:
        options = {"window_size": (left, 0 if rule.causal else left)}
    if rule.scale is not None:
        options["scale"] = rule.scale
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return kernel(q, k, v, bounds.queries, bounds.keys, bounds.most_queries, bounds.most_keys, **options)


def packed_sdpa(boundaries: tuple[int, ...], drop: Drop | None = None) -> Attend:
    """The reference: scaled_dot_product_attention on each document. `boundaries`: 0, document ends ..., T.

    No mask over the row, so the work is the sum of the squared lengths, not T^2. Runs on every device and dtype.
    """
    return in_runs(boundaries, lambda length: True, partial(attend_within, drop=drop), _no_varlen)


def _no_varlen(run: slice) -> Attend:
    raise AssertionError("every document has a call of its own")


def in_runs(
    boundaries: tuple[int, ...], alone: Callable[[int], bool], dense: Dense, varlen: Callable[[slice], Attend]
) -> Attend:
    """Attention in the calls that suit the documents' lengths.

    row:   [ 0 . . . | 1 . . . | 2 . | 3 . . ]   neighbours of one length that is to be called `alone` share a call,
             dense(count 2)    |  varlen         other neighbours another: varlen(the slice of their boundaries)
    """
    documents = [(n, length) for n, (start, stop) in enumerate(pairwise(boundaries)) if (length := stop - start)]
    calls: list[Attend] = []
    sizes = []
    for length, group in groupby(documents, key=lambda document: document[1] if alone(document[1]) else 0):
        numbers = [number for number, _ in group]
        run = slice(numbers[0], numbers[-1] + 2)
        docs = EqualDocuments(len(numbers), length, boundaries[run.start])
        calls.append(partial(dense, docs=docs) if length else varlen(run))
        sizes.append(boundaries[run][-1] - boundaries[run.start])

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(calls) == 1:
            return calls[0](rule, q, k, v)
        # One split instead of slices, because its backward pass is one concatenation.
        parts = zip(calls, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return torch.cat([call(rule, q, k, v) for call, q, k, v in parts])

    return attend


def attend_within(
    rule: AttentionRule,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    docs: EqualDocuments,
    drop: Drop | None = None,
) -> torch.Tensor:
    """Attention within each of `docs`; q [count * length, heads, head_dim], k, v [count * (before + length), ...]."""
    reaches_all = rule.window is None or docs.length <= rule.window
    if rule.causal:  # is_causal would align first query and first key
        reaches_all = reaches_all and not docs.before
    if rule.softcap is not None or drop is not None or not reaches_all:
        return attend_in_blocks(rule, q, k, v, docs, drop)
    q, k, v = (x.unflatten(0, (docs.count, -1)).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype.itemsize > 2:  # grouped heads would take the kernel that stores all scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    tail = docs.length % TILE or docs.before % TILE
    with sdpa_kernel(WITHOUT_CUDNN) if q.is_cuda and tail else nullcontext():
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=rule.causal, scale=rule.scale, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(0, 1)


def kernel_problem(backend: AttentionBackend, config: ModelConfig, device: torch.device) -> str:
    """What is wrong with the kernel for this model on this device; empty: nothing. It is compared with the reference in
    float32, forward and backward, by each rule of the model; with deterministic algorithms its gradients must repeat
    bit by bit."""
    rules = [attention_rule(config, layer) for layer in range(config.num_blocks)]
    if config.num_encoder_layers:
        rules.append(across_rule(config, layer=0))
    try:
        problems = (_difference(backend, rule, config, device) for rule in dict.fromkeys(map(_tested, rules)))
        return next((f"went wrong: {problem}" for problem in problems if problem), "")
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        return f"went wrong: {type(error).__name__}: {str(error)[:300]}"


def _tested(rule: AttentionRule) -> AttentionRule:
    """`rule` with values that matter for scores around 1 in documents of LONG tokens: a kernel that does not know an
    option must not pass because it hardly changes anything."""
    window = None if rule.window is None else min(rule.window, LONG // 3)
    return replace(rule, layer=0, window=window, softcap=None if rule.softcap is None else min(rule.softcap, 1.0))


def _difference(backend: AttentionBackend, rule: AttentionRule, config: ModelConfig, device: torch.device) -> str:
    boundaries = (0, 1, 130, 130 + LONG, 130 + 2 * LONG, 200 + 2 * LONG, 900 + 2 * LONG)
    generator = torch.Generator(device).manual_seed(0)
    groups = config.num_attention_heads // config.kv_heads
    inputs = [
        torch.randn(boundaries[-1], heads, config.head_size, generator=generator, device=device)
        for heads in (2 * groups, 2, 2, 2 * groups)
    ]
    both = backend, AttentionBackend.SDPA
    attend, reference = (partial(_tried(one, boundaries, device, rule), rule) for one in both)
    dtype = torch_dtype(config.dtype)
    found = with_gradients(attend, inputs, dtype)
    expected = with_gradients(reference, [x.to(dtype).float() for x in inputs], torch.float32)
    pairs = zip(found, expected, strict=True)
    for error in [((ours.float() - right).norm() / right.norm()).item() for ours, right in pairs]:
        if not error < KERNEL_LIMIT:
            return f"relative error {error:.1e} against the reference, expected at most {KERNEL_LIMIT}"
    if torch.are_deterministic_algorithms_enabled():
        for _ in range(REPEATS):
            if not all(map(torch.equal, found, with_gradients(attend, inputs, dtype))):
                return "with deterministic=True it gives other gradients each time"
    return ""


def _tried(backend: AttentionBackend, boundaries: tuple[int, ...], device: torch.device, rule: AttentionRule) -> Attend:
    """Attention within documents and, where a rule sees a whole document, the same plus attention of each document to
    one of another length, as if of a source."""
    ends = torch.tensor(boundaries, dtype=torch.int32, device=device)
    inside = packed(backend, ends, boundaries, LONG)
    if rule.causal or rule.window is not None:
        return inside
    others = tuple(boundaries[-1] - end for end in reversed(boundaries))
    keys = Borders(torch.tensor(others, dtype=torch.int32, device=device), others, LONG)
    across = packed_across(backend, Borders(ends, boundaries, LONG), keys)
    return lambda *arguments: inside(*arguments) + across(*arguments)


def with_gradients(
    attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """[output, gradients of q, k and v] of `inputs`: q, k, v and the gradient of the output."""
    q, k, v, weight = (x.to(dtype, copy=True) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]
