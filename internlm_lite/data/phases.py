"""The order of the rows over a run whose stages change mix or row length: a phase after the other.

    stages    0     | 1 (lr) | 2 (seq_len)   | 3 (weights)
    phases    0              | 1             | 2              stages in a row with the same mix and rows are one phase

A phase goes on where the folders stand: of each folder it first reads what the pass under way has left, packed into
rows of its own length, then whole passes. So no token comes again before all others of its folder have come, but for
the last tokens of a pass that fill no row. How many rows earlier phases read says the position (`Position.borders`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from internlm_lite.config.run_stages import RunStage
from internlm_lite.data.mix import Mix, build_mix
from internlm_lite.data.pack import PackedFolder, Passage
from internlm_lite.data.unread import unread_spans, within
from internlm_lite.errors import DataError

_SEEDS_APART = 1_000_003
"""Between the seeds of two phases; epochs count on from each."""


class RestThenWhole:
    """The rows of one folder in a later phase: those of the rest of a pass, then those of the whole folder."""

    def __init__(self, rest: PackedFolder, whole: PackedFolder) -> None:
        self.name, self.row_tokens = whole.name, whole.row_tokens
        self.rest, self.whole = rest, whole

    def fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `PackedFolder.fill`."""
        part, number = self._part(row)
        return part.fill(number, tokens, labels, positions)

    def passages(self, row: int) -> list[Passage]:
        """What a row holds, in order."""
        part, number = self._part(row)
        return part.passages(number)

    def rows_with(self, document: int) -> list[int]:
        """The rows that hold tokens of a document."""
        return self.rest.rows_with(document) + [self.rest.rows + row for row in self.whole.rows_with(document)]

    def _part(self, row: int) -> tuple[PackedFolder, int]:
        return (self.rest, row) if row < self.rest.rows else (self.whole, row - self.rest.rows)


@dataclass(frozen=True)
class FolderState:
    """How far a folder has been read."""

    passes: int = 0
    """Passes that ended."""
    unread: np.ndarray | None = None
    """Spans of its stream that the pass under way has not read; None: a pass begins."""


@dataclass(frozen=True)
class Phase:
    """The rows of one phase, numbered from 0."""

    packed: tuple[PackedFolder | RestThenWhole, ...]
    mix: Mix
    before: tuple[FolderState, ...]
    passes_before: int
    """Passes over all folders that ended before."""


class Phases:
    """All phases of a run. `at` is a pure function of the borders that a position has."""

    def __init__(self, folders: Sequence[PackedFolder], stages: Sequence[RunStage], seed: int, batch_rows: int) -> None:
        """`folders`: whole, of any row length. Raises DataError as `build_mix`, for the first phase that has a problem;
        how much of a folder is left then makes none."""
        self._folders, self._seed, self._batch_rows = tuple(folders), seed, batch_rows
        self._stages = [
            stage for stage in stages if not stage.number or stage.packing != stages[stage.number - 1].packing
        ]
        self.starts = tuple(stage.start for stage in self._stages[1:])
        """Ids of the batches with which the phases begin, except the first."""
        for number, stage in enumerate(self._stages):
            try:
                self._mix(number, [0] * len(folders) if number else None)
            except DataError as error:
                raise DataError(f"stage {stage.number}: {error}" if len(stages) > 1 else str(error)) from None
        self.at = lru_cache(4)(self._at)

    def number_of(self, batch: int) -> int:
        """The phase of a batch."""
        return bisect_right(self.starts, batch)

    def _at(self, borders: tuple[int, ...]) -> Phase:
        """The phase after these borders: numbers of rows consumed where each phase but the first began."""
        number = len(borders)
        whole = self._whole(number)
        if not number:
            return Phase(whole, self._mix(0, None), (FolderState(),) * len(whole), 0)
        last, rows = self.at(borders[:-1]), borders[-1] - (borders[-2] if number > 1 else 0)
        before = states_after(last, rows)
        rest = [
            folder if state.unread is None else folder.part(state.unread)
            for folder, state in zip(whole, before, strict=True)
        ]
        packed = tuple(map(RestThenWhole, rest, whole))
        mix = self._mix(number, [one.rows for one in rest])
        return Phase(packed, mix, before, last.passes_before + last.mix.passes(rows))

    def _whole(self, number: int) -> tuple[PackedFolder, ...]:
        stage = self._stages[number]
        return tuple(folder.repacked(stage.row_tokens, stage.seq_len) for folder in self._folders)

    def _mix(self, number: int, rest: list[int] | None) -> Mix:
        stage, rows = self._stages[number], {folder.name: folder.rows for folder in self._whole(number)}
        seed = self._seed + number * _SEEDS_APART
        return build_mix(rows, stage.weights, seed, self._batch_rows, rest, stage.weights_key)


def states_after(phase: Phase, rows: int) -> tuple[FolderState, ...]:
    """Of each folder, after the first `rows` rows of a phase."""
    found = []
    for packed, state, progress in zip(phase.packed, phase.before, phase.mix.progress(rows), strict=True):
        passes, unread = state.passes + progress.passes, None
        if progress.unread is not None:
            if isinstance(packed, RestThenWhole):
                packed = packed.rest if progress.in_rest else packed.whole
            unread = within(unread_spans(progress.unread, packed.row_tokens, packed.tokens), packed.spans)
        found.append(FolderState(passes, unread))
    return tuple(found)
