"""Which documents are in a step, and in which steps a document is: by the order alone, without reading tokens.

    step -> batch -> rows -> rows of folders -> documents         `documents_of_step`
    document -> rows of its folder -> rows -> batches -> steps    `steps_of_document`

Both follow the config from the beginning. A run that skipped data after a spike, or changed its batch size, is ahead of
it by that much.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from internlm_lite.batch import Position
from internlm_lite.config.run_stages import Span, planned_spans
from internlm_lite.config.schema import DataConfig
from internlm_lite.data.data_loader import TrainingData
from internlm_lite.data.pack import Passage
from internlm_lite.errors import DataError


@dataclass(frozen=True)
class Occurrence:
    """Tokens of a document in a row of a batch."""

    step: int | None
    """None: the batch is skipped."""
    batch: int
    stage: int
    rank: int
    """Data-parallel rank."""
    micro: int
    """Micro-batch of the rank."""
    row: int
    """Of the global batch: micro * ranks + rank."""
    folder: str
    document: int
    """Its index in the folder, over all files by name."""
    start: int
    """Its tokens from here on ..."""
    stop: int
    """... and before this one."""
    file: str
    document_of_file: int


@dataclass(frozen=True)
class _Placed:
    """A span of batches, and where it begins."""

    span: Span
    step: int
    at: Position
    rows: int
    """Of a batch, over all ranks."""


def _placed(config: DataConfig, data: TrainingData) -> Iterator[_Placed]:
    step, at = 0, Position()
    for span in planned_spans(config, data.stages, data.order.rampup, config.total_steps):
        rows = span.micro_num * data.order.dp_size
        at = data.order.after_batches(at, span.batches.start, 0)  # with the border of a phase that begins here
        yield _Placed(span, step, at, rows)
        step += len(span.batches) * span.trained
        at = data.order.after_batches(at, span.batches.stop, rows * len(span.batches))


def documents_of_step(config: DataConfig, data: TrainingData, step: int) -> list[Occurrence]:
    """What is in step `step`, row by row. Raises DataError if the run has no such step."""
    for placed in _placed(config, data):
        nth = step - placed.step
        if placed.span.trained and nth < len(placed.span.batches):
            break
    else:
        raise DataError(f"there is no step {step}: the run has steps 0 to {config.total_steps - 1}; choose one of them")
    at = data.order.after_batches(placed.at, placed.span.batches.start + nth, nth * placed.rows)
    phase, rows, _ = data.take(at)
    found: list[Occurrence] = []
    for number, (folder, row) in enumerate(phase.mix.rows_of_folders(rows)):
        found += _in_row(data, placed, nth, number, (folder, phase.packed[folder].passages(row)))
    return found


def steps_of_document(config: DataConfig, data: TrainingData, folder: str, document: int) -> list[Occurrence]:
    """Where a document is, from the first step to the last. Raises DataError if there is none of this name."""
    if folder not in data.folders:
        raise DataError(f"{folder!r} is no folder with data; expected one of {', '.join(data.folders)}")
    index = data.folders.index(folder)
    found: list[Occurrence] = []
    try:
        data.packed[index].file_of(document)
    except IndexError as error:
        raise DataError(f"{folder}:{document}: {error}; choose one of them") from None
    placed = list(_placed(config, data))
    for borders in dict.fromkeys(one.at.borders for one in placed):
        phase, first = data.phases.at(borders), borders[-1] if borders else 0
        inside = [one for one in placed if one.at.borders == borders]
        starts = [one.at.packs for one in inside]
        end = inside[-1].at.packs + inside[-1].rows * len(inside[-1].span.batches)
        for row in phase.packed[index].rows_with(document):
            passages = [one for one in phase.packed[index].passages(row) if one.document == document]
            for local in phase.mix.find(index, row, end - first):
                one = inside[bisect_right(starts, local + first) - 1]
                nth, number = divmod(local + first - one.at.packs, one.rows)
                found += _in_row(data, one, nth, number, (index, passages))
    return sorted(found, key=lambda one: (one.batch, one.row, one.start))


def _in_row(
    data: TrainingData, placed: _Placed, nth: int, number: int, content: tuple[int, list[Passage]]
) -> Iterator[Occurrence]:
    """Occurrences of `content` (folder, passages) in row `number` of batch `nth` of a span."""
    folder, passages = content
    micro, rank = divmod(number, data.order.dp_size)
    for passage in passages:
        file, local = data.packed[folder].file_of(passage.document)
        yield Occurrence(
            step=placed.step + nth if placed.span.trained else None,
            batch=placed.span.batches.start + nth,
            stage=placed.span.stage.number,
            rank=rank,
            micro=micro,
            row=number,
            folder=data.folders[folder],
            document=passage.document,
            start=passage.start,
            stop=passage.stop,
            file=str(file),
            document_of_file=local,
        )
