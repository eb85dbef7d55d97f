"""What a rank keeps in memory from a forward pass until its backward pass, component by component, in bytes.

    T tokens of a micro-batch     t = T, or T / tp outside attention and MLP with sequence parallelism
    h hidden, D features of a head      of this rank: H query heads, K key/value heads, f SwiGLU width, V vocabulary
    s bytes of an element of the model, w bytes of one in which sums are taken (fp32, or fp64 for fp64 models)

Counted are the tensors that autograd saves, each storage once, as the layers of this package save them. Scalars, the
batch itself and the allocator's rounding are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internlm_lite.apps.planner.holdings import StageShare
from internlm_lite.config.schema import Config, ModelConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.loss import tokens_per_chunk
from internlm_lite.layers.placement import accumulation_dtype
from internlm_lite.runtime.device import torch_dtype

Terms = dict[str, int]
"""Bytes by component."""


@dataclass(frozen=True)
class Shape:
    """The letters of the formulas, for one rank."""

    T: int
    t: int
    h: int
    H: int
    K: int
    D: int
    f: int
    V: int
    s: int
    w: int
    vocab_size: int
    tp: int
    by_sequence: bool
    device: str
    """"cuda" or "cpu": a few kernels save other things."""
    backend: AttentionBackend
    model: ModelConfig


def shape_of(config: Config, backend: AttentionBackend, device: str) -> Shape:
    model, tp = config.model, config.parallel.tensor
    dtype = torch_dtype(model.dtype)
    tokens = config.data.micro_bsz * config.data.seq_len
    by_sequence = config.parallel.sequence_parallel and tp > 1
    return Shape(
        T=tokens,
        t=tokens // tp if by_sequence else tokens,
        h=model.hidden_size,
        H=model.num_attention_heads // tp,
        K=model.kv_heads // tp,
        D=model.head_dim,
        f=model.mlp_hidden_size // tp,
        V=model.vocab_size // tp,
        s=dtype.itemsize,
        w=accumulation_dtype(dtype).itemsize,
        vocab_size=model.vocab_size,
        tp=tp,
        by_sequence=by_sequence,
        device=device,
        backend=backend,
        model=model,
    )


def layer_terms(x: Shape) -> Terms:
    """One layer, nothing recomputed."""
    fp32_norm = x.model.use_fp32_norm and x.s < x.w and x.device == "cuda"
    by_document = x.backend is AttentionBackend.SDPA  # documents of unequal length are joined to a row by a copy
    return {
        "layer inputs": x.t * x.h * x.s,
        "norm inputs": x.t * x.h * x.s + 2 * x.t * x.h * x.w * fp32_norm,  # F.rms_norm keeps the fp32 copies it made
        "norm statistics": 2 * x.t * x.w,  # 1 / rms of each token, twice
        "projection inputs": 2 * x.t * x.h * x.s,  # of wqkv, and of w1 and w3 together
        "queries, keys, values": x.T * (x.H + 2 * x.K) * x.D * x.s,  # the whole output of wqkv, because v is part of it
        "rotated queries, keys": x.T * (x.H + x.K) * x.D * x.s,
        "attention output": x.T * x.H * x.D * x.s * (1 + by_document),  # the input of wo; before, the documents' own
        "attention statistics": x.T * x.H * x.w,  # log of the softmax's denominator
        "feed-forward": 4 * x.T * x.f * x.s,  # gate, silu(gate), up, and their product
    }


def recomputed_layer_terms(x: Shape) -> Terms:
    """One layer that runs again in the backward pass."""
    return {"layer inputs": x.t * x.h * x.s}


def stage_terms(x: Shape, stage: StageShare, recomputed: int, pipeline: bool = False) -> Terms:
    """One micro-batch on one stage; the model's first `recomputed` layers are recomputed.

    In a pipeline the first layer's input lies in a receive buffer (`receive_buffers`), and the output is kept as well.
    """
    n_again = len(range(stage.layers.start, min(stage.layers.stop, recomputed)))
    terms = summed(
        scaled(recomputed_layer_terms(x), n_again), scaled(layer_terms(x), len(stage.layers) - n_again), _rotary(x)
    )
    if stage.first:
        terms = summed(terms, _embedding(x))
    if stage.last:
        terms = summed(terms, _head(x))
    hidden = x.t * x.h * x.s
    if pipeline and not stage.first:
        terms["layer inputs"] -= hidden
    if pipeline:
        terms["stage outputs"] = hidden
    return terms


def waiting_terms(x: Shape, stage: StageShare) -> Terms:
    """One micro-batch whose weight gradients are put off: input and output gradient of every linear layer."""
    qkv, mixed = (x.H + 2 * x.K) * x.D, x.H * x.D
    inputs = 2 * x.T * x.h + x.T * mixed + x.T * x.f  # of wqkv, of w1 and w3, of wo, of w2
    gradients = x.T * qkv + 2 * x.T * x.f + 2 * x.T * x.h  # of wqkv, of w1 and w3, of wo and w2
    return {"waiting for weight gradients": len(stage.layers) * (inputs + gradients) * x.s}


def receive_buffers(x: Shape, stages: Sequence[StageShare], micro_num: int) -> int:
    """Of torch's pipelining: one for every micro-batch and direction, kept from step to step."""
    borders = sum((not stage.first) + (not stage.last) for stage in stages)
    return borders * micro_num * x.t * x.h * x.s


