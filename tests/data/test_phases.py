"""Stages of the data: what is read before and after a border, compared with counting every token."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internlm_lite.batch import Batch, Position
from internlm_lite.config.schema import StageConfig
from internlm_lite.data.data_loader import TrainingData, open_training_data
from internlm_lite.errors import DataError
from internlm_lite.train.train_state import TrainState
from tests.data.corpora import data_config, write_native

VOCAB = 100_000
LENGTHS = {"code": [30, 7, 64, 1, 50, 90, 23, 55], "docs": [300, 20, 40, 24, 16], "long": [512, 480, 336]}
"""Folder -> tokens of its documents: sums that 16, 32 and 64 divide."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token has an id of its own."""
    root, first = tmp_path_factory.mktemp("phases"), 1
    for name, lengths in LENGTHS.items():
        documents = []
        for length in lengths:
            documents.append(list(range(first, first + length)))
            first += length
        write_native(root / name / "a.bin", documents[: len(documents) // 2])
        write_native(root / name / "b.bin", documents[len(documents) // 2 :])
    return root


def opened(root: Path, stages: list[dict[str, Any]], dp: tuple[int, int] = (0, 1), **changes: Any) -> TrainingData:
    config = data_config(root, **{"micro_num": 2, "micro_bsz": 2, "seq_len": 8, **changes})
    return open_training_data(config, VOCAB, *dp, 3, [StageConfig(**stage) for stage in stages])


def batches(data: TrainingData, steps: int, position: Position = Position()) -> list[Batch]:
    found = []
    for _ in range(steps):
        found.append(data.build(position))
        position = found[-1].after
    return found


def rows_of(found: list[Batch]) -> list[list[list[int]]]:
    return [torch.stack((batch.tokens, batch.labels, batch.positions), 1).flatten(1).tolist() for batch in found]


def least_behind(data: TrainingData, steps: int) -> dict[str, list[int]]:
    """After every step, of each folder the tokens that came two times less often than another; every token always has
    the same label."""
    counts, labels = np.zeros(VOCAB, np.int64), np.zeros(VOCAB, np.int64)
    spans, first = {}, 1
    for name, lengths in LENGTHS.items():
        spans[name] = slice(first, first := first + sum(lengths))
    behind = defaultdict(list)
    for batch in batches(data, steps):
        tokens, now = batch.tokens.numpy().ravel(), batch.labels.numpy().ravel()
        assert ((labels[tokens] == 0) | (labels[tokens] == now)).all()
        labels[tokens] = now
        np.add.at(counts, tokens, 1)
        for name, span in spans.items():
            behind[name].append(int((counts[span] < counts[span].max() - 1).sum()))
    return behind


MIXES = [
    pytest.param(
        [{"until": 7, "seq_len": 8}, {"until": 19, "seq_len": 4}, {"seq_len": 8, "micro_bsz": 1}], id="shorter"
    ),
    pytest.param(
        [
            {"until": 9, "weights": {"code": 3, "docs": 1}},
            {"until": 31, "weights": {"code": 1, "long": 5}},
            {"weights": {"docs": 1, "code": 1, "long": 1}, "seq_len": 4},
        ],
        id="weights",
    ),
    pytest.param(
        [
            {"until": 11, "weights": {"code": 1, "docs": 2, "long": 1}},
            {},
        ],
        id="weights, then all",
    ),
    pytest.param([{"until": 40}, {"weights": {"code": 1, "docs": 1}}], id="all, then weights"),
]


@pytest.mark.parametrize("stages", MIXES)
def test_no_token_comes_again_before_all_others_of_its_folder(corpus, stages):
    """Rows divide what is left, so every pass is whole."""
    data = opened(corpus, stages, micro_num=1)
    assert data.total_tokens == 2048
    assert set().union(*least_behind(data, 300).values()) == {0}


def test_what_fills_no_row_is_all_that_a_pass_leaves_out(corpus):
    stages = [{"until": 13, "seq_len": 5}, {"until": 40, "seq_len": 40}, {"until": 60, "seq_len": 11}, {"seq_len": 64}]
    behind = least_behind(opened(corpus, stages, weights={"code": 2, "docs": 1, "long": 3}), 120)
    # a pass loses at most one row of 2 * 64 tokens; no folder is read more than 24 times
    assert max(behind["long"]) <= 128 and all(max(some) <= 24 * 128 for some in behind.values())


def test_first_rows_after_the_border_are_what_was_not_read(corpus):
    data = opened(corpus, [{"until": 5}, {"seq_len": 4}])
    seen = {token for batch in batches(data, 5) for token in batch.tokens.ravel().tolist()}
    later = [token for batch in batches(data, 200)[5:] for token in batch.tokens.ravel().tolist()]
    left = set(range(1, 2049)) - seen
    assert len(seen) == 5 * 32 and set(later[: len(left)]) == left and len(left) == 2048 - 160


def test_documents_go_on_in_one_piece_where_their_rows_are_neighbours(corpus):
    """What is left is packed anew: a long document that no row of was read is one document of the longer rows."""
    data = opened(corpus, [{"until": 3, "weights": {"code": 1}}, {"seq_len": 128, "weights": {"long": 1}}], micro_num=1)
    found = batches(data, 8)[3:]
    assert max(batch.max_seqlen for batch in found) == 128
    assert all((batch.labels[0, :-1] == batch.tokens[0, 1:]).float().mean() > 0.98 for batch in found)


def test_stages_that_change_no_rows_change_no_data(corpus):
    plain, staged = (
        opened(corpus, stages)
        for stages in ([], [{"until": 4, "lr": 1.0}, {"until": 9, "rope_base": 5e5}, {"lr": 0.1}])
    )
    assert rows_of(batches(plain, 20)) == rows_of(batches(staged, 20))
    assert [batch.stage for batch in batches(staged, 11)] == [0] * 4 + [1] * 5 + [2] * 2


def test_a_later_border_changes_nothing_before_it(corpus):
    """A mix that follows what was requested instead of what was consumed switches early."""
    early, late = (opened(corpus, [{"until": n}, {"weights": {"code": 1}, "seq_len": 4}]) for n in (80, 90))
    assert rows_of(batches(early, 80)) == rows_of(batches(late, 80))
    assert [batch.tokens.shape[1] for batch in batches(early, 82)[79:]] == [16, 8, 8]
    first = set(batches(early, 81)[80].tokens.ravel().tolist())
    assert first <= set(range(1, 321)), "rows of code alone, from the first batch of the stage on"


def test_any_layout_and_any_start_give_the_same_rows(corpus):
    stages = [{"until": 6, "weights": {"code": 1, "docs": 1}}, {"until": 15, "seq_len": 32}, {"seq_len": 4}]
    changes = {"micro_num": 4, "skip_batches": "4-7,15", "rampup_batch_size": "1 1 3"}
    alone = opened(corpus, stages, **changes)
    whole = rows_of(batches(alone, 30))
    halves = {"micro_num": 2, "skip_batches": "4-7,15"}
    by_two = [rows_of(batches(opened(corpus, stages, (rank, 2), **halves), 30)) for rank in range(2)]
    joined = [[row for pair in zip(*ranks, strict=True) for row in pair] for ranks in zip(*by_two, strict=True)]
    assert joined == rows_of(batches(opened(corpus, stages, **{**halves, "micro_num": 4}), 30))
    position = Position()
    for step in range(30):
        stored = json.loads(json.dumps(TrainState(step, position).to_json()))
        again = opened(corpus, stages, **changes)
        assert rows_of(batches(again, 1, TrainState.from_json(stored).position)) == whole[step : step + 1]
        position = alone.order.take(position)[1]
    assert len(position.borders) == 2 and asdict(position)["batch"] == 35
    assert [len(rows) for rows in whole[:4]] == [1, 1, 1, 2], "the ramp-up counts batches"
    assert alone.build(Position(4, 5)).after.batch == 9, "ids of skipped batches, the border among them, count on"


def test_another_batch_size_after_a_resume_keeps_what_was_read(corpus):
    """The border is where it was met, not where the present number of rows in a batch would put it."""
    stages = [{"until": 6}, {"seq_len": 4}]
    first = batches(opened(corpus, stages), 5)
    other = opened(corpus, stages, micro_num=5)
    second = batches(other, 60, first[-1].after)
    seen = [token for batch in [*first, *second] for token in batch.tokens.ravel().tolist()]
    assert second[0].after.borders == () and second[1].after.borders == (5 * 2 + 5,)
    assert sorted(seen[:2048]) == list(range(1, 2049))


def test_passes_over_the_data_are_counted_across_borders(corpus):
    data = opened(
        corpus,
        [
            {"until": 40},
            {"seq_len": 4},
        ][:2],
    )
    ends = [batch.after for batch in batches(data, 240)]
    epochs = [data.epoch(position) for position in ends]
    tokens = np.cumsum([batch.tokens.numel() for batch in batches(data, 240)])
    assert epochs == [int(n // 2048) for n in tokens]


BAD = [
    (
        [{"until": 3}, {"weights": {"cod": 1.0}}],
        r"stage 1: stages\[1\].weights: 'cod' is no folder with data, did you mean",
    ),
    ([{"until": 3}, {"weights": {"code": 1.0}, "seq_len": 180}], "folder 'code' fill no row"),
    ([{"until": 3}, {"seq_len": 4096}], "stage 1: the training data fill 0 rows"),
]


@pytest.mark.parametrize(("stages", "message"), BAD)
def test_stages_that_the_data_do_not_fit(corpus, stages, message):
    with pytest.raises(DataError, match=message):
        opened(corpus, stages)
