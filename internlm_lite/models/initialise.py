"""Initial weights that do not depend on the mesh: drawn by (seed, name, tile) of the whole tensor, then cut.

    whole tensor:  [ tile 0,0 | tile 0,1 ]     a rank draws the tiles its box touches and keeps what lies inside
                   [ tile 1,0 | tile 1,1 ]

Draws are float32, then cast. They are NumPy's, because torch's depend on the vector units of the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from internlm_lite.mesh.layout import Parameter, ShardSpec

_TILE = 1024
"""Rows and columns drawn with one key. Part of the definition of the weights: changing it changes every run."""


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter as its layout says: normal with `init_std`, or the constant `fill`."""
    for parameter in model.parameters():
        assert isinstance(parameter, Parameter), "parameters of the model know their layout"
        layout = parameter.shard_spec
        if layout.init_std is None:
            parameter.fill_(layout.fill)
        else:
            for region, values in _drawn(layout, layout.init_std, seed):
                parameter[region].copy_(torch.from_numpy(values))


def _drawn(layout: ShardSpec, std: float, seed: int) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """(region of this rank's tensor, its values) for every tile that the box touches."""
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
    """float32 normal draws."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(std)
