"""The part of each packed row that a rank runs: all of it, or its share of tokens under context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from internlm_lite.batch import Batch
from internlm_lite.config.schema import Config
from internlm_lite.layers.context_parallel.exchanges import EXCHANGES, Exchange
from internlm_lite.layers.context_parallel.ring import ring
from internlm_lite.layers.context_parallel.row import ContextRow, context_row, layers_by_window
from internlm_lite.layers.flash import Attend, AttentionBackend, Borders, packed, packed_across
from internlm_lite.layers.rope import document_lengths
from internlm_lite.layers.scores import Drop
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group, Mesh
from internlm_lite.models.decoder import SourceRow


class OwnRow(Protocol):
    """This rank's part of one micro-batch."""

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """The part of a tensor [.., T] about all tokens that is about this rank's."""

    def lengths(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Of positions [T] of the whole row, the lengths of its own tokens' documents; None: it has whole documents."""

    def attend(self, backend: AttentionBackend, drop: Drop | None) -> Attend:
        """Attention of its own tokens; `drop` is given numbers of tokens of the whole row."""


@dataclass(frozen=True)
class WholeRow:
    """All of a row."""

    batch: Batch
    micro: int

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def lengths(self, positions: torch.Tensor) -> torch.Tensor | None:
        return None

    def attend(self, backend: AttentionBackend, drop: Drop | None) -> Attend:
        batch, micro = self.batch, self.micro
        return packed(backend, batch.cu_seqlens[micro], batch.cu_seqlens_host[micro], batch.max_seqlen, drop)


@dataclass(frozen=True)
class PartOfRow:
    """A context-parallel rank's tokens of a row."""

    row: ContextRow
    group: Group
    exchange: Exchange

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return self.row.cut(x)

    def lengths(self, positions: torch.Tensor) -> torch.Tensor | None:
        return self.row.cut(document_lengths(positions))

    def attend(self, backend: AttentionBackend, drop: Drop | None) -> Attend:
        return self.exchange(self.row, self.group, backend, drop)


def source_row(
    batch: Batch,
    micro: int,
    backend: AttentionBackend,
    drops: tuple[Drop | None, Drop | None],
    token_keys: torch.Tensor | None,
) -> SourceRow | None:
    """The source row of a micro-batch; None: there is none. `drops`: of attention inside it and of the target's tokens
    to it. `token_keys` [2, S]."""
    source = batch.source
    if source is None:
        return None
    target, own = (
        Borders(one.cu_seqlens[micro], one.cu_seqlens_host[micro], one.max_seqlen) for one in (batch, source)
    )
    inside = packed(backend, own.cu_seqlens, own.cu_seqlens_host, own.max_seqlen, drops[0])
    across = packed_across(backend, target, own, drops[1])
    return SourceRow(source.tokens[micro], source.positions[micro], inside, across, token_keys)


Rows = Callable[[Batch], list[OwnRow]]
"""This rank's part of each micro-batch."""


def own_rows(config: Config, mesh: Mesh) -> Rows:
    """How the rows of a run are cut. Reads no tensor. Collective over cp."""
    group, model = mesh.cp, config.model
    if group.size == 1:
        return lambda batch: [WholeRow(batch, micro) for micro in range(batch.micro_num)]
    layers = layers_by_window([model.window(layer) for layer in range(model.num_layers)])
    exchange = EXCHANGES[config.parallel.context.exchange]
    if exchange is ring:  # sends messages between some of the ranks
        comm.meet(group, mesh.device)

    def rows(batch: Batch) -> list[OwnRow]:
        cut = [context_row(ends, layers, group.size, group.rank, mesh.device) for ends in batch.cu_seqlens_host]
        return [PartOfRow(row, group, exchange) for row in cut]

    return rows
