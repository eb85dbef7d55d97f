"""The decoder-only Transformer: one Block, one class, any mesh, any contiguous range of the layers.

    tokens [T] -> tok_embeddings -> Block 0 .. L-1 -> norm -> output -> losses [T]

    pre-norm   x + attention(norm(x));  x + ffn(norm(x))     and a norm before the head
    post-norm  norm(x + attention(x));  norm(x + ffn(x))     and none before the head

A row is T packed tokens without a batch dimension; `attend` keeps documents apart. With sequence parallelism the
hidden state between blocks is [T / tp, hidden] (layers/tensor_parallel.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from internlm_lite.config.schema import ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.attention import Attention
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, RowShape, add_bytes
from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.flash import Attend, AttentionBackend
from internlm_lite.layers.loss import TokenLosses
from internlm_lite.layers.mlp import SwiGLU
from internlm_lite.layers.norm import build_norm
from internlm_lite.layers.rope import Rotary
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.layers.weight_grads import WeightGrads
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.head import Head
from internlm_lite.runtime.device import torch_dtype


@dataclass(frozen=True)
class StageSpec:
    """The part of a model that one pipeline stage holds."""

    layers: range
    first: bool
    """With the embedding."""
    last: bool
    """With the final norm and the head."""
    tied_over: tuple[str, ...] = ()
    """("ends",) when a tied weight has two copies: the embedding and the head are on different pipeline ranks."""


class Block(CostedLayer):
    """x [T, hidden] or its rows -> the same shape. `recompute`: keep only x, and run again in the backward pass."""

    def __init__(self, config: ModelConfig, layer: int, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        self.tp_ctx = tp_ctx
        self.hidden_size = config.hidden_size
        self.post_norm = config.apply_post_layer_norm
        self.recompute = layer < config.recomputed_layers
        name = f"layers.{layer}"
        self.attention_norm = build_norm(f"{name}.attention_norm", config, tp_ctx)
        self.attention = Attention(f"{name}.attention", layer, config, tp_ctx)
        self.ffn_norm = build_norm(f"{name}.ffn_norm", config, tp_ctx)
        self.feed_forward = SwiGLU(f"{name}.feed_forward", config, tp_ctx)

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

    def saved_bytes(self, row: RowShape, *, recompute: bool | None = None) -> Bytes:
        """`recompute`: as if `self.recompute` were this."""
        layer_input = self.tp_ctx.hidden_bytes(row.tokens, self.hidden_size)
        if self.recompute if recompute is None else recompute:
            return {"layer inputs": layer_input}
        # Its input is that of its first layer, and counted there. It has its own name because every block keeps it.
        return add_bytes({"layer inputs": layer_input}, super().saved_bytes(row), {"norm inputs": -layer_input})

    def messages(self, row: RowShape) -> list[Message]:
        twice = 2 if self.recompute else 1
        return [m if m.backward else replace(m, times=twice * m.times) for m in super().messages(row)]

    def workspace_bytes(self, row: RowShape) -> int:
        """Of its backward pass: that of the feed-forward part, which comes first, and what is recomputed before."""
        gradients = 2 * row.tokens * self.hidden_size * self.tp_ctx.dtype.itemsize  # of its output and of its input
        kept, kept_anyway = (sum(self.saved_bytes(row, recompute=flag).values()) for flag in (False, True))
        return self.feed_forward.workspace_bytes(row) + gradients + (kept - kept_anyway) * self.recompute


class Transformer(CostedLayer):
    """The part `spec` of a model. `tied`: the embedding's weight for its head, when another stage here has it."""

    def __init__(
        self,
        config: ModelConfig,
        label_smoothing: float,
        tp_ctx: TensorParallelContext,
        backend: AttentionBackend,
        spec: StageSpec,
        tied: Parameter | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tp_ctx = tp_ctx
        self.backend = backend
        self.spec = spec
        self.tok_embeddings = Embedding("tok_embeddings", config, tp_ctx, spec.tied_over) if spec.first else None
        self.layers = nn.ModuleDict({str(n): Block(config, n, tp_ctx) for n in spec.layers})
        has_norm = spec.last and not config.apply_post_layer_norm
        self.norm = build_norm("norm", config, tp_ctx) if has_norm else None
        if config.tie_word_embeddings and self.tok_embeddings is not None:
            tied = self.tok_embeddings.weight
        self.output = Head(config, label_smoothing, tp_ctx, tied, spec.tied_over) if spec.last else None

    def hidden_bytes(self, row: RowShape) -> int:
        """Of the hidden state that goes from stage to stage."""
        return self.tp_ctx.hidden_bytes(row.tokens, self.config.hidden_size)

    def blocks(self) -> list[Block]:
        """In order."""
        return [block for block in self.layers.values() if isinstance(block, Block)]

    def units(self) -> Iterator[CostedLayer]:
        """The modules that run, each once, in this order. Their parameters partition the model's."""
        for module in (self.tok_embeddings, *self.blocks(), self.norm, self.output):
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

    def saved_bytes(self, row: RowShape, *, recomputed: int | None = None) -> Bytes:
        """`recomputed`: as if this number of the model's first layers were recomputed."""
        flags = [None if recomputed is None else block.attention.layer < recomputed for block in self.blocks()]
        parts = [block.saved_bytes(row, recompute=flag) for block, flag in zip(self.blocks(), flags, strict=True)]
        parts.append(Rotary.saved_bytes(row, self.config.head_dim, self.tp_ctx.dtype))
        parts += [unit.saved_bytes(row) for unit in (self.tok_embeddings, self.output, self.norm) if unit is not None]
        return add_bytes(*parts)

    def workspace_bytes(self, row: RowShape) -> int:
        """Of the backward pass of its last layer, when the activations of the head are freed, or of the loss."""
        backward = self.blocks()[-1].workspace_bytes(row)
        if self.output is None:
            return backward
        return max(backward - sum(self.output.saved_bytes(row).values()), self.output.workspace_bytes(row))


def build_model(
    config: ModelConfig, label_smoothing: float, mesh: Mesh, backend: AttentionBackend, *, by_sequence: bool = False
) -> Transformer:
    """A whole uninitialised model on `mesh.device`; models/stages.py cuts one into pipeline stages.

    `by_sequence`: sequence parallelism. Raises ConfigError when the shape does not divide over `mesh.tp`.
    """
    spec = StageSpec(range(config.num_layers), first=True, last=True)
    tp_ctx = tensor_parallel_context(config, mesh, by_sequence=by_sequence)
    return Transformer(config, label_smoothing, tp_ctx, backend, spec)


def tensor_parallel_context(
    config: ModelConfig, mesh: Mesh, *, by_sequence: bool, defer_weight_grads: bool = False
) -> TensorParallelContext:
    """For all layers of a stage. Raises ConfigError when a tied weight cannot serve the embedding and the head."""
    if config.tie_word_embeddings and config.embed_split_hidden and mesh.tp.size > 1:
        raise ConfigError(
            f"model.tie_word_embeddings=True with embed_split_hidden=True over {mesh.tp.size} tensor-parallel ranks: "
            "the head needs the shared weight split along the vocabulary; set model.embed_split_hidden=False"
        )
    return TensorParallelContext(
        mesh.tp,
        torch_dtype(config.dtype),
        mesh.device,
        by_sequence=by_sequence and mesh.tp.size > 1,
        weight_grads=WeightGrads(deferred=defer_weight_grads),
    )
