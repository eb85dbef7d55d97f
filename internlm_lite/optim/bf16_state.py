"""State of an update rule in bf16: computed in the dtype of the master weights, then rounded at random to one of its
two neighbours, so that it is right on average. Rounded to the nearest, an average with beta2 0.999 would stand still:
it moves by a thousandth of a difference, and half the distance of two neighbours is up to 1/256.

The random bits are a hash of (seed, number of the update, tensor, role, place of the element in the whole tensor). So
every layout, every replica and a resumed run round alike, and no generator has a state. 0 stays exactly 0, and what
bf16 can hold is not changed, so a skipped step changes no bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from internlm_lite.optim.update_rule import Piece, Shard

_CHUNK = 1 << 22
"""Elements rounded at a time: bounds the memory of their places and hashes."""


class Bf16State:
    """The state of shards in bf16, and one copy in the dtype of the weights, for a shard at a time, that has memory
    only while it is used."""

    def __init__(self, shards: Sequence[Shard], seed: int) -> None:
        """`shards`: with state in bf16."""
        self._seed = seed
        self._shards = shards
        roles = sorted({role for shard in shards for role in shard.state})
        size, like = max(shard.weights.numel() for shard in shards), shards[0].weights
        self._spaces = {role: like.new_empty(size) for role in roles}

    def working(self, index: int) -> Shard:
        """Shard `index` with state in the copy, for a rule to keep; what it holds is valid between `read` and
        `write`. Before the first `release`."""
        shard = self._shards[index]
        state = {role: self._spaces[role][: shard.weights.numel()] for role in shard.state}
        return Shard(shard.weights, state, shard.pieces, shard.holders)

    def allocate(self) -> None:
        """Before the shards of a step are updated; `release` afterwards."""
        for space in self._spaces.values():
            space.untyped_storage().resize_(space.numel() * space.element_size())

    def release(self) -> None:
        for space in self._spaces.values():
            space.untyped_storage().resize_(0)

    def read(self, index: int) -> None:
        """Copy the state of shard `index` to the working copy."""
        for role, stored in self._shards[index].state.items():
            self._spaces[role][: stored.numel()].copy_(stored)

    def write(self, index: int, updates: torch.Tensor) -> None:
        """Round the working copy into the state of shard `index`. `updates`: int64 device scalar, those before."""
        shard = self._shards[index]
        for role, stored in shard.state.items():
            for piece in shard.pieces:
                key = _key(self._seed, piece.param.shard_spec.name, role)
                for start in range(piece.start, piece.stop, _CHUNK):
                    stop = min(start + _CHUNK, piece.stop)
                    bits = random_bits(_places(piece, start, stop), key, updates)
                    stored[start:stop] = rounded(self._spaces[role][start:stop], bits)


def _key(seed: int, name: str, role: str) -> int:
    return zlib.crc32(f"{seed} {name} {role}".encode())


def _places(piece: Piece, start: int, stop: int) -> torch.Tensor:
    """[stop - start] int64: where elements start..stop-1 of the shard are in the whole tensor, row-major."""
    spec, first = piece.param.shard_spec, piece.first + start - piece.start
    rest = torch.arange(first, first + stop - start, device=piece.param.device)
    places, stride = torch.zeros_like(rest), 1
    for (low, high), size in zip(reversed(spec.box), reversed(spec.shape), strict=True):
        places += (rest % (high - low) + low) * stride
        rest //= high - low
        stride *= size
    return places


def random_bits(places: torch.Tensor, key: int, updates: torch.Tensor) -> torch.Tensor:
    """[n] int32 in 0..65535. (Mixing steps: lowbias32 of C. Wellons' hash-prospector; the number of the update and the
    upper halves of places enter between two rounds of it.)"""
    mixed = _mixed(_mixed((places & 0xFFFFFFFF) ^ key) ^ (places >> 32))
    return (_mixed(mixed ^ _mixed(updates & 0xFFFFFFFF)) & 0xFFFF).to(torch.int32)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """int64 tensors that hold unsigned 32-bit numbers."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def rounded(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """bf16: `values` rounded away from 0 with a probability of how far they are from the neighbour nearer to 0.
    Infinity and NaN stay."""
    single = values.float()
    up = (single.view(torch.int32) + bits) & -65536  # the upper half of an fp32 number is a bf16 number
    return torch.where(single.isfinite(), up.view(torch.float32), single).bfloat16()
