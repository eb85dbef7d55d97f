"""Batches of tokenised folders: contents, order, resuming, validation, damage, and the thread."""

import dataclasses
import gc
import json
import logging
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from internlm_lite.batch import IGNORE, Batch, Position
from internlm_lite.data.data_loader import TrainingData, open_training_data, open_validation_data, prefetch
from internlm_lite.errors import DataError
from tests.data.corpora import data_config, random_documents, write_internlm, write_native


@pytest.fixture
def root(tmp_path):
    write_native(tmp_path / "code" / "a.bin", random_documents(1, 60, 30))
    write_native(tmp_path / "code" / "b.bin", random_documents(2, 30, 30))
    write_internlm(tmp_path / "docs" / "c.bin", random_documents(3, 80, 20))
    return tmp_path


def _open(root, dp_rank: int = 0, dp_size: int = 1, **changes: object) -> TrainingData:
    return open_training_data(data_config(root, **changes), vocab_size=1000, dp_rank=dp_rank, dp_size=dp_size, seed=5)


def _take(data: TrainingData, steps: int, position: Position = Position()) -> list[Batch]:
    batches = data.batches(position)
    try:
        return list(islice(batches, steps))
    finally:
        batches.close()


def _same(one: Batch, other: Batch) -> bool:
    tensors = ("tokens", "labels", "positions", "folders", "rows", "cu_seqlens")
    rest = ("cu_seqlens_host", "max_seqlen", "after", "stats")
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return equal and all(getattr(one, name) == getattr(other, name) for name in rest)


