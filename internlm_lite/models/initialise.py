"""Initial weights that do not depend on the mesh: the random key is (seed, name, tile of the whole tensor).

    whole tensor:  [ tile 0,0 | tile 0,1 ]     a rank draws the tiles that intersect its box and keeps the
                   [ tile 1,0 | tile 1,1 ]     elements inside

Values are drawn in float32, then cast. NumPy draws them, because torch's draws depend on the CPU's vector units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from internlm_lite.mesh.layout import Parameter, ShardSpec

_TILE = 1024
"""Rows and columns of a tile, which one key draws. Changing it changes the initial weights of every run."""


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter as its `shard_spec` says: normal with `init_std` (matrices only), or the constant `fill`."""
    for parameter in model.parameters():
        assert isinstance(parameter, Parameter), "parameters of the model know their layout"
        layout = parameter.shard_spec
        if layout.init_std is None:
            parameter.fill_(layout.fill)
        else:
            for region, values in _drawn(layout, layout.init_std, seed):
                parameter[region].copy_(torch.from_numpy(values))


def _drawn(layout: ShardSpec, std: float, seed: int) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """(region of this rank's tensor, its float32 values) for every tile that intersects the rank's box."""
    assert len(layout.shape) == 2, f"{layout.name}: only matrices are drawn, found shape {layout.shape}"
    (top, bottom), (left, right) = layout.box
    for row in range(top // _TILE * _TILE, bottom, _TILE):
        for column in range(left // _TILE * _TILE, right, _TILE):
            shape = (min(_TILE, layout.shape[0] - row), min(_TILE, layout.shape[1] - column))
            tile = _tile(f"{seed}:{layout.name}:{row}:{column}", shape, std)
            rows = slice(max(row, top), min(row + _TILE, bottom))
            columns = slice(max(column, left), min(column + _TILE, right))
            values = tile[rows.start - row : rows.stop - row, columns.start - column : columns.stop - column]
            yield (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)), values


def _tile(key: str, shape: tuple[int, int], std: float) -> np.ndarray:
    """[shape] float32 draws from a normal distribution of mean 0, a function of `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(std)
