"""The decoder-only Transformer: one Block, one class, any mesh, any contiguous share of the layers.

    tokens [T] -> tok_embeddings -> Block 0 .. L-1 -> norm -> output -> losses [T]

    pre-norm   x + attention(norm(x));  x + ffn(norm(x))     and a norm before the head
    post-norm  norm(x + attention(x));  norm(x + ffn(x))     and none before the head

A row is T packed tokens without a batch dimension; `attend` keeps documents apart. With sequence parallelism the
hidden state between blocks is [T / tp, hidden] (layers/placement.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from internlm_lite.config.schema import ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.attention import Attend, Attention
from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.loss import TokenLosses
from internlm_lite.layers.mlp import SwiGLU
from internlm_lite.layers.norm import RMSNorm
from internlm_lite.layers.placement import Placement
from internlm_lite.layers.rope import Rotary
from internlm_lite.layers.weight_grads import WeightGrads
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.head import Head
from internlm_lite.runtime.device import torch_dtype


@dataclass(frozen=True)
class Share:
    """The part of a model that one pipeline stage holds."""

    layers: range
    first: bool
    """With the embedding."""
    last: bool
    """With the final norm and the head."""
    tied_over: tuple[str, ...] = ()
    """("ends",) when a tied weight has two copies: the embedding and the head are on different pipeline ranks."""


class Block(nn.Module):
    """x [T, hidden] or its rows -> the same shape. `recompute`: keep only x, and run again in the backward pass."""

    def __init__(self, config: ModelConfig, layer: int, recompute: bool, place: Placement) -> None:
        super().__init__()
        self.post_norm = config.apply_post_layer_norm
        self.recompute = recompute
        name = f"layers.{layer}"
        out_std = config.init_std / math.sqrt(2 * config.num_layers)
        self.attention_norm = rms_norm(config, f"{name}.attention_norm", place)
        self.attention = Attention(
            f"{name}.attention",
            layer,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.kv_heads,
            bias=not config.no_bias,
            init_std=config.init_std,
            out_std=out_std,
            place=place,
        )
        self.ffn_norm = rms_norm(config, f"{name}.ffn_norm", place)
        self.feed_forward = SwiGLU(
            f"{name}.feed_forward",
            config.hidden_size,
            config.mlp_hidden_size,
            init_std=config.init_std,
            out_std=out_std,
            place=place,
        )

    def forward(self, x: torch.Tensor, rotary: Rotary, attend: Attend) -> torch.Tensor:
        # Inside the module's own call, so that forward hooks run once per step, not again with the recomputation.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, rotary, attend, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, rotary, attend)

    def _run(self, x: torch.Tensor, rotary: Rotary, attend: Attend) -> torch.Tensor:
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x, rotary, attend))
            return self.ffn_norm(x + self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), rotary, attend)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The part `share` of a model. `tied`: the embedding's weight for its head, when another stage here has it."""

    def __init__(
        self,
        config: ModelConfig,
        label_smoothing: float,
        place: Placement,
        backend: AttentionBackend,
        share: Share,
        tied: Parameter | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.place = place
        self.backend = backend
        self.tok_embeddings = embedding(config, place, share) if share.first else None
        again = config.recomputed_layers
        self.layers = nn.ModuleDict({str(n): Block(config, n, n < again, place) for n in share.layers})
        has_norm = share.last and not config.apply_post_layer_norm
        self.norm = rms_norm(config, "norm", place) if has_norm else None
        if config.tie_word_embeddings and self.tok_embeddings is not None:
            tied = self.tok_embeddings.weight
        self.output = Head(config, label_smoothing, tied, place, share.tied_over) if share.last else None

    def units(self) -> Iterator[nn.Module]:
        """The modules that run, each once, in this order. Their parameters partition the model's."""
        for module in (self.tok_embeddings, *self.layers.values(), self.norm, self.output):
            if module is not None:
                yield module

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The hidden state after this stage's layers, and after the final norm on the last stage.

        `tokens` [T] int64; without the embedding it is the hidden state of the stage before. positions [T].
        """
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        rotary = Rotary(positions, self.config.head_dim, self.config.rope_base, x.dtype)
        for block in self.layers.values():
            x = block(x, rotary, attend)
        return x if self.norm is None else self.norm(x)

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> TokenLosses:
        """Of the hidden state as `hidden()` of the last stage gives it; labels [T] int64.

        `scale`: a scalar tensor that multiplies the loss to differentiate.
        """
        assert self.output is not None, "only the last stage has a head"
        losses: TokenLosses = self.output(hidden, labels, scale)
        return losses

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, hidden] as `hidden()` of the last stage gives it -> [T, vocab], whole on every tensor-parallel rank."""
        assert self.output is not None, "only the last stage has a head"
        return self.output(hidden)


def build_model(
    config: ModelConfig, label_smoothing: float, mesh: Mesh, backend: AttentionBackend, by_sequence: bool = False
) -> Transformer:
    """A whole uninitialised model on `mesh.device`; models/stages.py cuts one into pipeline stages.

    `by_sequence`: sequence parallelism. Raises ConfigError when the shape does not divide over `mesh.tp`.
    """
    share = Share(range(config.num_layers), first=True, last=True)
    return Transformer(config, label_smoothing, placement(config, mesh, by_sequence), backend, share)


def placement(config: ModelConfig, mesh: Mesh, by_sequence: bool, defer_weight_grads: bool = False) -> Placement:
    """For all layers of a stage. Raises ConfigError when a tied weight cannot serve the embedding and the head."""
    if config.tie_word_embeddings and config.embed_split_hidden and mesh.tp.size > 1:
        raise ConfigError(
            f"model.tie_word_embeddings=True with embed_split_hidden=True over {mesh.tp.size} tensor-parallel ranks: "
            "the head needs the shared weight split along the vocabulary; set model.embed_split_hidden=False"
        )
    return Placement(
        mesh.tp,
        torch_dtype(config.dtype),
        mesh.device,
        by_sequence=by_sequence and mesh.tp.size > 1,
        weight_grads=WeightGrads(defer_weight_grads),
    )


def rms_norm(config: ModelConfig, name: str, place: Placement) -> RMSNorm:
    return RMSNorm(name, config.hidden_size, config.layer_norm_epsilon, config.use_fp32_norm, place)


def embedding(config: ModelConfig, place: Placement, share: Share) -> Embedding:
    return Embedding(
        "tok_embeddings",
        config.vocab_size,
        config.hidden_size,
        split_hidden=not config.embedding_by_vocabulary,
        grad_scale=config.embed_grad_scale,
        init_std=config.init_std,
        place=place,
        summed=share.tied_over,
    )
