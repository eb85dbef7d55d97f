"""One endless sequence of rows from several folders: row number -> (folder, row of the folder), in closed form.

EpochMix      all rows of all folders once per epoch, shuffled together
WeightedMix   folder shares by weight; each folder is shuffled separately and has its own epochs

weighted, blocks of B rows:  folder f has had  taken_f(k) = round(k B W_f) - round(k B W_f-1)  rows before block k,
                             W the cumulated weights: whole numbers that sum to k B, within one row of the share

Where an earlier phase of the data left a pass unfinished (phases.py), each folder begins with its `rest`: rows 0 to
rest - 1 hold what that pass has not read, and come once, before all others; row rest + r is row r of the whole folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Protocol

import numpy as np

from internlm_lite.data.order import shuffled
from internlm_lite.errors import DataError

BLOCK_ROWS = 1024
"""Fewest rows of a weighted block; folder shares hold within each block."""
_MOST_COUNTED = 1 << 24
"""Rows that are counted one by one to say what each folder contributes."""
_REST = -1
"""Number of the epoch that shuffles the rest."""


@dataclass(frozen=True)
class FolderProgress:
    """How far a folder has been read."""

    passes: int
    """Passes that ended, that over the rest among them."""
    in_rest: bool
    unread: np.ndarray | None
    """Rows of the rest, or of the whole folder, that the pass under way has not read, rising; None: a pass begins."""


class Mix(Protocol):
    """An endless sequence of rows."""

    @property
    def epoch_rows(self) -> int | None:
        """Rows of one pass over all folders; None: each folder has passes of its own."""

    def rows_of_folders(self, rows: range) -> list[tuple[int, int]]:
        """(folder, row of the folder) for each row number."""

    def passes(self, rows: int) -> int:
        """Passes over all folders that end within the first `rows` rows; 0 where each folder has its own."""

    def taken(self, rows: int) -> np.ndarray:
        """[folders] how many of the first `rows` rows are of each folder."""

    def progress(self, rows: int) -> list[FolderProgress]:
        """Of each folder, after the first `rows` rows."""

    def find(self, folder: int, row: int, stop: int) -> list[int]:
        """The row numbers below `stop` at which a row of a folder comes."""


class EpochMix:
    """Every row once per epoch. The epoch's tail that fills no global batch of `batch_rows` is dropped."""

    def __init__(self, counts: Sequence[int], seed: int, batch_rows: int, rest: Sequence[int] | None = None) -> None:
        """counts: rows of each folder, sum >= batch_rows. rest: rows of the rest of each; None: there is none."""
        total, self._has_rest, rest = sum(counts), rest is not None, rest or [0] * len(counts)
        self.epoch_rows = total - total % batch_rows
        self._rest_rows = sum(rest)
        self._starts = {epoch: np.cumsum([0, *rows]) for epoch, rows in ((0, counts), (_REST, rest))}
        self._first_row = {0: np.array(rest), _REST: np.zeros(len(counts), np.int64)}
        sizes = {0: total, _REST: self._rest_rows}
        self._order = lru_cache(2)(lambda epoch: shuffled(sizes[min(epoch, 0)], seed, epoch))

    def rows_of_folders(self, rows: range) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for epoch, some in groupby(rows, self._epoch_of):
            ids = self._order(epoch)[[self._index(row, epoch) for row in some]]
            folders, numbers = self._located(ids, epoch)
            found += zip(folders.tolist(), (numbers + self._first_row[min(epoch, 0)][folders]).tolist(), strict=True)
        return found

    def passes(self, rows: int) -> int:
        return self._epoch_of(rows) + self._has_rest

    def taken(self, rows: int) -> np.ndarray:
        last = self._epoch_of(rows)
        counts = self._counted(last, self._index(rows, last))
        if last == _REST:
            return counts
        exact = min(last, max(1, _MOST_COUNTED // self.epoch_rows))
        for epoch in range(exact):
            counts += self._counted(epoch, self.epoch_rows)
        if exact < last:  # which rows are in the dropped tail of each of so many epochs makes no difference
            counts += (last - exact) * self._counted(0, self.epoch_rows)
        return counts + self._first_row[0]

    def _counted(self, epoch: int, rows: int) -> np.ndarray:
        """[folders] rows of each folder among the first `rows` of an epoch."""
        return np.bincount(self._located(self._order(epoch)[:rows], epoch)[0], minlength=len(self._first_row[0]))

    def progress(self, rows: int) -> list[FolderProgress]:
        epoch = self._epoch_of(rows)
        index, passes, in_rest = self._index(rows, epoch), self.passes(rows), epoch == _REST
        folders, numbers = self._located(self._order(epoch)[index:], epoch)
        begins = not in_rest and index == 0
        return [
            FolderProgress(passes, in_rest, None if begins else np.sort(numbers[folders == folder]))
            for folder in range(len(self._first_row[0]))
        ]

    def find(self, folder: int, row: int, stop: int) -> list[int]:
        first = int(self._first_row[0][folder])
        if row < first:
            at = np.flatnonzero(self._order(_REST) == row + self._starts[_REST][folder])
            return [number for number in at.tolist() if number < stop]
        wanted, found = row - first + self._starts[0][folder], []
        for epoch in range(max(0, self._epoch_of(stop - 1)) + 1):
            at = np.flatnonzero(self._order(epoch)[: self.epoch_rows] == wanted)
            found += [self._rest_rows + epoch * self.epoch_rows + index for index in at.tolist()]
        return [number for number in found if number < stop]

    def _epoch_of(self, row: int) -> int:
        """Number of the epoch that row number `row` is in."""
        return (row - self._rest_rows) // self.epoch_rows if row >= self._rest_rows else _REST

    def _index(self, row: int, epoch: int) -> int:
        """Of row number `row` in its epoch."""
        return row if epoch == _REST else row - self._rest_rows - epoch * self.epoch_rows

    def _located(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Entries of an epoch's order -> folders, and rows of the rest or of the whole folder."""
        starts = self._starts[min(epoch, 0)]
        folders = np.searchsorted(starts, ids, side="right") - 1
        return folders, ids - starts[folders]


class WeightedMix:
    """Folder shares proportional to the weights, independent of the folders' sizes."""

    epoch_rows = None

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float], seed: int, rest: Sequence[int] | None = None
    ) -> None:
        """counts: rows of each folder, > 0 where its weight is. weights: in any unit, at least one > 0. rest: rows of
        the rest of each; None: there is none."""
        self._counts, self._seed, self._has_rest = counts, seed, rest is not None
        self._rest = list(rest or [0] * len(counts))
        # with fewer rows, rounding could make a count negative
        self._block_rows = max(BLOCK_ROWS, 2 * int(sum(weights) / min(filter(None, weights))))
        cumulated = list(accumulate(weights))
        # Fixed point: exact integer arithmetic, equal on all machines at any row number.
        self._bounds = [0, *(round(bound / cumulated[-1] * 2**40) for bound in cumulated)]
        self._block = lru_cache(2)(self._draw_block)
        self._order = lru_cache(2 * len(counts))(
            lambda folder, epoch: shuffled((self._rest if epoch == _REST else counts)[folder], seed, epoch)
        )

    def rows_of_folders(self, rows: range) -> list[tuple[int, int]]:
        found = []
        for row in rows:
            folders, nth = self._block(row // self._block_rows)
            folder, n = int(folders[row % self._block_rows]), int(nth[row % self._block_rows])
            epoch, k = self._split(folder, n)
            first = 0 if epoch == _REST else self._rest[folder]
            found.append((folder, first + int(self._order(folder, epoch)[k])))
        return found

    def passes(self, rows: int) -> int:
        return 0

    def taken(self, rows: int) -> np.ndarray:
        block, within = divmod(rows, self._block_rows)
        folders, _ = self._block(block)
        return self._taken(block) + np.bincount(folders[:within], minlength=len(self._counts))

    def progress(self, rows: int) -> list[FolderProgress]:
        return [self._progress(folder, n) for folder, n in enumerate(self.taken(rows).tolist())]

    def _progress(self, folder: int, n: int) -> FolderProgress:
        if not n:  # not a row of it was due: also if its rest has none
            return FolderProgress(0, self._has_rest, np.arange(self._rest[folder]) if self._has_rest else None)
        epoch, k = self._split(folder, n)
        unread = None if epoch != _REST and k == 0 else np.sort(self._order(folder, epoch)[k:])
        return FolderProgress(epoch + self._has_rest, epoch == _REST, unread)

    def find(self, folder: int, row: int, stop: int) -> list[int]:
        rest, taken, epochs = self._rest[folder], int(self.taken(stop)[folder]), [_REST]
        if row >= rest:
            epochs = list(range((max(0, taken - rest) - 1) // self._counts[folder] + 1)) if taken else []
        found = []
        for epoch in epochs:
            k = int(np.flatnonzero(self._order(folder, epoch) == (row if epoch == _REST else row - rest))[0])
            n = k if epoch == _REST else rest + epoch * self._counts[folder] + k
            found += [self._row_of(folder, n)] if n < taken else []
        return found

    def _row_of(self, folder: int, n: int) -> int:
        """The row number of the n-th row of a folder."""
        low, high = 0, 1
        while self._taken(high)[folder] <= n:
            high *= 2
        while low + 1 < high:  # the last block before which at most n rows were taken
            middle = (low + high) // 2
            low, high = (middle, high) if self._taken(middle)[folder] <= n else (low, middle)
        folders, nth = self._block(low)
        return low * self._block_rows + int(np.flatnonzero((folders == folder) & (nth == n))[0])

    def _split(self, folder: int, n: int) -> tuple[int, int]:
        """The n-th row of a folder -> (epoch, index in its order)."""
        rest = self._rest[folder]
        return divmod(n - rest, self._counts[folder]) if n >= rest else (_REST, n)

    def _taken(self, block: int) -> np.ndarray:
        """[folders] number of rows taken from each folder before this block."""
        ends = [(block * self._block_rows * bound + 2**39) >> 40 for bound in self._bounds]
        return np.diff(ends)

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of the block: its folder, and the number of rows taken from that folder before."""
        before, after = self._taken(block), self._taken(block + 1)
        folders = np.repeat(np.arange(len(before)), after - before)
        np.random.RandomState([self._seed % 2**32, block]).shuffle(folders)
        nth = np.empty_like(folders)
        for folder, (start, stop) in enumerate(zip(before, after, strict=True)):
            nth[folders == folder] = np.arange(start, stop)
        return folders, nth


def build_mix(
    rows: Mapping[str, int],
    weights: Mapping[str, float] | None,
    seed: int,
    batch_rows: int,
    rest: Sequence[int] | None = None,
    key: str = "data.weights",
) -> Mix:
    """The row sequence of folders, given by name and number of rows. rest: see the mixes.

    Raises DataError when the folders hold less than one global batch, or `weights`, found under `key`, names other
    folders. Those of a stage may leave folders out, `data.weights` may not.
    """
    names, counts = list(rows), list(rows.values())
    if sum(counts) < batch_rows:
        raise DataError(
            f"the training data fill {sum(counts)} rows of micro_bsz * seq_len tokens, expected at least {batch_rows} "
            f"(micro_num * data-parallel ranks) for one batch; add data, or lower data.micro_num, micro_bsz or seq_len"
        )
    if weights is None:
        return EpochMix(counts, seed, batch_rows, rest)
    unknown = [name for name in weights if name not in names]
    missing = [name for name in names if name not in weights] if key == "data.weights" else []
    if unknown or missing:
        hints = {name: get_close_matches(name, names, 1) for name in unknown}
        found = [
            f"{name!r} is no folder with data{f', did you mean {hint[0]!r}?' if hint else ''}"
            for name, hint in hints.items()
        ]
        found += [f"folder {name!r} has no weight" for name in missing]
        expected = "one weight for each of" if key == "data.weights" else "weights of some of"
        raise DataError(f"{key}: {'; '.join(found)}; expected {expected} {', '.join(names)}")
    if short := [name for name in weights if not rows[name]]:
        raise DataError(
            f"{key}: the documents of folder {short[0]!r} fill no row of micro_bsz * seq_len tokens, expected at least "
            "one; add data, take it out of the weights, or lower seq_len or micro_bsz"
        )
    return WeightedMix(counts, [weights.get(name, 0.0) for name in names], seed, rest)
