"""Launches and bytes of a step: the counting itself, and what compiling has to bring."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.apps.bench.launches import Counted, LaunchRow, count_launches

SHAPE = {"hidden": 128, "layers": 24, "heads": 2, "vocab": 1024, "seq_len": 64, "micro_bsz": 2, "micro_num": 2}


@pytest.fixture(scope="module")
def rows() -> dict[str, LaunchRow]:
    return {row.part: row for row in count_launches("tiny", **SHAPE)}


def test_bytes_of_operations() -> None:
    x, table, rows = torch.ones(8, 4), torch.ones(100, 4), torch.zeros(8, dtype=torch.int64)
    calls = {
        "product": (lambda: x @ x.t(), (1, 1, 0)),
        "sum": (lambda: x + x, (1, 0, 128 + 128 + 128)),
        "in place": (lambda: x.add_(x), (1, 0, 128 + 128 + 128)),
        "filled": (lambda: x.zero_(), (1, 0, 128)),
        "copied": (lambda: x.copy_(table[:8]), (1, 0, 128 + 128)),
        "looked up": (lambda: table.index_select(0, rows), (1, 0, 64 + 128 + 128)),
        "expanded": (lambda: x + x[:1].expand(8, 4), (1, 0, 16 + 128 + 128)),
        "a view": (lambda: x.view(4, 8).t(), (0, 0, 0)),
    }
    with Counted() as counted:
        for phase, (call, _) in calls.items():
            counted.phase = phase
            call()
    found = {phase: tuple(vars(counted.of(phase)).values()) for phase in calls}
    assert found == {phase: expected for phase, (_, expected) in calls.items()}


def test_a_compiled_block_is_few_kernels(rows: dict[str, LaunchRow]) -> None:
    """Five products and attention forward, ten and attention backward, and few between them."""
    forward, backward = rows["block forward, per token"], rows["block backward, per token"]
    assert forward.compiled is not None and forward.compiled <= 12 < forward.eager <= 40
    assert backward.compiled is not None and backward.compiled <= 20 < backward.eager <= 80
    assert forward.moved and forward.compiled_moved and forward.compiled_moved < forward.moved / 3
    assert backward.moved and backward.compiled_moved and backward.compiled_moved < backward.moved / 3


def test_compiled_logits_are_read_and_written_once_each(rows: dict[str, LaunchRow]) -> None:
    """In bf16: read for their maximum, for the sum, and for the gradient, which is written."""
    loss = rows["head and loss, per logit"]
    assert loss.compiled_moved is not None and 4 <= loss.compiled_moved <= 12
    assert loss.moved is not None and loss.moved > 30
