"""The same decoder as a plain PyTorch training loop: the baseline of the benchmarks.

No packing (rows of equal length), no layouts, no master weights, no metrics: nn.Linear, SDPA, F.cross_entropy, AdamW.
Parameters have our names and shapes, so weights of one fit the other.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.config.schema import ModelConfig


class BareAttention(nn.Module):
    """Rotary grouped-query attention. Rows of wqkv, for each key/value head: g queries, one key, one value."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, kv_heads, bias = config.hidden_size, config.kv_heads, not config.no_bias
        self.head_dim, self.queries = config.head_size, config.num_attention_heads // kv_heads
        self.wqkv = nn.Linear(hidden, kv_heads * (self.queries + 2) * self.head_dim, bias=bias, dtype=dtype)
        self.wo = nn.Linear(hidden, hidden, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        qkv = self.wqkv(x).unflatten(-1, (-1, self.queries + 2, self.head_dim))  # [batch, length, kv heads, g + 2, D]
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in qkv.split([self.queries, 1, 1], dim=3))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.queries > 1)
        out: torch.Tensor = self.wo(attended.transpose(1, 2).flatten(2))
        return out


class BareMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.mlp_hidden_size, bias=False, dtype=dtype)
        self.w3 = nn.Linear(config.hidden_size, config.mlp_hidden_size, bias=False, dtype=dtype)
        self.w2 = nn.Linear(config.mlp_hidden_size, config.hidden_size, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class BareBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.layer_norm_epsilon, dtype=dtype)
        self.attention = BareAttention(config, dtype)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, config.layer_norm_epsilon, dtype=dtype)
        self.feed_forward = BareMLP(config, dtype)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: torch.Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., length, head_dim] rotated by the angles of cos and sin [length, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class BareStage(nn.Module):
    """Consecutive layers: tokens [batch, length] or a hidden state in, logits or a hidden state out."""

    def __init__(self, config: ModelConfig, length: int, dtype: torch.dtype, layers: range) -> None:
        super().__init__()
        self.tok_embeddings = self.norm = self.output = None
        if layers.start == 0:
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleDict({str(number): BareBlock(config, dtype) for number in layers})
        if layers.stop == config.num_layers:
            self.norm = nn.RMSNorm(config.hidden_size, config.layer_norm_epsilon, dtype=dtype)
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        half = config.head_size // 2
        angle = torch.arange(length)[:, None] * config.rope_base ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)
        for name, param in self.named_parameters():
            if param.dim() > 1:  # seeded by name: weights do not depend on the split into stages
                seeded = torch.Generator(param.device).manual_seed(zlib.crc32(name.encode()))
                nn.init.normal_(param, std=config.init_std, generator=seeded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        for block in self.layers.values():
            x = block(x, self.cos, self.sin)
        if self.norm is None or self.output is None:
            return x
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


class BareDecoder(nn.Module):
    """Tokens [batch, length] and labels to the mean loss."""

    def __init__(self, config: ModelConfig, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = BareStage(config, length, dtype, range(config.num_layers))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return mean_loss(self.model(tokens), labels)


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the labels. logits [batch, length, vocab], labels [batch, length]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
