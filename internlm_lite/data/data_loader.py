"""Opens the data of a run and makes batches of them, with one batch of prefetch in a thread.

    position --order--> row numbers --this rank's share--> rows of folders --mix--> packed rows --> Batch

Everything is a pure function of the position: `TrainingData.build(position)` makes any batch.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from internlm_lite.batch import IGNORE, Batch, BatchStats, PassStep, Position, SourceRows
from internlm_lite.config.ranges import parse_skip_batches
from internlm_lite.config.run_stages import RunStage, at_batch, rampup_of, stages_of
from internlm_lite.config.schema import DataConfig, StageConfig
from internlm_lite.data.folders import Folder, dummy_folder, dummy_pairs, find_folders
from internlm_lite.data.order import BatchOrder
from internlm_lite.data.pack import PackedFolder, PackedRows, Packing
from internlm_lite.data.pairs import PackedPairs, PairPacking
from internlm_lite.data.phases import Phase, Phases
from internlm_lite.data.vocabulary import VocabularySide, check_vocabulary
from internlm_lite.errors import DataError

logger = logging.getLogger("internlm_lite")
T = TypeVar("T")
VocabSizes = int | tuple[int, int]
"""Of a model (`ModelConfig.vocab_sizes`); of an encoder-decoder that of the targets and that of the sources."""
_LAST_ITEM_SECONDS = 2.0
"""Longest wait for the prefetch thread at the end; a batch takes milliseconds unless its storage blocks."""


@dataclass(frozen=True)
class TrainingData:
    """The training data of one data-parallel rank."""

    packed: tuple[PackedFolder, ...]
    """The whole folders, in the rows of the first stage."""
    stages: tuple[RunStage, ...]
    phases: Phases
    order: BatchOrder
    dp_rank: int
    fingerprint: dict
    """Plain JSON values; equal fingerprints mean the same rows in the same order, for equal micro_num * dp."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of the folders; `Batch.folders` holds indices into them."""
        return tuple(folder.name for folder in self.packed)

    @property
    def total_tokens(self) -> int:
        """Tokens in one pass over all documents of at least `min_length` tokens."""
        return sum(folder.tokens for folder in self.packed)

    def epoch(self, position: Position) -> int:
        """Passes over all rows that end at or before `position`; those with weights do not count."""
        phase = self.phases.at(position.borders)
        return phase.passes_before + phase.mix.passes(position.packs - _first_row(position))

    def take(self, position: Position) -> tuple[Phase, range, Position]:
        """(phase of the next batch to train on, its row numbers there over all dp ranks, the position after it)"""
        rows, after = self.order.take(position)
        first = _first_row(after)
        return self.phases.at(after.borders), range(rows.start - first, rows.stop - first), after

    def stage_before(self, position: Position) -> RunStage:
        """The stage of the last batch before `position`, or of the first one."""
        return at_batch(self.stages, max(0, position.batch - 1))

    def ends_stage(self, position: Position) -> bool:
        """Whether the next batch to train on belongs to another stage than the last one."""
        after = self.order.take(position)[1]
        return self.stage_before(after).number != self.stage_before(position).number

    def build(self, position: Position, *, pin: bool = False) -> Batch:
        """The next batch to train on at `position`. Raises DataError on damaged data or ids outside the vocabulary."""
        phase, rows, after = self.take(position)
        mine, numbers = (self.order.share(some, self.dp_rank) for some in (rows, range(len(rows))))
        stage = self.stage_before(after).number
        batch = assemble(phase.packed, phase.mix.rows_of_folders(mine), numbers, after, pin=pin, stage=stage)
        return replace(batch, stats=replace(batch.stats, in_pass=self._in_pass(rows)))

    def _in_pass(self, rows: range) -> PassStep | None:
        """Of a batch with these rows of all ranks; a run with pairs has one phase."""
        size = self.phases.at(()).mix.epoch_rows if isinstance(self.packed[0], PackedPairs) else None
        if size is None or self.order.rampup is not None:
            return None
        epoch, row = divmod(rows.start, size)
        ranks = self.order.dp_size
        return PassStep(epoch, (row + len(rows)) // ranks, row // (self.order.micro_num * ranks) + 1)

    def batches(self, position: Position, *, pin: bool = False) -> Generator[Batch, None, None]:
        """Endless, from `position` on. `pin`: in page-locked memory. Close or delete it to join its thread."""

        def endless() -> Iterator[Batch]:
            at = position
            while True:
                batch = self.build(at, pin=pin)
                at = batch.after
                yield batch

        return prefetch(endless())


def _first_row(position: Position) -> int:
    """Rows consumed before the phase that `position` is in."""
    return position.borders[-1] if position.borders else 0


@dataclass(frozen=True)
class ValidationData:
    """The first rows of each folder, always the same; every dp rank gets the same number of batches."""

    packed: tuple[PackedFolder, ...]
    micro_num: int
    dp_rank: int
    dp_size: int
    max_batches: int
    """Per folder."""

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(folder.name for folder in self.packed)

    @property
    def bytes_per_label(self) -> dict[str, float | None]:
        """`PackedFolder.bytes_per_label` of each folder."""
        return {folder.name: folder.bytes_per_label for folder in self.packed}

    def batches(self, *, pin: bool = False) -> Generator[Batch, None, None]:
        """All batches. Rows beyond the last row of a folder are padding: token 0 with label IGNORE."""
        return prefetch(chain.from_iterable(self._of_folder(index, pin=pin) for index in range(len(self.packed))))

    def _of_folder(self, index: int, *, pin: bool) -> Iterator[Batch]:
        per_batch = self.micro_num * self.dp_size
        rows = min(self.packed[index].rows, self.max_batches * per_batch)
        for start in range(0, rows, per_batch):
            mine = range(start, start + per_batch)[self.dp_rank :: self.dp_size]
            yield assemble(self.packed, [(index, row) for row in mine], mine, Position(), pin=pin)


@dataclass(frozen=True)
class TrainingSample:
    """The first `n_batches` batches of the training order, as large as those of the validation, always the same."""

    data: TrainingData
    micro_num: int
    n_batches: int

    @property
    def folders(self) -> tuple[str, ...]:
        return self.data.folders

    def batches(self, *, pin: bool = False) -> Generator[Batch, None, None]:
        return prefetch(self._build(start, pin=pin) for start in self._starts())

    def _starts(self) -> range:
        """First rows of the batches: at most one pass over the data, and at least one batch."""
        per_batch, all_rows = self.micro_num * self.data.order.dp_size, self.data.phases.at(()).mix.epoch_rows
        most = self.n_batches if all_rows is None else max(1, min(self.n_batches, all_rows // per_batch))
        return range(0, most * per_batch, per_batch)

    def _build(self, start: int, *, pin: bool) -> Batch:
        rows = range(start, start + self.micro_num * self.data.order.dp_size)
        mine = self.data.order.share(rows, self.data.dp_rank)
        phase = self.data.phases.at(())
        return assemble(phase.packed, phase.mix.rows_of_folders(mine), mine, Position(), pin=pin)


def open_training_data(
    config: DataConfig,
    vocab_size: VocabSizes,
    dp_rank: int,
    dp_size: int,
    seed: int,
    stages: Sequence[StageConfig] = (),
) -> TrainingData:
    """The training data of dp rank `dp_rank`; only rank 0 logs. `stages`: of the run. Raises DataError."""
    found = _folders(config.train_folder, "train_folder", config, vocab_size, log=dp_rank == 0)
    run = stages_of(config, stages)
    shortest = min(run, key=lambda stage: stage.row_tokens)
    in_short_rows = config.model_copy(update={"micro_bsz": shortest.micro_bsz, "seq_len": shortest.seq_len})
    packed = [_pack(in_short_rows, folder, vocab_size, seed) for folder in found]
    used = _usable(packed, "train_folder", in_short_rows, log=dp_rank == 0)
    if isinstance(used[-1], PackedPairs) and all(stage.weights is None for stage in run):
        rows = sum(folder.rows for folder in used)
        used[-1] = used[-1].with_empty_rows(-rows % (config.micro_num * dp_size))
    phases = Phases(used, run, seed, config.micro_num * dp_size)
    skip = parse_skip_batches(config.skip_batches)
    order = BatchOrder(config.micro_num, dp_size, tuple(skip), rampup_of(config, run, dp_size), phases.starts)
    first = tuple(folder.repacked(run[0].row_tokens, run[0].seq_len) for folder in used)
    return TrainingData(first, run, phases, order, dp_rank, _fingerprint(config, found, packed, seed, stages))


def open_validation_data(
    config: DataConfig, vocab_size: VocabSizes, dp_rank: int, dp_size: int, seed: int
) -> ValidationData:
    """The validation data of dp rank `dp_rank`; `seed` selects documents if valid_batches does not cover all."""
    if config.train_folder is not None and config.valid_folder is None and dp_rank == 0:
        logger.warning(
            "data.valid_every=%s with data.valid_folder=None: validation runs on the built-in dummy set, which says "
            "nothing about data.train_folder; set data.valid_folder, or data.valid_every=0",
            config.valid_every,
        )
    found = _folders(config.valid_folder, "valid_folder", config, vocab_size, log=dp_rank == 0)
    packed = [_pack(config, folder, vocab_size, seed, keep_tail=True) for folder in found]
    used = _usable(packed, "valid_folder", config, log=dp_rank == 0)
    unknown = [folder.name for folder in used if folder.bytes_per_label is None]
    if unknown and config.valid_folder is not None and dp_rank == 0:
        logger.info(
            "data.valid_folder: %s: the bytes of the text are not recorded beside the tokens, so bits per byte are not "
            "shown; tools/tokenizer.py encode records them",
            ", ".join(unknown),
        )
    return ValidationData(
        tuple(used), config.valid_micro_num or config.micro_num, dp_rank, dp_size, max_batches=config.valid_batches
    )


def _folders(root: str | None, key: str, config: DataConfig, vocab_size: VocabSizes, *, log: bool) -> list[Folder]:
    log_sizes, pairs = log and key == "train_folder", vocab_size if isinstance(vocab_size, tuple) else None
    if root is not None:
        folders = find_folders(Path(root), key, log=log, pairs=pairs is not None)
    elif pairs:
        folders = [dummy_pairs(min(config.source_seq_len or config.seq_len, config.seq_len + 1), pairs)]
    else:
        folders = [dummy_folder(config.seq_len)]
    of_targets, of_sources = vocab_size if isinstance(vocab_size, tuple) else (vocab_size, None)
    target = VocabularySide("", of_targets, config.tokenizer)
    check_vocabulary([file for folder in folders for file in folder.files], target, log=log_sizes)
    if of_sources is not None:
        source = VocabularySide("source_", of_sources, config.source_tokenizer or config.tokenizer)
        check_vocabulary([file for folder in folders for file in folder.sources], source, log=log_sizes)
    return folders


def _pack(
    config: DataConfig, folder: Folder, vocab_size: VocabSizes, seed: int, *, keep_tail: bool = False
) -> PackedFolder:
    of_targets, of_sources = vocab_size if isinstance(vocab_size, tuple) else (vocab_size, None)
    packing = Packing(
        row_tokens=config.micro_bsz * config.seq_len,
        seq_len=config.seq_len,
        vocab_size=of_targets,
        min_length=0 if folder.is_dummy else config.min_length,  # as in the InternLM runs that the tests reproduce
        seed=seed,
        one_sample=config.pack_sample_into_one,
        keep_tail=keep_tail,
    )
    if of_sources is None:
        return PackedFolder(folder, packing)
    source_seq_len = config.source_seq_len or config.seq_len
    pairs = PairPacking(
        **vars(packing),
        source_row_tokens=config.micro_bsz * source_seq_len,
        source_seq_len=source_seq_len,
        source_vocab_size=of_sources,
        row_pairs=config.row_pairs,
        truncate=config.truncate_pairs,
    )
    return PackedPairs(folder, pairs)


def _usable(packed: Sequence[PackedFolder], key: str, config: DataConfig, *, log: bool) -> list[PackedFolder]:
    """The folders with at least one row. `log`: log the others, and the number of dropped documents."""
    for folder in packed if log else ():
        if folder.rows == 0:
            text = (
                "data folder %s is not used: its %d documents of at least min_length = %d tokens hold %d tokens, "
                "and a row takes %d"
            )
            logger.warning(text, folder.name, folder.documents, config.min_length, folder.tokens, folder.row_tokens)
        elif folder.dropped:
            why = f"shorter than data.min_length={config.min_length}" if config.min_length > 1 else "empty"
            all_documents = folder.dropped + folder.documents
            text = "data.%s: %s: %d of %d documents are %s and left out"
            logger.warning(text, key, folder.name, folder.dropped, all_documents, why)
        if isinstance(folder, PackedPairs) and folder.cut:
            text = "data.%s: %s: %d of %d pairs are cut to data.seq_len and data.source_seq_len (data.truncate_pairs)"
            logger.warning(text, key, folder.name, folder.cut, folder.documents)
    used = [folder for folder in packed if folder.rows > 0]
    if not used:
        raise DataError(
            f"no data folder of {', '.join(folder.name for folder in packed)} fills one row of micro_bsz * seq_len = "
            f"{config.micro_bsz * config.seq_len} tokens with documents of at least min_length = {config.min_length}; "
            f"add data, or lower data.min_length, micro_bsz or seq_len"
        )
    for folder in used:
        if folder.lacks_labels():
            raise DataError(
                f"data.{key}: folder {folder.name}: found no label in its {folder.documents} documents, only tokens of "
                f"prompts (negative ids) or single tokens, so nothing can be learnt from it; tokenise it again with "
                f"responses, or take it out of the folder"
            )
    return used


def _fingerprint(
    config: DataConfig,
    folders: Sequence[Folder],
    packed: Sequence[PackedFolder],
    seed: int,
    stages: Sequence[StageConfig],
) -> dict:
    contents = [
        {
            "name": folder.name,
            "documents": rows.documents,
            "tokens": rows.tokens,
            "files": [{"name": file.path.name, "index_sha256": file.digest()} for file in folder.files],
        }
        for folder, rows in zip(folders, packed, strict=True)
    ]
    keys = ("seq_len", "micro_bsz", "pack_sample_into_one", "min_length", "weights")
    facts = {"seed": seed, **{key: getattr(config, key) for key in keys}, "folders": contents}
    if folders[0].sources:
        facts |= {key: getattr(config, key) for key in ("source_seq_len", "row_pairs", "truncate_pairs")}
        facts["sources"] = [file.digest() for folder in folders for file in folder.sources]
    if stages:
        of_data = ("until", "weights", "seq_len", "micro_bsz", "rope_base")
        facts["stages"] = [{key: getattr(stage, key) for key in of_data} for stage in stages]
    return facts


def assemble(
    packed: Sequence[PackedRows],
    rows: Sequence[tuple[int, int]],
    numbers: Sequence[int],
    after: Position,
    *,
    pin: bool = False,
    stage: int = 0,
) -> Batch:
    """One batch of len(rows) micro-batches; `rows` are (folder, row of the folder), `numbers` those of `Batch.rows`."""
    shape = (len(rows), packed[0].row_tokens)
    empty = partial(torch.empty, shape, pin_memory=pin)
    tokens, labels, positions = (empty(dtype=torch.int64) for _ in range(3))
    folders = empty(dtype=torch.int32)
    of_batch = torch.tensor(numbers, pin_memory=pin)
    boundaries = []
    for i, (folder, row) in enumerate(rows):
        boundaries.append(packed[folder].fill(row, tokens[i].numpy(), labels[i].numpy(), positions[i].numpy()))
        folders[i] = folder
    segments = np.array([len(of_row) - 1 for of_row in boundaries])
    padded, hosts = _padded(boundaries, shape[1], pin=pin)
    longest = max(int(np.diff(of_row).max()) for of_row in boundaries)
    stats = BatchStats(
        num_samples=int(segments.sum()),
        largest_length=longest,
        largest_batch=int(segments.max()),
        smallest_batch=int(segments.min()),
        num_tokens=tokens.numel(),
        num_labels=int(np.count_nonzero(labels.numpy() != IGNORE)),
    )
    source = _sources(packed, rows, pin=pin)
    return Batch(tokens, labels, positions, folders, of_batch, padded, hosts, longest, after, stats, stage, source)


def _sources(packed: Sequence[PackedRows], rows: Sequence[tuple[int, int]], *, pin: bool) -> SourceRows | None:
    """The sources of the same rows; None: they have none."""
    pairs = [folder for folder in packed if isinstance(folder, PackedPairs)]
    if not pairs:
        return None
    size, boundaries = pairs[0].source_row_tokens, []
    tokens, positions = (torch.empty((len(rows), size), dtype=torch.int64, pin_memory=pin) for _ in range(2))
    for i, (folder, row) in enumerate(rows):
        boundaries.append(pairs[folder].fill_source(row, tokens[i].numpy(), positions[i].numpy()))
    longest = max(int(np.diff(of_row).max()) for of_row in boundaries)
    return SourceRows(tokens, positions, *_padded(boundaries, size, pin=pin), longest)


def _padded(
    boundaries: Sequence[np.ndarray], size: int, *, pin: bool
) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...]]:
    """Boundaries of rows of `size` tokens as one int32 tensor, padded with `size`, and as they are."""
    padded = torch.full((len(boundaries), max(map(len, boundaries))), size, dtype=torch.int32, pin_memory=pin)
    for i, of_row in enumerate(boundaries):
        padded[i, : len(of_row)] = torch.from_numpy(of_row)
    return padded, tuple(tuple(of_row.tolist()) for of_row in boundaries)


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each computed in a thread while the consumer uses the previous one. Re-raises its errors.

    At the end the thread is joined, unless it is blocked in an item that is no longer needed.
    """
    worker = ThreadPoolExecutor(1, thread_name_prefix="data")
    ahead = worker.submit(next, items, None)
    try:
        while (item := ahead.result()) is not None:
            ahead = worker.submit(next, items, None)
            yield item
    finally:
        wait([ahead], _LAST_ITEM_SECONDS)
        worker.shutdown(wait=ahead.done())
