"""Initial weights that do not depend on the mesh: the random key is (seed, name, tile of the whole tensor).

    whole tensor:  [ tile 0,0 | tile 0,1 ]     a rank draws the tiles that intersect its box and keeps the
                   [ tile 1,0 | tile 1,1 ]     elements inside

Values are drawn in float32, then cast. NumPy draws them, because torch's draws depend on the CPU's vector units, and a
tile per thread: NumPy and torch release Python's lock while they draw and copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from internlm_lite.mesh.layout import Parameter, ShardSpec

_TILE = 1024
"""Rows and columns of a tile, which one key draws. Changing it changes the initial weights of every run."""


@dataclass(frozen=True)
class _Tile:
    """A tile that intersects this rank's box of a parameter."""

    key: str
    shape: tuple[int, int]
    std: float
    inside: tuple[slice, slice]
    """The elements inside the box."""
    target: torch.Tensor
    """Their place in the parameter."""

    def draw(self) -> None:
        """Overwrite `target` by draws from a normal distribution of mean 0, a function of `key`."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
        values = generator.standard_normal(self.shape, dtype=np.float32)
        values *= np.float32(self.std)
        if self.target.is_cuda:  # a new thread's device is GPU 0, where any call would allocate a context
            torch.cuda.set_device(self.target.device)
        self.target.copy_(torch.from_numpy(values[self.inside]))


def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter as its `shard_spec` says: normal with `init_std` (matrices only), or the constant `fill`.

    On as many threads as torch uses, each with torch alone."""
    tiles: list[_Tile] = []
    for parameter in model.parameters():
        assert isinstance(parameter, Parameter), "parameters of the model know their layout"
        layout, values = parameter.shard_spec, parameter.detach()
        if layout.init_std is None:
            values.fill_(layout.fill)
        else:
            tiles += _tiles(layout, values, layout.init_std, seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, "initial weights") as pool:
            for _ in pool.map(_Tile.draw, tiles):
                pass
    finally:
        torch.set_num_threads(threads)


def _tiles(layout: ShardSpec, values: torch.Tensor, std: float, seed: int) -> Iterator[_Tile]:
    """The tiles that intersect the box of this rank, whose `values` are to be drawn."""
    assert len(layout.shape) == 2, f"{layout.name}: only matrices are drawn, found shape {layout.shape}"
    (top, bottom), (left, right) = layout.box
    for row in range(top // _TILE * _TILE, bottom, _TILE):
        for column in range(left // _TILE * _TILE, right, _TILE):
            shape = (min(_TILE, layout.shape[0] - row), min(_TILE, layout.shape[1] - column))
            rows_inside, rows = _intersection(row, shape[0], top, bottom)
            columns_inside, columns = _intersection(column, shape[1], left, right)
            key, inside = f"{seed}:{layout.name}:{row}:{column}", (rows_inside, columns_inside)
            yield _Tile(key, shape, std, inside, values[rows, columns])


def _intersection(start: int, length: int, first: int, end: int) -> tuple[slice, slice]:
    """What `length` elements from `start` share with first..end-1, counted from `start` and from `first`."""
    low, high = max(start, first), min(start + length, end)
    return slice(low - start, high - start), slice(low - first, high - first)
