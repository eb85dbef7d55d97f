"""A run that goes on with fewer or more ranks: the same global batch, and so the same curve to rounding."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from internlm_lite.train.changes import LastRun, keep_global_batch
from tests import cli
from tests.corpus import write_corpus
from tests.train.runs import tiny
from tests.train.test_launch import CONFIG, metrics_of, start_ranks

LAST = LastRun("run", 8, 2 * 4 * 2 * 32, tiny(None).data.model_dump())
"""Two data-parallel ranks, each with 4 micro-batches of 2 * 32 tokens."""


@pytest.mark.parametrize(("dp_size", "micro_num"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 4), (16, 4)])
def test_micro_batches_make_up_for_ranks_where_they_can(dp_size: int, micro_num: int, tmp_path: Path) -> None:
    assert keep_global_batch(tiny(None), LAST, dp_size).data.micro_num == micro_num


def test_who_changes_the_batch_means_it(tmp_path: Path) -> None:
    for changed in ({"micro_num": 2}, {"micro_bsz": 1}, {"rampup_batch_size": "2 2 100"}):
        config = tiny(None, data=changed)
        assert keep_global_batch(config, LAST, 1) is config
    assert keep_global_batch(tiny(None), None, 1).data.micro_num == 4


def test_ranks_that_cannot_take_the_batch_for_a_while_do_not_change_it(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "config.py").write_text(CONFIG)
    for size, steps in ((2, 4), (3, 6), (2, 8)):
        ended = [cli.ended(*rank) for rank in start_ranks(tmp_path, size, f"data.total_steps={steps}")]
        assert [one.code for one in ended] == [0] * size, ended
        assert ("a step takes 768 tokens now, expected 512" in ended[0].output) == (size == 3)
    consumed = [line["num_consumed_tokens"] for line in metrics_of(tmp_path)]
    assert [after - before for before, after in pairwise([0, *consumed])] == [512] * 4 + [768] * 2 + [512] * 2
