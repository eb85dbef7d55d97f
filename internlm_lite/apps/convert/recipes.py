"""The correspondence of rows between our tensors and Hugging Face's: one table for both directions.

    internlm2         our tensors under other names
    the others        one tensor each for q, k and v; ours has them by key/value head (layers/attention.py):
                      wqkv [ q0 .. q(g-1) k v | ... ]  <->  q_proj [ q0 .. q(g-1) | ... ]  k_proj [ k | ... ]  v_proj

All rotate queries and keys by halves, as we do, so rows keep their order inside a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import build_model

Family = Literal["llama", "mistral", "qwen2", "qwen3", "internlm", "internlm2", "internlm3"]
"""`model_type` in Hugging Face's config.json."""
FAMILIES: tuple[Family, ...] = get_args(Family)
Shape = tuple[int, ...]

_SPLIT = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_FUSED = {"tok_embeddings": "model.tok_embeddings", "norm": "model.norm", "output": "output"}
_QKV = "attention.wqkv"


@dataclass(frozen=True)
class RowRange:
    """`count` rows that are equal in our tensor `ours` and in Hugging Face's tensor `theirs`."""

    ours: str
    ours_start: int
    theirs: str
    theirs_start: int
    count: int


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of a tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorRecipe:
    """A tensor to make by concatenating rows of other tensors."""

    name: str
    shape: Shape
    rows: tuple[Rows, ...]

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
    """Hugging Face's tensors, made of ours."""
    rows: dict[str, list[tuple[int, Rows]]] = {}
    rest: dict[str, Shape] = {}
    for name, shape in our_shapes(model).items():
        for strip in _row_ranges(model, family, name, shape):
            piece = Rows(strip.ours, strip.ours_start, strip.ours_start + strip.count)
            rows.setdefault(strip.theirs, []).append((strip.theirs_start, piece))
            rest[strip.theirs] = shape[1:]
    return [_recipe(name, rest[name], pieces) for name, pieces in rows.items()]


def our_recipes(model: ModelConfig, family: Family) -> list[TensorRecipe]:
    """Our tensors, made of Hugging Face's."""
    made = []
    for name, shape in our_shapes(model).items():
        pieces = [
            (strip.ours_start, Rows(strip.theirs, strip.theirs_start, strip.theirs_start + strip.count))
            for strip in _row_ranges(model, family, name, shape)
        ]
        made.append(_recipe(name, shape[1:], pieces))
    return made


def _recipe(name: str, rest: Shape, pieces: Sequence[tuple[int, Rows]]) -> TensorRecipe:
    rows = tuple(piece for _, piece in sorted(pieces, key=lambda item: item[0]))
    return TensorRecipe(name, (sum(piece.stop - piece.start for piece in rows), *rest), rows)


def _row_ranges(model: ModelConfig, family: Family, name: str, shape: Shape) -> Iterator[RowRange]:
    """Sources of one of our tensors, in the order of its rows."""
    module, _, kind = name.rpartition(".")
    prefix = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"model.layers.{layer}."
    if family == "internlm2":
        yield RowRange(name, 0, f"{prefix}{_FUSED.get(module, module)}.{kind}", 0, shape[0])
        return
    if module != _QKV:
        yield RowRange(name, 0, f"{prefix}{_SPLIT[module]}.{kind}", 0, shape[0])
        return
    head, queries = model.head_size, model.num_attention_heads // model.kv_heads
    start = 0
    for group in range(model.kv_heads):
        for letter, heads in (("q", queries), ("k", 1), ("v", 1)):
            count = heads * head
            yield RowRange(name, start, f"{prefix}self_attn.{letter}_proj.{kind}", group * count, count)
            start += count
