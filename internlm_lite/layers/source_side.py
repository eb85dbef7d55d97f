"""Layers of an encoder: those of a decoder, over rows of source tokens."""

from __future__ import annotations

from fractions import Fraction

import torch

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape
from internlm_lite.layers.embedding import Embedding
from internlm_lite.layers.norm import build_norm
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh.layout import Parameter


def of_source(seq_len: int, share: Fraction) -> int:
    """Tokens of the source of a document of `seq_len` tokens."""
    return max(1, int(seq_len * share)) if seq_len else 0


class OnSource(CostedLayer):
    """To be derived from beside a layer: of a row it costs what the layer costs of its source."""

    tp_ctx: TensorParallelContext

    def flops_per_token(self, seq_len: int) -> int:
        """Of the source tokens that a row has for each target token, rounded down."""
        share = self.tp_ctx.source_share
        return int(super().flops_per_token(of_source(seq_len, share)) * share)

    def saved_bytes(self, row: RowShape) -> Bytes:
        return super().saved_bytes(row.of_source)

    def messages(self, row: RowShape) -> list[Message]:
        return super().messages(row.of_source)

    def passes(self, row: RowShape) -> list[Pass]:
        return super().passes(row.of_source)

    def deferred_bytes(self, row: RowShape) -> int:
        return super().deferred_bytes(row.of_source)

    def workspace_bytes(self, row: RowShape) -> int:
        return super().workspace_bytes(row.of_source)


class SourceEmbedding(OnSource, Embedding):
    """The encoder's embedding: model.source_vocab_size rows, or the decoder's weight (`tied`)."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        tp_ctx: TensorParallelContext,
        tied: Parameter | None = None,
    ) -> None:
        super().__init__(name, config.model_copy(update={"vocab_size": config.source_vocab}), tp_ctx, tied=tied)


class SourceNorm(OnSource):
    """The norm of the encoder's last hidden state."""

    def __init__(self, name: str, config: ModelConfig, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        self.tp_ctx = tp_ctx
        self.norm = build_norm(name, config, tp_ctx)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x)
        return y
