"""One endless sequence of rows from several folders: row number -> (folder, row of the folder), in closed form.

EpochMix      all rows of all folders once per epoch, shuffled together
WeightedMix   folder shares by weight; each folder is shuffled separately and has its own epochs

weighted, blocks of B rows:  folder f has had  taken_f(k) = round(k B W_f) - round(k B W_f-1)  rows before block k,
                             W the cumulated weights: whole numbers that sum to k B, within one row of the share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

from internlm_lite.data.order import shuffled
from internlm_lite.errors import DataError

BLOCK_ROWS = 1024
"""Fewest rows of a weighted block; folder shares hold within each block."""


class Mix(Protocol):
    """An endless sequence of rows."""

    @property
    def epoch_rows(self) -> int | None:
        """Rows of one pass over all folders; None: each folder has passes of its own."""

    def rows_of_folders(self, rows: range) -> list[tuple[int, int]]:
        """(folder, row of the folder) for each row number."""


class EpochMix:
    """Every row once per epoch. The epoch's tail that fills no global batch of `batch_rows` is dropped."""

    def __init__(self, counts: Sequence[int], seed: int, batch_rows: int) -> None:
        """counts: rows of each folder, sum >= batch_rows."""
        total = sum(counts)
        self.epoch_rows = total - total % batch_rows
        self._starts = np.cumsum([0, *counts])
        self._order = lru_cache(2)(lambda epoch: shuffled(total, seed, epoch))

    def rows_of_folders(self, rows: range) -> list[tuple[int, int]]:
        ids = np.array([self._order(row // self.epoch_rows)[row % self.epoch_rows] for row in rows])
        folders = np.searchsorted(self._starts, ids, side="right") - 1
        return list(zip(folders.tolist(), (ids - self._starts[folders]).tolist(), strict=True))


class WeightedMix:
    """Folder shares proportional to the weights, independent of the folders' sizes."""

    epoch_rows = None

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """counts: rows of each folder, all > 0. weights: all > 0, in any unit."""
        self._counts, self._seed = counts, seed
        # with fewer rows, rounding could make a count negative
        self._block_rows = max(BLOCK_ROWS, 2 * int(sum(weights) / min(weights)))
        cumulated = list(accumulate(weights))
        # Fixed point: exact integer arithmetic, equal on all machines at any row number.
        self._bounds = [0, *(round(bound / cumulated[-1] * 2**40) for bound in cumulated)]
        self._block = lru_cache(2)(self._draw_block)
        self._order = lru_cache(2 * len(counts))(lambda folder, epoch: shuffled(counts[folder], seed, epoch))

    def rows_of_folders(self, rows: range) -> list[tuple[int, int]]:
        found = []
        for row in rows:
            folders, nth = self._block(row // self._block_rows)
            folder, n = int(folders[row % self._block_rows]), int(nth[row % self._block_rows])
            epoch, k = divmod(n, self._counts[folder])
            found.append((folder, int(self._order(folder, epoch)[k])))
        return found

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


def build_mix(rows: Mapping[str, int], weights: Mapping[str, float] | None, seed: int, batch_rows: int) -> Mix:
    """The row sequence of folders, given by name and number of rows.

    Raises DataError when the folders hold less than one global batch, or `weights` (data.weights) names other folders.
    """
    names, counts = list(rows), list(rows.values())
    if sum(counts) < batch_rows:
        raise DataError(
            f"the training data fill {sum(counts)} rows of micro_bsz * seq_len tokens, expected at least {batch_rows} "
            f"(micro_num * data-parallel ranks) for one batch; add data, or lower data.micro_num, micro_bsz or seq_len"
        )
    if weights is None:
        return EpochMix(counts, seed, batch_rows)
    unknown = [name for name in weights if name not in names]
    missing = [name for name in names if name not in weights]
    if unknown or missing:
        hints = {name: get_close_matches(name, names, 1) for name in unknown}
        found = [
            f"{name!r} is no folder with data{f', did you mean {hint[0]!r}?' if hint else ''}"
            for name, hint in hints.items()
        ]
        found += [f"folder {name!r} has no weight" for name in missing]
        raise DataError(f"data.weights: {'; '.join(found)}; expected one weight for each of {', '.join(names)}")
    return WeightedMix(counts, [weights[name] for name in names], seed)
