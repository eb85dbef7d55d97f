"""A run that goes on with fewer or more ranks: the same global batch, and so the same curve to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm_lite.train.elastic import keep_global_batch
from internlm_lite.train.save_folders import LastRun
from tests.train.runs import tiny

LAST = LastRun("run", 8, 2 * 4 * 2 * 32, (4, 2, 32))
"""Two data-parallel ranks, each with 4 micro-batches of 2 * 32 tokens."""


@pytest.mark.parametrize(("dp_size", "micro_num"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 4), (16, 4)])
def test_micro_batches_make_up_for_ranks_where_they_can(dp_size: int, micro_num: int, tmp_path: Path) -> None:
    assert keep_global_batch(tiny(None), LAST, dp_size).data.micro_num == micro_num


def test_who_changes_the_batch_means_it(tmp_path: Path) -> None:
    for changed in ({"micro_num": 2}, {"micro_bsz": 1}, {"rampup_batch_size": "2 2 100"}):
        config = tiny(None, data=changed)
        assert keep_global_batch(config, LAST, 1) is config
    assert keep_global_batch(tiny(None), None, 1).data.micro_num == 4
