"""The same decoder as a bare PyTorch loop: what a good engineer writes in an afternoon, and the yardstick for ours.

No packing (rows of equal length), no layouts, no master weights, no metrics: nn.Linear, SDPA, F.cross_entropy, AdamW.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.config.schema import ModelConfig


class BareBlock(nn.Module):
    """Pre-norm block: rotary grouped-query attention, SwiGLU."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.kv_heads
        self.head_dim, self.heads, self.kv_heads = config.head_dim, heads, kv_heads
        self.eps, bias = config.layer_norm_epsilon, not config.no_bias
        self.attention_norm = nn.Parameter(torch.ones(hidden, dtype=dtype))
        self.ffn_norm = nn.Parameter(torch.ones(hidden, dtype=dtype))
        self.wqkv = nn.Linear(hidden, (heads + 2 * kv_heads) * self.head_dim, bias=bias, dtype=dtype)
        self.wo = nn.Linear(hidden, hidden, bias=bias, dtype=dtype)
        self.w1 = nn.Linear(hidden, config.mlp_hidden_size, bias=False, dtype=dtype)
        self.w3 = nn.Linear(hidden, config.mlp_hidden_size, bias=False, dtype=dtype)
        self.w2 = nn.Linear(config.mlp_hidden_size, hidden, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        qkv = self.wqkv(F.rms_norm(x, (hidden,), self.attention_norm, self.eps))
        qkv = qkv.view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        grouped = self.kv_heads != self.heads
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.wo(attended.transpose(1, 2).reshape(batch, length, hidden))
        y = F.rms_norm(x, (hidden,), self.ffn_norm, self.eps)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., length, head_dim] turned by the angles of cos and sin [length, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class BareDecoder(nn.Module):
    """Tokens [batch, length] and labels to the mean loss."""

    def __init__(self, config: ModelConfig, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.blocks = nn.ModuleList(BareBlock(config, dtype) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype))
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        half = config.head_dim // 2
        angle = torch.arange(length)[:, None] * config.rope_base ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=config.init_std)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.layer_norm_epsilon)
        return F.cross_entropy(self.output(x).flatten(0, 1).float(), labels.flatten())
