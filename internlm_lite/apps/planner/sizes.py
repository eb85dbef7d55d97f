"""Shapes of models for a given amount of compute, with tokens, batch size and learning rate, by published rules.

    compute C = FLOPs of a token * tokens      a rule: C -> size      tokens = C / FLOPs of a token of the shape

A rule finds the size; the nearest shape that trains well is taken; and tokens follow from the size of that shape, so
that a row costs C. Every rule was fitted on its authors' data and recipe: read rows as places to begin a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from internlm_lite.errors import ConfigError
from internlm_lite.units import round_up

# arXiv:2404.10102, table 1: the parametric loss of arXiv:2203.15556 fitted again. Their optimum, as the other
# approaches of that paper, gives about 20 tokens a parameter; the published constants do not.
_ENTROPY, _A, _ALPHA, _B, _BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
_WIDEST, _NARROWEST, _USUAL = 160, 48, 96
"""hidden_size / num_layers. Loss hardly depends on it between the first two (arXiv:2001.08361, figure 5)."""
_TIED_BELOW = 1e9
"""Parameters of a model whose head shares the embedding's weight, as it does in most published ones of that size."""


@dataclass(frozen=True)
class Shape:
    """A decoder with RMSNorm, rotary attention, SwiGLU and no biases."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_attention_heads: int
    mlp_hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def non_embedding(self) -> int:
        """Parameters without embedding and head."""
        width = self.hidden_size
        attention = 2 * width * width + 2 * width * self.num_kv_attention_heads * self.head_dim
        return self.num_layers * (attention + 3 * width * self.mlp_hidden_size + 2 * width) + width

    @property
    def parameters(self) -> int:
        return self.non_embedding + (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size

    def flops_per_token(self, measure: Measure, seq_len: int) -> float:
        """Of a training step, as a rule counts them. 6 for each parameter of its measure; with "attention", 12 *
        num_layers * hidden_size * seq_len besides (DeepSeek's M)."""
        if measure == "parameters":
            return 6 * self.parameters
        attention = 12 * self.num_layers * self.hidden_size * seq_len if measure == "attention" else 0
        return 6 * self.non_embedding + attention


Measure = Literal["parameters", "non_embedding", "attention"]


@dataclass(frozen=True)
class ScalingRule:
    """How large a model, and how it is trained, for C FLOPs."""

    name: str
    source: str
    measure: Measure
    """What `size` counts: FLOPs of a token by `Shape.flops_per_token`."""
    size: Callable[[float], float]
    """C -> FLOPs per token."""
    schedule: str
    """lr_scheduler.kind of its runs."""
    lr: Callable[[float, float, float], float]
    """(C, non-embedding parameters, tokens) -> peak learning rate of AdamW."""
    batch: Callable[[float, float], float]
    """(C, tokens) -> tokens of a global batch."""


def _chinchilla(compute: float) -> float:
    exponent = _BETA / (_ALPHA + _BETA)
    factor = (_ALPHA * _A / (_BETA * _B)) ** (1 / (_ALPHA + _BETA))
    return 6 * factor * (compute / 6) ** exponent


def _step_law_lr(compute: float, parameters: float, tokens: float) -> float:
    return 1.79 * parameters**-0.713 * tokens**0.307


def _step_law_batch(compute: float, tokens: float) -> float:
    return 0.58 * tokens**0.571


RULES = (
    ScalingRule(
        "chinchilla",
        "size: Chinchilla's loss, fitted again (arXiv:2203.15556, 2404.10102); lr, batch: Step Law (arXiv:2503.04715)",
        "parameters",
        _chinchilla,
        "cosine",
        _step_law_lr,
        _step_law_batch,
    ),
    ScalingRule(
        "deepseek",
        "size, lr, batch: DeepSeek LLM (arXiv:2401.02954), sections 3.1 and 3.2",
        "attention",
        lambda compute: 0.1715 * compute**0.5243,
        "steps",
        lambda compute, parameters, tokens: 0.3118 * compute**-0.1250,
        lambda compute, tokens: 0.2920 * compute**0.3271,
    ),
    ScalingRule(
        "minicpm",
        "size: 192 tokens a parameter with warm-up, stable, decay (arXiv:2404.06395, section 4.5); lr, batch: Step Law",
        "non_embedding",
        lambda compute: 6 * math.sqrt(compute / (6 * 192)),
        "wsd",
        _step_law_lr,
        _step_law_batch,
    ),
)


@dataclass(frozen=True)
class SizeRow:
    """What one rule proposes for `compute` FLOPs."""

    rule: ScalingRule
    compute: float
    shape: Shape
    tokens: int
    batch_tokens: int
    lr: float
    loss: float
    """By the fit of arXiv:2404.10102, on its data: compares rows, predicts no run."""

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.batch_tokens))


def sizes(compute: float, vocab_size: int, seq_len: int) -> list[SizeRow]:
    """A row of each rule for `compute` FLOPs. Raises as `size_row`."""
    return [size_row(rule, compute, vocab_size, seq_len) for rule in RULES]


def size_row(rule: ScalingRule, compute: float, vocab_size: int, seq_len: int) -> SizeRow:
    """The row of one rule. Raises ConfigError if no shape comes near."""
    wanted = rule.size(compute)
    shape = nearest_shape(lambda one: one.flops_per_token(rule.measure, seq_len), wanted, vocab_size)
    per_token = shape.flops_per_token(rule.measure, seq_len)
    tokens = round(compute / per_token)
    if tokens < seq_len or not 0.5 < per_token / wanted < 2:
        raise ConfigError(
            f"found {compute:.3g} FLOPs; {rule.name} wants {wanted:.2g} of them for a token, and the nearest shape "
            f"with {vocab_size} rows of embedding and rows of {seq_len} tokens takes {per_token:.2g}: give "
            + ("more compute, or a smaller vocabulary or length" if wanted < per_token else "less compute")
        )
    batch = max(seq_len, round(min(rule.batch(compute, tokens), tokens) / seq_len) * seq_len)
    return SizeRow(
        rule=rule,
        compute=compute,
        shape=shape,
        tokens=tokens,
        batch_tokens=batch,
        lr=rule.lr(compute, shape.non_embedding, tokens),
        loss=_ENTROPY + _A / shape.parameters**_ALPHA + _B / tokens**_BETA,
    )


def nearest_shape(size: Callable[[Shape], float], wanted: float, vocab_size: int) -> Shape:
    """The shape whose `size` is nearest to `wanted`; among similar ones that with the usual proportions."""

    def distance(shape: Shape) -> float:
        proportions = abs(math.log(shape.hidden_size / shape.num_layers / _USUAL))
        return abs(math.log(size(shape) / wanted)) + 0.05 * proportions

    return min(_shapes(vocab_size), key=distance)


def _shapes(vocab_size: int) -> Iterator[Shape]:
    """Widths and depths that tensor- and pipeline-parallel ranks divide well, up to the largest dense models."""
    for hidden in (*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 4096, 256), *range(4096, 20_481, 512)):
        heads = hidden // (64 if hidden < 1024 else 128)
        kv_heads = heads // 4 if heads >= 16 and heads % 4 == 0 else heads
        for layers in range(max(2, -(-hidden // _WIDEST)), hidden // _NARROWEST + 2):
            if layers % (4 if layers > 32 else 2 if layers > 8 else 1):
                continue
            mlp = round_up(int(hidden * 8 / 3), min(256, hidden))
            tied = Shape(layers, hidden, heads, kv_heads, mlp, vocab_size, tie_word_embeddings=True)
            yield tied if tied.parameters < _TIED_BELOW else replace(tied, tie_word_embeddings=False)
