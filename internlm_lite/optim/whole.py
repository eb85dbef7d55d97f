"""Whole parameters of a shard, for rules that need them: tensor-parallel ranks hold a part of each.

    shard of rank 0:  | a0 | b0 | c0 |        rank 0 owns a      collect -> a0 a1
    shard of rank 1:  | a1 | b1 | c1 |        rank 1 owns b, c   collect -> b0 b1, c0 c1;   hand_out: the way back

One rank computes for all: so all have the same bits, and each does its share of the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter
from internlm_lite.optim.update_rule import Shard


def share_out(costs: Sequence[int], loads: list[int]) -> list[int]:
    """The owner of each task of these costs: largest first, to the rank with the least so far. Adds to `loads`."""
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


class WholeParameters:
    """Those of one shard, in which no parameter is split but over `shard.holders`."""

    def __init__(self, shard: Shard, costs: Sequence[int], loads: list[int]) -> None:
        """`costs`: of the work on each of the shard's pieces. `loads`: of each holder's work on earlier shards; that on
        this one is added."""
        self._holders = shard.holders if shard.pieces else None  # nothing is exchanged of a shard of padding
        size, rank = (self._holders.size, self._holders.rank) if self._holders else (1, 0)
        by_owner = sorted(zip(share_out(costs, loads), shard.pieces, strict=True), key=lambda pair: pair[0])
        self._pieces = [piece for _, piece in by_owner]
        self.owned = [piece.param for owner, piece in by_owner if owner == rank]
        """Parameters on which this rank works."""
        self._counts = [0] * size  # elements of this rank that go to each owner
        for owner, piece in by_owner:
            self._counts[owner] += piece.stop - piece.start

    def collect(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The whole tensors of `owned` out of every holder's `flat`, which is laid out as the shard; views of it
        without other holders. Collective."""
        parts = [flat[piece.start : piece.stop] for piece in self._pieces]
        if self._holders is None:
            return [part.view(param.shape) for part, param in zip(parts, self.owned, strict=True)]
        size, mine = self._holders.size, self._counts[self._holders.rank]
        received = flat.new_empty(size, mine)
        comm.all_to_all(received.view(-1), torch.cat(parts), self._holders, ([mine] * size, self._counts)).wait()
        columns = received.split([param.numel() for param in self.owned], dim=1)
        return [_joined(part, param) for part, param in zip(columns, self.owned, strict=True)]

    def hand_out(self, wholes: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
        """Overwrite every holder's `flat` with its parts of the owners' `wholes`, which have its dtype. Collective."""
        if self._holders is None:
            parts: Sequence[torch.Tensor] = [whole.reshape(-1) for whole in wholes]
        else:
            size, mine = self._holders.size, self._counts[self._holders.rank]
            columns = [_parted(whole, param, size) for whole, param in zip(wholes, self.owned, strict=True)]
            sent = torch.cat(columns, dim=1) if columns else flat.new_empty(size, 0)
            received = flat.new_empty(sum(self._counts))
            comm.all_to_all(received, sent.view(-1), self._holders, (self._counts, [mine] * size)).wait()
            parts = received.split([piece.stop - piece.start for piece in self._pieces])
        for piece, part in zip(self._pieces, parts, strict=True):
            flat[piece.start : piece.stop].copy_(part)


def _split_dim(param: Parameter) -> int:
    """The dimension along which ranks hold parts, evenly and in their order."""
    return int(param.shard_spec.shape[0] == param.shape[0])


def _joined(parts: torch.Tensor, param: Parameter) -> torch.Tensor:
    """[size, numel of a part] -> [R, C]"""
    return torch.cat([part.view(param.shape) for part in parts], dim=_split_dim(param))


def _parted(whole: torch.Tensor, param: Parameter, size: int) -> torch.Tensor:
    """The opposite of `_joined`."""
    return torch.stack([part.reshape(-1) for part in whole.chunk(size, dim=_split_dim(param))])
