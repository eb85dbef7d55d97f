"""Opens the data of a run and makes batches of them, one ahead of the consumer in a thread.

    position --order--> row numbers --this rank's share--> places in folders --mix--> packed rows --> Batch

Everything is a pure function of the position: `TrainingData.build(position)` gives any batch at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from internlm_lite.batch import IGNORE, Batch, BatchStats, Position
from internlm_lite.config.ranges import parse_rampup, parse_skip_batches
from internlm_lite.config.schema import DataConfig
from internlm_lite.data.mix import Mix, build_mix
from internlm_lite.data.order import BatchOrder
from internlm_lite.data.pack import PackedFolder
from internlm_lite.data.source import Folder, dummy_folder, find_folders
from internlm_lite.data.vocabulary import check_vocabulary
from internlm_lite.errors import DataError

logger = logging.getLogger("internlm_lite")
T = TypeVar("T")
_LAST_ITEM_SECONDS = 2.0
"""A batch takes milliseconds, or hangs in its storage."""


@dataclass(frozen=True)
class TrainingData:
    """The training data as one data-parallel rank sees them."""

    packed: tuple[PackedFolder, ...]
    mix: Mix
    order: BatchOrder
    dp_rank: int
    fingerprint: dict
    """Plain JSON values. Equal fingerprints: the same rows in the same order (for the same micro_num * dp)."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Names; `Batch.folders` holds indices into them."""
        return tuple(folder.name for folder in self.packed)

    @property
    def total_tokens(self) -> int:
        """Tokens of all documents that are long enough, once."""
        return sum(folder.tokens for folder in self.packed)

    def build(self, position: Position, pin: bool = False) -> Batch:
        """The next batch to train on at `position`. Raises DataError on damaged data or ids outside the vocabulary."""
        rows, after = self.order.take(position)
        places = self.mix.places(self.order.share(rows, self.dp_rank))
        return assemble(self.packed, places, after, pin)

    def batches(self, position: Position, pin: bool = False) -> Generator[Batch, None, None]:
        """Endless. `pin`: in page-locked memory. Close it (or drop it) to join its thread."""

        def endless() -> Iterator[Batch]:
            at = position
            while True:
                batch = self.build(at, pin)
                at = batch.after
                yield batch

        return one_ahead(endless())


@dataclass(frozen=True)
class ValidationData:
    """Folder by folder its first rows, always the same; every dp rank gets the same number of batches."""

    packed: tuple[PackedFolder, ...]
    micro_num: int
    dp_rank: int
    dp_size: int
    max_batches: int
    """Per folder."""

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(folder.name for folder in self.packed)

    def batches(self, pin: bool = False) -> Generator[Batch, None, None]:
        """Finite. Rows beyond a folder's last are padding: token 0 with label IGNORE."""
        return one_ahead(chain.from_iterable(self._of_folder(index, pin) for index in range(len(self.packed))))

    def _of_folder(self, index: int, pin: bool) -> Iterator[Batch]:
        per_batch = self.micro_num * self.dp_size
        rows = min(self.packed[index].rows, self.max_batches * per_batch)
        for start in range(0, rows, per_batch):
            mine = range(start, start + per_batch)[self.dp_rank :: self.dp_size]
            yield assemble(self.packed, [(index, row) for row in mine], Position(), pin)


def open_training_data(config: DataConfig, vocab_size: int, dp_rank: int, dp_size: int, seed: int) -> TrainingData:
    """The training data of dp rank `dp_rank`; only rank 0 logs. Raises DataError naming the file and what to do."""
    found = _folders(config.train_folder, "train_folder", config, vocab_size)
    packed = [_pack(config, folder, vocab_size, seed) for folder in found]
    used = _usable(packed, "train_folder", config, dp_rank == 0)
    mix = build_mix(
        [folder.name for folder in used],
        [folder.rows for folder in used],
        config.weights,
        seed,
        config.micro_num * dp_size,
    )
    skip = parse_skip_batches(config.skip_batches)
    order = BatchOrder(config.micro_num, dp_size, tuple(skip), parse_rampup(config.rampup_batch_size))
    return TrainingData(tuple(used), mix, order, dp_rank, _fingerprint(config, found, packed, seed))


