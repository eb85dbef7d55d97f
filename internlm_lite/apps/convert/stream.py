"""Tensor files converted while they are written, a few megabytes at a time, for models of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from internlm_lite.apps.convert.recipes import Shape, TensorRecipe
from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, TensorFile
from internlm_lite.errors import CheckpointError
from internlm_lite.units import human_count

_READ_BYTES = 2 * BLOCK_BYTES


class RowSource(Protocol):
    """A set of tensors that are read by rows."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name -> shape."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor, in host memory that is valid until the next call."""


class ConvertedFile(TensorFile):
    """The tensors of the recipes, cast to `dtype`. `done` is called with the key of each written tensor.

    Iterating raises CheckpointError naming a tensor with values too large for `dtype`, and errors of the source.
    """

    def __init__(
        self, recipes: Mapping[str, TensorRecipe], dtype: torch.dtype, source: RowSource, done: Callable[[str], object]
    ) -> None:
        super().__init__({key: torch.empty(t.shape, dtype=dtype, device="meta") for key, t in recipes.items()})
        self._recipes, self._dtype, self._source, self._done = recipes, dtype, source, done
        self._kept: tuple[str, torch.Tensor] | None = None

    def blocks_of(self, key: str, tensor: torch.Tensor) -> Iterator[bytes]:
        return self.converted(key)

    def converted(self, key: str) -> Iterator[bytes]:
        """The bytes of one tensor in blocks of BLOCK_BYTES."""
        block = bytearray()
        for part in self._parts(self._recipes[key]):
            data = part.contiguous().view(-1).view(torch.uint8).numpy().data
            done = 0
            while done < len(data):
                piece = data[done : done + BLOCK_BYTES - len(block)]
                block += piece
                done += len(piece)
                if len(block) == BLOCK_BYTES:
                    yield bytes(block)
                    block.clear()
        if block:
            yield bytes(block)
        self._done(key)

    def _parts(self, recipe: TensorRecipe) -> Iterator[torch.Tensor]:
        row_bytes = torch.Size(recipe.shape[1:]).numel() * 4
        step = max(1, _READ_BYTES // row_bytes)
        if not recipe.rows:
            yield torch.zeros(recipe.shape, dtype=self._dtype)
        if recipe.transposed == "result":
            pieces = [self._source.read(rows.name, rows.start, rows.stop).clone() for rows in recipe.rows]
            yield from (self._cast(part, recipe.name) for part in torch.cat(pieces).T.split(step))
            return
        for rows in recipe.rows:
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                part = self._source.read if recipe.transposed is None else self._read_transposed
                yield self._cast(part(rows.name, start, stop), recipe.name)

    def _read_transposed(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As `RowSource.read`, of the transposed tensor; the last one is kept, whole."""
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            self._kept = name, self._source.read(name, 0, self._source.shapes[name][0]).T
        return self._kept[1][start:stop]

    def _cast(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        made = rows.to(self._dtype)
        if self._dtype != rows.dtype and not torch.isfinite(made).all():
            lost = int((torch.isfinite(rows) & ~torch.isfinite(made)).sum())
            if lost:
                remedy = "choose --dtype bfloat16" if self._dtype == torch.float16 else "correct them"
                raise CheckpointError(f"{name}: {human_count(lost)} values are too large for {self._dtype}: {remedy}")
        return made
