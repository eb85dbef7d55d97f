"""The interface between data and model: M micro-batches of T packed tokens for one data-parallel rank.

row:     [ document A ......... | document B ... | C ]      T = micro_bsz * seq_len tokens
cu_seqlens: 0 ----------------- a -------------- b - T T T  (padded with T up to max_docs + 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of a token without one (`torch.nn.functional.cross_entropy`'s default ignore_index)."""


@dataclass(frozen=True)
class Position:
    """A position in the data order, which is defined by these numbers alone."""

    batch: int = 0
    """Global batches consumed, trained on or skipped; also the id of the next one."""
    packs: int = 0
    """Packed rows consumed over all data-parallel ranks."""
    borders: tuple[int, ...] = ()
    """`packs` where each phase of the data but the first began (data/phases.py)."""


@dataclass(frozen=True)
class PassStep:
    """Where a batch is in its pass over the pairs of all folders."""

    epoch: int
    """Passes before."""
    epoch_step: int
    """Micro-batches of a data-parallel rank in this pass, up to the end of this batch."""
    accumulation_step: int
    """Batches in this pass, which are updates, this one included."""


@dataclass(frozen=True)
class BatchStats:
    """Composition of one rank's batch, as the step line prints it. A segment is one attention span."""

    num_samples: int
    """Segments in all micro-batches."""
    largest_length: int
    """Tokens of the longest segment."""
    largest_batch: int
    """Most segments in one micro-batch."""
    smallest_batch: int
    """Fewest segments in one micro-batch."""
    num_tokens: int
    """All tokens, M * T."""
    num_labels: int
    """Tokens with a label (label != IGNORE)."""
    in_pass: PassStep | None = None
    """Of pairs without weights or ramp-up."""


@dataclass(frozen=True)
class SourceRows:
    """What the encoder reads: beside each row of T target tokens one of S source tokens, packed the same way. Document
    i of the one belongs to document i of the other: both have as many, in one order. What fills a row behind its pairs
    is their last document, on both sides: it may be empty on one of them, and has no labels."""

    tokens: torch.Tensor  # [M, S] int64
    positions: torch.Tensor  # [M, S] int64, position inside the document, from 0
    cu_seqlens: torch.Tensor  # [M, max_docs + 1] int32, boundaries of documents, padded with S
    cu_seqlens_host: tuple[tuple[int, ...], ...]  # the same without padding: each as long as that of the target row
    max_seqlen: int  # longest document of all micro-batches

    def to(self, device: torch.device) -> SourceRows:
        """The same rows on `device`; asynchronous from pinned memory."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "positions", "cu_seqlens")
        }
        return SourceRows(**moved, cu_seqlens_host=self.cu_seqlens_host, max_seqlen=self.max_seqlen)


@dataclass(frozen=True)
class Batch:
    """One rank's part of one step. All tensors are on the same device except `cu_seqlens_host`."""

    tokens: torch.Tensor  # [M, T] int64
    labels: torch.Tensor  # [M, T] int64, already shifted, IGNORE: no label
    positions: torch.Tensor  # [M, T] int64, position inside the segment, from 0
    folders: torch.Tensor  # [M, T] int32, index into the run's list of data folders
    rows: torch.Tensor  # [M] int64, number of each row in the step's global batch; evaluation uses none
    cu_seqlens: torch.Tensor  # [M, max_docs + 1] int32, boundaries of segments, padded with T
    cu_seqlens_host: tuple[tuple[int, ...], ...]  # the same without padding, M tuples of Python ints
    max_seqlen: int  # longest segment of all micro-batches
    after: Position  # the data order's position once this batch is consumed
    stats: BatchStats
    stage: int = 0  # number of the stage of the run that it belongs to
    source: SourceRows | None = None  # of an encoder-decoder, whose target side all else is

    @property
    def micro_num(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; asynchronous from pinned memory."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "labels", "positions", "folders", "rows", "cu_seqlens")
        }
        return Batch(
            **moved,
            cu_seqlens_host=self.cu_seqlens_host,
            max_seqlen=self.max_seqlen,
            after=self.after,
            stats=self.stats,
            stage=self.stage,
            source=None if self.source is None else self.source.to(device),
        )