def test_batch_is_consistent(root):
    data = _open(root, micro_num=3)
    assert data.folders == ("code", "docs")
    for batch in _take(data, 20):
        assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == batch.folders.shape == (3, 16)
        dtypes = [t.dtype for t in (batch.tokens, batch.labels, batch.positions, batch.folders, batch.cu_seqlens)]
        assert dtypes == [torch.int64] * 3 + [torch.int32] * 2
        for row, boundaries in enumerate(batch.cu_seqlens_host):
            padding = [16] * (batch.cu_seqlens.shape[1] - len(boundaries))
            assert batch.cu_seqlens[row].tolist() == [*boundaries, *padding]
            starts = [i for i, position in enumerate(batch.positions[row].tolist()) if position == 0]
            assert [*starts, 16] == list(boundaries)
            same = batch.labels[row, :-1] == batch.tokens[row, 1:]
            assert bool((same | (batch.labels[row, :-1] == IGNORE)).all())
        lengths = [np.diff(boundaries) for boundaries in batch.cu_seqlens_host]
        assert batch.stats.num_samples == sum(map(len, lengths))
        assert batch.stats.largest_length == batch.max_seqlen == max(map(max, lengths)) <= 8
        assert (batch.stats.largest_batch, batch.stats.smallest_batch) == (
            max(map(len, lengths)),
            min(map(len, lengths)),
        )
        assert batch.stats.num_tokens == 48
        assert batch.stats.num_labels == int((batch.labels != IGNORE).sum())


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_rows_are_numbered_in_their_global_batch(root, dp):
    """Whatever the layout, the ramp-up and what is skipped."""
    data = [
        _open(root, dp_rank, dp, micro_num=8 // dp, rampup_batch_size=f"{4 // dp} {4 // dp} 2", skip_batches="1")
        for dp_rank in range(dp)
    ]
    for parts in zip(*(_take(ranks_data, 4) for ranks_data in data), strict=True):
        numbers = torch.stack([batch.rows for batch in parts], dim=1)  # [micro, dp]
        assert numbers.dtype == torch.int64 and numbers.flatten().tolist() == list(range(numbers.numel()))
        assert numbers.numel() == (4 if parts[0].after.batch == 1 else 8)


def test_epoch_has_every_row_once(root):
    data = _open(root)
    rows = sum(folder.rows for folder in data.packed)
    batches = _take(data, rows // 2)
    tokens = torch.cat([batch.tokens for batch in batches])
    assert len({tuple(row) for row in tokens.tolist()}) == rows // 2 * 2
    assert data.total_tokens == sum(folder.tokens for folder in data.packed)
    per_folder = [int((torch.cat([b.folders for b in batches])[:, 0] == f).sum()) for f in (0, 1)]
    assert sum(per_folder) == rows // 2 * 2 and abs(per_folder[0] - data.packed[0].rows) <= 1


@pytest.mark.parametrize("weights", [None, {"code": 1.0, "docs": 3.0}])
def test_global_batches_do_not_depend_on_dp(root, weights):
    """Rows of a step over all ranks, in global order: row i is micro-batch i // dp of rank i % dp."""
    seen = []
    for dp in (1, 2, 4):
        ranks = [_take(_open(root, rank, dp, micro_num=8 // dp, weights=weights), 12) for rank in range(dp)]
        seen.append([[ranks[i % dp][step].tokens[i // dp].tolist() for i in range(8)] for step in range(12)])
        assert {batch.after for rank in ranks for batch in rank[3:4]} == {Position(4, 32)}
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("weights", [None, {"code": 1.0, "docs": 3.0}])
@pytest.mark.parametrize("rampup", ["1 1 3", "1 1 96 tokens"])
def test_resume_at_any_position(root, rampup, weights):
    """With ramp-up and skipped batches, over more than one epoch."""
    changes = {"rampup_batch_size": rampup, "skip_batches": "0,4-6,9", "micro_num": 3, "weights": weights}
    data = _open(root, 1, 2, **changes)
    whole = _take(data, 60)
    assert whole[-1].after.packs > sum(folder.rows for folder in data.packed)
    assert [batch.micro_num for batch in whole[:6]] == [1, 1, 2, 3, 3, 3]
    assert [batch.after.batch for batch in whole[:6]] == [2, 3, 4, 8, 9, 11]
    for start in (1, 3, 20, 44, 59):
        again = _take(_open(root, 1, 2, **changes), 60 - start, whole[start - 1].after)
        assert all(map(_same, again, whole[start:]))


def test_seed_and_fingerprint(root):
    config = data_config(root)
    one, other = (open_training_data(config, 1000, 0, 1, seed) for seed in (5, 6))
    assert not torch.equal(one.build(Position()).tokens, other.build(Position()).tokens)
    assert one.fingerprint != other.fingerprint
    assert json.loads(json.dumps(one.fingerprint)) == one.fingerprint == _open(root, 1, 2).fingerprint
    write_native(root / "docs" / "d.bin", [[1] * 40])
    assert _open(root).fingerprint != one.fingerprint


def test_dropped_documents_and_unused_folders_are_logged(root, caplog):
    write_native(root / "tiny" / "t.bin", [[1, 2, 3]] * 50)
    with caplog.at_level(logging.WARNING, "internlm_lite"):
        data = _open(root, min_length=4)
        _open(root, dp_rank=1, dp_size=2, min_length=4)
    assert data.folders == ("code", "docs")
    counts = []
    for folder in data.packed:
        lengths = np.concatenate([file.lengths for file in folder._files])
        counts.append((short := int((lengths < 4).sum()), len(lengths)))
        assert 0 < short == folder.dropped == len(lengths) - folder.documents
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == [
        f"data.train_folder: {name}: {short} of {all_of_them} documents are shorter than data.min_length=4 and left out"
        for name, (short, all_of_them) in zip(data.folders, counts, strict=True)
    ]
    assert [line.split(":")[0] for line in said[2:]] == ["data folder tiny is not used"]


def test_no_log_without_dropped_documents(root, caplog):
    _open(root)
    open_validation_data(data_config(root, valid_folder=str(root)), 1000, 0, 1, seed=5)
    assert caplog.records == []
    write_native(root / "docs" / "e.bin", [[], [1]])
    _open(root)
    assert "docs: 1 of 82 documents are empty and left out" in caplog.text


def test_too_little_data(root):
    with pytest.raises(DataError, match=r"expected at least 4000 .* lower data\.micro_num"):
        _open(root, dp_size=4, micro_num=1000)
    with pytest.raises(DataError, match="no data folder of code, docs fills one row"):
        _open(root, min_length=1000)


def test_prefetch_raises_errors_of_thread(root):
    data = open_training_data(data_config(root), vocab_size=500, dp_rank=0, dp_size=1, seed=5)
    with pytest.raises(DataError, match=r"\.bin: document \d+, token \d+: found id \d+, expected ids below .* = 500"):
        _take(data, 100)
    assert not _data_threads()


def _data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_close_joins_thread(root):
    batches = _open(root).batches(Position())
    next(batches)
    assert len(_data_threads()) == 1
    batches.close()
    assert not _data_threads()
    batches = _open(root).batches(Position())
    next(batches)
    del batches
    gc.collect()
    assert not _data_threads()


def test_close_does_not_wait_for_blocked_data(monkeypatch):
    monkeypatch.setattr("internlm_lite.data.data_loader._LAST_ITEM_SECONDS", 0.01)
    come = threading.Event()

    def hanging():
        yield 0
        yield int(come.wait(20))

    items = prefetch(hanging())
    assert next(items) == 0
    items.close()
    (waiting,) = _data_threads()
    come.set()
    waiting.join()


def test_prefetch_of_one_item():
    computed = []
    release = threading.Semaphore(0)

    def count():
        for i in range(5):
            computed.append(i)
            release.release()
            yield i

    items = prefetch(count())
    assert next(items) == 0
    assert release.acquire(timeout=5) and release.acquire(timeout=5)
    assert computed == [0, 1]
    assert list(items) == [1, 2, 3, 4]


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_validation_covers_every_token_once(root, dp):
    config = data_config(None, valid_folder=str(root), valid_micro_num=4, valid_batches=1000)
    ranks = [open_validation_data(config, 1000, rank, dp, seed=5) for rank in range(dp)]
    batches = [list(rank.batches()) for rank in ranks]
    assert len({len(own) for own in batches}) == 1
    assert ranks[0].folders == ("code", "docs")
    for own in batches:
        assert all(batch.tokens.shape == (4, 16) and batch.cu_seqlens_host[-1][-1] == 16 for batch in own)
    for index, folder in enumerate(ranks[0].packed):
        learnt = sum(int((b.labels[b.folders == index] != IGNORE).sum()) for own in batches for b in own)
        assert learnt == folder.tokens - folder.documents  # each document's last token has no successor


def test_valid_batches(root):
    config = data_config(None, valid_folder=str(root), valid_batches=2)
    batches = list(open_validation_data(config, 1000, 0, 2, seed=5).batches())
    assert [int(batch.folders[0, 0]) for batch in batches] == [0, 0, 1, 1]


def test_validation_on_the_dummy_set():
    config = data_config(None, seq_len=64, valid_batches=2)
    batches = list(open_validation_data(config, 1000, 0, 1, seed=5).batches())
    assert len(batches) == 2 and batches[0].tokens.max() < 200


@pytest.mark.parametrize(("train", "valid", "warned"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_warning_for_validation_on_dummy_set(root, caplog, train, valid, warned):
    config = data_config(root if train else None, valid_folder=str(root) if valid else None, valid_every=7)
    for rank in range(2):
        open_validation_data(config, 1000, rank, 2, seed=5)
    said = [record.getMessage() for record in caplog.records]
    assert [("data.valid_every=7 with data.valid_folder=None" in line) for line in said] == [True] * warned


def test_one_sample_windows(root):
    batch = _open(root, pack_sample_into_one=True).build(Position())
    assert batch.cu_seqlens_host == ((0, 8, 16), (0, 8, 16))
    assert batch.positions[0].tolist() == [*range(8), *range(8)]


def test_batch_to_device(root):
    batch = _open(root).build(Position())
    assert _same(batch.to(torch.device("cpu")), batch)
    assert dataclasses.asdict(batch)["after"] == {"batch": 1, "packs": 2, "borders": ()}
