"""The correspondence of rows between our tensors and Hugging Face's: one table for both directions.

    grouped    our tensors under other names (InternLM2)
    separate   one tensor each for q, k and v; ours has them by key/value head (layers/attention.py):
               wqkv [ q0 .. q(g-1) k v | ... ]  <->  q_proj [ q0 .. q(g-1) | ... ]  k_proj [ k | ... ]  v_proj
    stacked    the same three after each other in one tensor (Phi-3), and so the two of the feed-forward part

All rotate queries and keys by halves, as we do, so rows keep their order inside a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from internlm_lite.apps.convert.families import FORMS, Family, with_biases
from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import build_model

Shape = tuple[int, ...]
_QKV, _GATE, _UP = "attention.wqkv", "feed_forward.w1", "feed_forward.w3"


@dataclass(frozen=True)
class RowRange:
    """`count` rows that are equal in our tensor `ours` and in Hugging Face's tensor `theirs`."""

    ours: str
    ours_start: int
    theirs: str
    theirs_start: int
    count: int
    transposed: bool
    """Theirs is stored transposed; its rows are counted before that."""


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of a tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorRecipe:
    """A tensor to make by concatenating rows of other tensors; without any it is 0."""

    name: str
    shape: Shape
    rows: tuple[Rows, ...]
    transposed: Literal["sources", "result"] | None = None
    """What is stored transposed: the tensors with the rows, or the tensor that is made of them."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def our_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every weight of a model, in the order of the layers. Builds it on the meta device."""
    mesh = single_process_mesh(torch.device("meta"))
    found = {}
    for param in build_model(model, LossConfig(), mesh, AttentionBackend.SDPA).parameters():
        assert isinstance(param, Parameter), "parameters of the model know their part"
        found[param.shard_spec.name] = param.shard_spec.shape
    return found


def hf_recipes(model: ModelConfig, family: Family) -> list[TensorRecipe]:
    """Hugging Face's tensors, made of ours; biases that our model lacks, but every model of the family has, are 0."""
    ours = our_shapes(model).keys()
    pieces: dict[str, list[tuple[int, Rows]]] = {}
    rest: dict[str, Shape] = {}
    transposed = set()
    for name, shape in our_shapes(with_biases(model, family)).items():
        for part in _row_ranges(model, family, name, shape):
            rows = Rows(part.ours, part.ours_start, part.ours_start + part.count)
            pieces.setdefault(part.theirs, []).append((part.theirs_start, rows))
            rest[part.theirs] = shape[1:]
            if part.transposed:
                transposed.add(part.theirs)
    return [
        TensorRecipe(name, shape[::-1], rows, "result")
        if name in transposed
        else TensorRecipe(name, shape, rows if rows[0].name in ours else ())
        for name, shape, rows in (_joined(name, rest[name], found) for name, found in pieces.items())
    ]


def our_recipes(model: ModelConfig, family: Family) -> list[TensorRecipe]:
    """Our tensors, made of Hugging Face's."""
    made = []
    for name, shape in our_shapes(model).items():
        parts = list(_row_ranges(model, family, name, shape))
        found = [
            (part.ours_start, Rows(part.theirs, part.theirs_start, part.theirs_start + part.count)) for part in parts
        ]
        made.append(TensorRecipe(*_joined(name, shape[1:], found), "sources" if parts[0].transposed else None))
    return made


def sources_of(recipes: Sequence[TensorRecipe]) -> dict[str, Shape]:
    """Name -> shape of the tensors that recipes are made of, all of whose rows they use."""
    found: dict[str, Shape] = {}
    transposed = set()
    for recipe in recipes:
        for rows in recipe.rows:
            found[rows.name] = (max(rows.stop, *found.get(rows.name, (0,))[:1]), *recipe.shape[1:])
            if recipe.transposed == "sources":
                transposed.add(rows.name)
    return {name: shape[::-1] if name in transposed else shape for name, shape in found.items()}


def _joined(name: str, rest: Shape, pieces: Sequence[tuple[int, Rows]]) -> tuple[str, Shape, tuple[Rows, ...]]:
    """Name, shape and rows of a tensor; a piece: (its first row there, where it comes from)."""
    rows = tuple(piece for _, piece in sorted(pieces, key=lambda item: item[0]))
    return name, (sum(piece.stop - piece.start for piece in rows), *rest), rows


def _row_ranges(model: ModelConfig, family: Family, name: str, shape: Shape) -> Iterator[RowRange]:
    """Sources of one of our tensors, in the order of its rows."""
    form, prefix = FORMS[family], ""
    names = form.names
    module, _, kind = name.rpartition(".")
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"{names['layers']}.{layer}."
    transposed = kind == "weight" and module in form.transposed
    if module != _QKV or module in names:
        start = shape[0] if module == _UP and names[_UP] == names[_GATE] else 0
        yield RowRange(name, 0, f"{prefix}{names[module]}.{kind}", start, shape[0], transposed)
        return
    head, queries = model.head_size, model.num_attention_heads // model.kv_heads
    sources = [f"attention.{letter}" for letter in "qkv"]
    stacked = names[sources[0]] == names[sources[1]]
    start = 0
    for group in range(model.kv_heads):
        before = 0
        for source, heads in zip(sources, (queries, 1, 1), strict=True):
            count = heads * head
            yield RowRange(name, start, f"{prefix}{names[source]}.{kind}", before + group * count, count, transposed)
            start += count
            before += stacked * model.kv_heads * count
