"""Tables about the batches of a run, without a model: figures per step, folder shares, a decoded sample.

The numbers are those of the step line: `tokens` counts labels over all data-parallel ranks, the others describe the
batch of rank 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice, pairwise

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from internlm_lite.batch import Batch, Position
from internlm_lite.data.data_loader import TrainingData
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.data.trace import Occurrence
from internlm_lite.units import escaped, human_count

SHOWN_TOKENS = 400
"""Most tokens of a segment in a sample."""


@dataclass(frozen=True)
class StepFigures:
    """The composition of one step, as the step line of a run prints it."""

    step: int
    tokens: int
    num_samples_in_batch: int
    largest_length: int
    largest_batch: int
    smallest_batch: int


@dataclass(frozen=True)
class Step:
    """One step: its figures, and the batch of each data-parallel rank."""

    figures: StepFigures
    batches: tuple[Batch, ...]


def walk_steps(data: TrainingData, steps: int) -> Iterator[Step]:
    """The first `steps` steps of a run, over all dp ranks."""
    ranks = [dataclasses.replace(data, dp_rank=rank) for rank in range(data.order.dp_size)]
    position = Position()
    for step in range(steps):
        batches = tuple(rank.build(position) for rank in ranks)
        position, stats = batches[0].after, batches[0].stats
        figures = StepFigures(
            step=step,
            tokens=sum(batch.stats.num_labels for batch in batches),
            num_samples_in_batch=stats.num_samples,
            largest_length=stats.largest_length,
            largest_batch=stats.largest_batch,
            smallest_batch=stats.smallest_batch,
        )
        yield Step(figures, batches)


def overview(data: TrainingData, steps: list[Step]) -> Group:
    """Tables for a terminal: each folder with its share of the trained tokens, and the figures of each step."""
    rows = np.array(
        [sum(int((b.folders[:, 0] == f).sum()) for s in steps for b in s.batches) for f in range(len(data.packed))]
    )
    columns = ("folder", "documents", "left out", "tokens", "rows", "rows seen", "share", "epochs")
    folders = Table(*columns, title="data folders")
    for folder, seen in zip(data.packed, rows.tolist(), strict=True):
        share, epochs = f"{seen / max(1, rows.sum()):.1%}", f"{seen / max(1, folder.rows):.3g}"
        folders.add_row(
            folder.name,
            human_count(folder.documents),
            human_count(folder.dropped),
            human_count(folder.tokens),
            str(folder.rows),
            str(seen),
            share,
            epochs,
        )
    title = f"steps ({data.order.dp_size} data-parallel ranks)"
    table = Table("step", "tokens", "samples", "longest", "most", "fewest", "learnt", title=title)
    for step in steps:
        learnt = step.figures.tokens / sum(batch.stats.num_tokens for batch in step.batches)
        table.add_row(*map(str, dataclasses.astuple(step.figures)), f"{learnt:.1%}")
    return Group(folders, table)


def occurrences(found: list[Occurrence]) -> Table:
    """A line for each run of tokens of a document."""
    table = Table("step", "stage", "rank", "micro", "row", "document", "tokens")
    for one in found:
        step = f"none: batch {one.batch} is skipped" if one.step is None else str(one.step)
        document = escaped(f"{one.folder}:{one.document}")
        table.add_row(step, *map(str, (one.stage, one.rank, one.micro, one.row)), document, f"{one.start}-{one.stop}")
    return table


def sample(batch: Batch, folders: tuple[str, ...], tokenizer: Tokenizer | None, segments: int) -> Group:
    """The beginning of the first segments of micro-batch 0; tokens without label are dim red."""
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    shown = []
    for start, stop in islice(pairwise(batch.cu_seqlens_host[0]), segments):
        folder = folders[int(batch.folders[0, start])]
        text = Text(f"-- {folder}: tokens {start} to {stop}, {stop - start} long\n", style="bold cyan")
        stop = min(stop, start + SHOWN_TOKENS)
        learnt = [False, *(labels[i - 1] == tokens[i] for i in range(start + 1, stop))]
        for is_learnt, run in groupby(zip(tokens[start:stop], learnt, strict=True), key=lambda pair: pair[1]):
            ids = [token for token, _ in run]
            text.append(_readable(ids, tokenizer), style="not bold default" if is_learnt else "not bold dim red")
        shown.append(text)
    return Group(*shown)


def _readable(ids: list[int], tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    parts = []
    for is_special, run in groupby(ids, key=lambda token: token in (tokenizer.bos, tokenizer.eos)):
        group = list(run)
        parts.append("".join(map(tokenizer.piece, group)) if is_special else tokenizer.decode(group))
    return "".join(parts)