def open_validation_data(config: DataConfig, vocab_size: int, dp_rank: int, dp_size: int, seed: int) -> ValidationData:
    """The validation data of dp rank `dp_rank`; `seed` chooses the documents where valid_batches does not reach all."""
    if config.train_folder is not None and config.valid_folder is None and dp_rank == 0:
        logger.warning(
            "data.valid_every=%d with data.valid_folder=None: validation runs on the built-in dummy set, which says "
            "nothing about data.train_folder; set data.valid_folder, or data.valid_every=0",
            config.valid_every,
        )
    found = _folders(config.valid_folder, "valid_folder", config, vocab_size)
    packed = [_pack(config, folder, vocab_size, seed, keep_tail=True) for folder in found]
    used = _usable(packed, "valid_folder", config, dp_rank == 0)
    return ValidationData(
        tuple(used), config.valid_micro_num or config.micro_num, dp_rank, dp_size, max_batches=config.valid_batches
    )


def _folders(root: str | None, key: str, config: DataConfig, vocab_size: int) -> list[Folder]:
    folders = [dummy_folder(config.seq_len)] if root is None else find_folders(Path(root), key)
    check_vocabulary(folders, vocab_size, config.tokenizer)
    return folders


def _pack(config: DataConfig, folder: Folder, vocab_size: int, seed: int, keep_tail: bool = False) -> PackedFolder:
    return PackedFolder(
        folder,
        row_tokens=config.micro_bsz * config.seq_len,
        seq_len=config.seq_len,
        vocab_size=vocab_size,
        min_length=0 if folder.is_dummy else config.min_length,  # as in the runs whose logs we reproduce
        seed=seed,
        one_sample=config.pack_sample_into_one,
        keep_tail=keep_tail,
    )


def _usable(packed: Sequence[PackedFolder], key: str, config: DataConfig, log: bool) -> list[PackedFolder]:
    """Folders with at least one row; the others, and how many documents are left out, are named once."""
    for folder in packed if log else ():
        if folder.rows == 0:
            logger.warning(
                "data folder %s is not used: its %d documents of at least min_length = %d tokens hold %d tokens, "
                "and a row takes %d",
                folder.name, folder.documents, config.min_length, folder.tokens, config.micro_bsz * config.seq_len,
            )  # fmt: skip
        elif folder.left_out:
            logger.warning(
                "data.%s: %s: %d of %d documents are %s and left out", key, folder.name, folder.left_out,
                folder.left_out + folder.documents,
                f"shorter than data.min_length={config.min_length}" if config.min_length > 1 else "empty",
            )  # fmt: skip
    used = [folder for folder in packed if folder.rows > 0]
    if not used:
        raise DataError(
            f"no data folder of {', '.join(folder.name for folder in packed)} fills one row of micro_bsz * seq_len = "
            f"{config.micro_bsz * config.seq_len} tokens with documents of at least min_length = {config.min_length}; "
            f"add data, or lower data.min_length, micro_bsz or seq_len"
        )
    return used


def _fingerprint(config: DataConfig, folders: Sequence[Folder], packed: Sequence[PackedFolder], seed: int) -> dict:
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
    return {"seed": seed, **{key: getattr(config, key) for key in keys}, "folders": contents}


def assemble(
    packed: Sequence[PackedFolder], places: Sequence[tuple[int, int]], after: Position, pin: bool = False
) -> Batch:
    """The rows at `places`, (folder, row) each, as one batch of len(places) micro-batches."""
    shape = (len(places), packed[0].row_tokens)
    empty = partial(torch.empty, shape, pin_memory=pin)
    tokens, labels, positions = (empty(dtype=torch.int64) for _ in range(3))
    folders = empty(dtype=torch.int32)
    borders = []
    for i, (folder, row) in enumerate(places):
        borders.append(packed[folder].fill(row, tokens[i].numpy(), labels[i].numpy(), positions[i].numpy()))
        folders[i] = folder
    pieces = np.array([len(border) - 1 for border in borders])
    padded = torch.full((len(places), int(pieces.max()) + 1), shape[1], dtype=torch.int32, pin_memory=pin)
    for i, border in enumerate(borders):
        padded[i, : len(border)] = torch.from_numpy(border)
    longest = max(int(np.diff(border).max()) for border in borders)
    stats = BatchStats(
        num_samples=int(pieces.sum()),
        largest_length=longest,
        largest_batch=int(pieces.max()),
        smallest_batch=int(pieces.min()),
        num_tokens=tokens.numel(),
        num_labels=int(np.count_nonzero(labels.numpy() != IGNORE)),
    )
    hosts = tuple(tuple(border.tolist()) for border in borders)
    return Batch(tokens, labels, positions, folders, padded, hosts, longest, after, stats)


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, the next one computed in a thread meanwhile. Its errors surface here.

    In the end the thread is joined, unless it takes long over an item that nobody wants any more.
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
