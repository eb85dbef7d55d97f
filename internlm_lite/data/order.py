"""Which rows make up which batch: pure functions of the position, so that a resume needs no stored order.

    row sequence   r0 r1 r2 r3 | r4 r5 r6 r7 | ...       a global batch is the next micro_num * dp rows
    dp rank 0 of 2 r0    r2    | r4    r6    | ...       every dp-th row, one per micro-batch

Global batches depend only on the product micro_num * dp.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from internlm_lite.batch import Position
from internlm_lite.config.ranges import Rampup


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), int64; the same on every machine and numpy release (RandomState is frozen)."""
    order = np.arange(count)
    np.random.RandomState((seed + epoch) % 2**32).shuffle(order)
    return order


@dataclass(frozen=True)
class BatchOrder:
    """Cuts the endless row sequence into global batches."""

    micro_num: int
    dp_size: int
    skip: tuple[range, ...] = ()
    """Ids of batches that are consumed but not trained on."""
    rampup: Rampup | None = None
    phase_starts: tuple[int, ...] = ()
    """Ids of the batches with which the data's phases begin, except the first phase."""

    def take(self, position: Position) -> tuple[range, Position]:
        """The row numbers of the next batch to train on, over all dp ranks, and the position after it.

        Skipped batches in between are consumed. The position after it has the borders of the phases up to its own.
        """
        while True:
            borders = self._borders(position)
            rows = range(position.packs, position.packs + self.micro_num_of(position.batch) * self.dp_size)
            batch, position = position.batch, Position(position.batch + 1, rows.stop, borders)
            if not any(batch in ids for ids in self.skip):
                return rows, position

    def after_batches(self, position: Position, batch: int, rows: int) -> Position:
        """The position before batch `batch` of the same phase as the next one, with `rows` rows in between."""
        return Position(batch, position.packs + rows, self._borders(position))

    def _borders(self, position: Position) -> tuple[int, ...]:
        """Borders up to the phase of the next batch, which may be the first of its phase. After a resume with other
        stages those that are missing are here."""
        number = bisect_right(self.phase_starts, position.batch)
        known = position.borders[:number]
        return known + (position.packs,) * (number - len(known))

    def share(self, rows: range, dp_rank: int) -> range:
        """The rows of one rank in a global batch, one per micro-batch."""
        return rows[dp_rank :: self.dp_size]

    def micro_num_of(self, batch: int) -> int:
        """Number of micro-batches per rank in batch `batch`."""
        return self.micro_num if self.rampup is None else self.rampup.micro_num(batch, self.micro_num)
