"""Rotary position embedding (arXiv:2104.09864), in the rotate-half form of Llama's published weights.

    y = [x1 cos - x2 sin, x2 cos + x1 sin]     x1, x2 the halves of a head, angle_i = position * base^(-2i / head_dim)

Of a head its first d = int(head_dim * partial_rotary_factor) features are rotated, with d in the place of head_dim.

Cosines and sines are computed once per forward pass, for the row's positions, and shared by all layers of a kind: there
is no table with a maximum position. Angles are float64, so large positions lose no precision in any dtype.

With model.rope_scaling the frequencies f_i = base^(-2i / d) become, for w_i = 2 pi / f_i and L the original
length (as in transformers' modeling_rope_utils.py):

    linear   f / factor
    llama3   f if w < L / high, f / factor if w > L / low, else a mix that is linear in L / w
    yarn     f for pairs i below `pair(beta_fast)`, f / factor above `pair(beta_slow)`, else a mix that is linear in
             i; pair(n) = d ln(L / (2 pi n)) / (2 ln base) turns n times in L; q, k grow by attention_factor
    dynamic  f of the base times (1 + factor (n - L) / L)^(d / (d - 2)), in documents of n > L tokens (InternLM2's, too)

"dynamic" is a function of each document's own length: of none beside it, before it, or of the row. While a text is
generated, its prompt is a document; each further token is rotated by the length of the text that ends with it, and keys
stay as they were computed, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from internlm_lite.config.schema import ModelConfig, RopeScaling
from internlm_lite.layers.costs import Bytes, RowShape, add_bytes

Rotation = Literal["scaled", "local"]
"""Which frequencies rotate a layer: those of rope_base and rope_scaling, or those of rope_local_base."""


@dataclass(frozen=True)
class DynamicBase:
    """A base that depends on the length of a document."""

    factor: float
    length: int
    """Up to it nothing changes."""

    def __call__(self, radians: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[T, d / 2]: the frequencies `radians` [d / 2] in documents of `lengths` [T] tokens."""
        growth = 1 + self.factor * (lengths - self.length).clamp(min=0).double() / self.length
        pairs = torch.arange(len(radians), dtype=torch.float64, device=radians.device)
        return radians * growth.unsqueeze(-1) ** (-pairs / (len(radians) - 1))


@dataclass(frozen=True)
class RopeFrequencies:
    """The rotation of a head: how fast each pair turns, and how much queries and keys grow."""

    radians: torch.Tensor
    """[d / 2] float64, per position. A plain tensor: a buffer would be cast with the model."""
    growth: float = 1.0
    dynamic: DynamicBase | None = None

    def angles(self, positions: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """[T, d / 2] float64; arguments as of `Rotary`."""
        radians = self.radians.to(positions.device)
        if self.dynamic is None:
            return torch.outer(positions.double(), radians)
        lengths = document_lengths(positions) if lengths is None else lengths
        return positions.double().unsqueeze(-1) * self.dynamic(radians, lengths)


def document_lengths(positions: torch.Tensor) -> torch.Tensor:
    """positions [T] of a row of whole documents -> how many tokens the document of each has, [T]."""
    first = torch.arange(len(positions), device=positions.device) - positions
    return torch.zeros_like(positions).index_add_(0, first, torch.ones_like(positions))[first]


def rotation_of(config: ModelConfig, layer: int) -> Rotation | None:
    """What rotates queries and keys of layer number `layer` of the model; None: nothing."""
    every = config.no_rope_every
    if config.position != "rope" or (every and (config.on_its_side(layer) + 1) % every == 0):
        return None
    return "local" if config.rope_local_base is not None and config.is_sliding(layer) else "scaled"


def plain_frequencies(head_dim: int, base: float, device: torch.device | None = None) -> torch.Tensor:
    """base^(-2i / head_dim): [head_dim / 2] float64."""
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)


def rope_frequencies(config: ModelConfig, device: torch.device, rotation: Rotation = "scaled") -> RopeFrequencies:
    """The frequencies of model.rope_base and model.rope_scaling, or of model.rope_local_base. On the CPU for a model on
    the meta device: they are computed here alone, so a model that gets its memory later would miss them."""
    device = torch.device("cpu") if device.type == "meta" else device
    if rotation == "local":
        assert config.rope_local_base is not None, "there are no local layers without it"
        return RopeFrequencies(plain_frequencies(config.rotary_size, config.rope_local_base, device))
    plain, scaling = plain_frequencies(config.rotary_size, config.rope_base, device), config.rope_scaling
    if scaling is None:
        return RopeFrequencies(plain)
    if scaling.rope_type == "linear":
        return RopeFrequencies(plain / scaling.factor)
    if scaling.rope_type == "dynamic":
        length = scaling.original_max_position_embeddings or config.max_position_embeddings
        assert length is not None, "checked with the config"
        return RopeFrequencies(plain, dynamic=DynamicBase(scaling.factor, length))
    if scaling.rope_type == "llama3":
        return RopeFrequencies(_mixed(plain, scaling.factor, _llama3_kept(plain, scaling)))
    growth = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return RopeFrequencies(_mixed(plain, scaling.factor, _yarn_kept(plain, config.rope_base, scaling)), growth)