def _rotary(x: Shape) -> Terms:
    return {"rotary table": 2 * x.T * x.D * x.s}  # cosines and sines, shared by the layers of a stage


def _embedding(x: Shape) -> Terms:
    # Split by vocabulary: each token's row on this rank (int64) and whether it is here (bool). Else only the batch.
    return {"embedding": x.T * (8 + 1) if x.model.embedding_by_vocabulary else 0}


def _head(x: Shape) -> Terms:
    terms = {"head": x.T * x.h * x.s + x.V * x.h * x.s}  # gradients of its input and weight, made in the forward pass
    if not x.model.apply_post_layer_norm:
        fp32_norm = x.model.use_fp32_norm and x.s < x.w and x.device == "cuda"
        terms["norm inputs"] = x.t * x.h * (x.w if fp32_norm else x.s)
        terms["norm statistics"] = x.t * x.w
    return terms


def loss_workspace(x: Shape) -> int:
    """While the last stage computes its loss, besides its activations: logits of one chunk of tokens, and the fp32 sum
    of the weight's gradient."""
    chunk = tokens_per_chunk(x.T, x.V, x.w, x.device)
    half = x.s < x.w
    logits = chunk * x.V * (x.w + (x.s if half else 0))  # and their copy in half precision for the products
    gathered = 0 if x.model.parallel_output or x.tp == 1 else chunk * x.vocab_size * x.w
    return logits + gathered + (x.V * x.h * x.w if half and chunk < x.T else 0)


def backward_workspace(x: Shape, last: bool, recomputes: bool) -> int:
    """While the last layer of a stage runs backward, besides the stage's activations; those of the head are gone then.

    The first gradients of the feed-forward part; later ones take the place of activations that they set free.
    """
    widest = 2 * x.T * x.f * x.s  # gradients of the product and of one factor
    outside = 2 * x.T * x.h * x.s  # gradient of the output, and of the input
    weight = x.h * x.f * x.s  # gradient of a weight before it is added to its bucket
    layer = sum(layer_terms(x).values()) - x.t * x.h * x.s if recomputes else 0  # its input is there already
    freed = _head(x)["head"] if last else 0
    return max(0, widest + outside + weight + layer - freed)


def scaled(terms: Terms, factor: int) -> Terms:
    return {name: factor * size for name, size in terms.items()}


def summed(*many: Terms) -> Terms:
    names = dict.fromkeys(name for terms in many for name in terms)
    return {name: sum(terms.get(name, 0) for terms in many) for name in names}