def _mixed(plain: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    """`kept` 1: the frequency as it was; 0: divided by `factor`."""
    return plain * kept + plain / factor * (1 - kept)


def _llama3_kept(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    assert scaling.original_max_position_embeddings is not None, "checked with the config"
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(plain: torch.Tensor, base: float, scaling: RopeScaling) -> torch.Tensor:
    assert scaling.original_max_position_embeddings is not None, "checked with the config"
    length, head_dim = scaling.original_max_position_embeddings, 2 * len(plain)

    def pair(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(len(plain), dtype=torch.float64, device=plain.device)
    return 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)


def _turned(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, sign: int) -> torch.Tensor:
    """x [.., head_dim], of which as many features as `cos` has are rotated, backwards if `sign` is -1."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        x, rest = x.split([size, x.shape[-1] - size], dim=-1)
        return torch.cat((_turned(x, cos, signed_sin, sign), rest), dim=-1)
    return torch.addcmul(x * cos, x.roll(size // 2, -1), signed_sin, value=sign)


class _Rotate(torch.autograd.Function):
    """Rotates forward and applies the inverse rotation to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _turned(x, cos, signed_sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, signed_sin = ctx.saved_tensors
        return _turned(grads[0], cos, signed_sin, -1), None, None


class Rotary:
    """The rotation of T tokens by their positions; `dtype` is that of q and k."""

    def __init__(
        self,
        positions: torch.Tensor,
        frequencies: RopeFrequencies,
        dtype: torch.dtype,
        lengths: torch.Tensor | None = None,
    ) -> None:
        """positions [T] int64: each token's position in its document. lengths [T] int64: tokens of its document, for
        dynamic frequencies; None: the row has whole documents."""
        angle = frequencies.angles(positions, lengths)
        growth = frequencies.growth
        cos, sin = (angle.cos() * growth).to(dtype), (angle.sin() * growth).to(dtype)
        self.cos = torch.cat((cos, cos), dim=-1)[:, None, None]  # [T, 1, 1, d]
        self.signed_sin = torch.cat((-sin, sin), dim=-1)[:, None, None]

    @staticmethod
    def saved_bytes(row: RowShape, rotary_size: int, dtype: torch.dtype) -> Bytes:
        """Cosines and sines; saved once, because all layers of a kind in a stage share them."""
        return {"rotary table": 2 * row.tokens * rotary_size * dtype.itemsize}

    def tables(self) -> list[torch.Tensor]:
        return [self.cos, self.signed_sin]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, groups, heads, head_dim], any strides -> rotated, contiguous, same shape."""
        return _Rotate.apply(x, self.cos, self.signed_sin)


class Rotations:
    """The rotations of some layers of a model, one for each kind among them."""

    def __init__(self, config: ModelConfig, layers: Iterable[int], device: torch.device) -> None:
        kinds = dict.fromkeys(rotation_of(config, layer) for layer in layers)
        self._size = config.rotary_size
        self._frequencies = {kind: rope_frequencies(config, device, kind) for kind in kinds if kind is not None}

    @property
    def by_length(self) -> bool:
        """Whether some rotation depends on the length of a token's document."""
        return any(frequencies.dynamic is not None for frequencies in self._frequencies.values())

    def at(
        self, positions: torch.Tensor, dtype: torch.dtype, lengths: torch.Tensor | None = None
    ) -> Mapping[Rotation | None, Rotary | None]:
        """By kind of layer, None for None; arguments as of `Rotary`."""
        tables: dict[Rotation | None, Rotary | None] = {None: None}
        for kind, frequencies in self._frequencies.items():
            tables[kind] = Rotary(positions, frequencies, dtype, lengths)
        return tables

    def saved_bytes(self, row: RowShape, dtype: torch.dtype) -> Bytes:
        return add_bytes(*(Rotary.saved_bytes(row, self._size, dtype) for _ in self._frequencies))
