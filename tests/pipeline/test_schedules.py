"""Which of torch's schedules is taken, and that two ranks agree on the order of the messages between them."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from internlm_lite.errors import ConfigError
from internlm_lite.pipeline import schedules
from internlm_lite.pipeline.schedules import new_schedule, schedule_class
from internlm_lite.pipeline.split import rank_to_stages, stage_to_rank
from tests.torches import HAS_ZBV


@pytest.mark.parametrize(
    ("schedule", "size", "micro_num", "expected"),
    [
        ("1f1b", 4, 4, Schedule1F1B),
        ("1f1b", 4, 9, Schedule1F1B),
        ("1f1b", 4, 3, ScheduleGPipe),
        ("1f1b", 4, 1, ScheduleGPipe),
        ("interleaved", 4, 8, ScheduleInterleaved1F1B),
        ("interleaved", 4, 6, ScheduleLoopedBFS),
        ("interleaved", 4, 1, ScheduleLoopedBFS),
        ("zbv", 4, 1, ScheduleZBVZeroBubble),
        ("zbv", 4, 16, ScheduleZBVZeroBubble),
    ],
)
def test_the_schedule_for_a_number_of_micro_batches(schedule: str, size: int, micro_num: int, expected: type) -> None:
    assert schedule_class(schedule, size, micro_num) is expected


def built(schedule: str, size: int, chunks: int, micro_num: int, early_receive: bool) -> Any:
    """The schedule as pipeline rank 0 builds it; the orders of all ranks are in it."""
    stages = [
        SimpleNamespace(
            group_size=size,
            num_stages=size * chunks,
            group_rank=0,
            group=None,
            stage_index=number,
            has_backward=True,
            is_first=number == 0,
            is_last=number == size * chunks - 1,
            submod=torch.nn.Identity(),
        )
        for number in rank_to_stages(0, size, chunks, schedule)
    ]
    loss = lambda hidden, micro: hidden.sum()  # noqa: E731
    return new_schedule(schedule, stages, micro_num, loss, early_receive=early_receive)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "chunks", "early_receive"),
    [
        ("interleaved", 2, True),
        ("interleaved", 3, True),
        *[("interleaved", 2, False), ("interleaved", 3, False), ("zbv", 2, True)] * HAS_ZBV,
    ],
)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_messages_are_received_in_the_order_they_are_sent(
    schedule: str, chunks: int, early_receive: bool, size: int
) -> None:
    """Hidden states and gradients from one rank to another travel in one queue, without a tag. (zbv with late receives
    fails here, for any number of micro-batches above the number of stages: the config check refuses it.)"""
    for micro_num in (1, 2, 3, 4, 6, 8, 12, 16):
        order = built(schedule, size, chunks, micro_num, early_receive).pipeline_order_with_comms
        sent, received = defaultdict(list), defaultdict(list)
        for rank, actions in order.items():
            for action in actions:
                kind = action.computation_type.name
                if kind not in ("SEND_F", "SEND_B", "RECV_F", "RECV_B"):
                    continue
                # A send names the stage it comes from, a receive the stage it is for.
                step = {"SEND_F": 1, "SEND_B": -1, "RECV_F": -1, "RECV_B": 1}[kind]
                peer = stage_to_rank(size, chunks, schedule)[action.stage_index + step]
                if kind.startswith("SEND"):
                    sent[rank, peer].append((kind[-1], action.stage_index + step, action.microbatch_index))
                else:
                    received[peer, rank].append((kind[-1], action.stage_index, action.microbatch_index))
        assert sent == received, micro_num
        assert sum(map(len, sent.values())) > 0


def test_a_torch_that_cannot_receive_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "ScheduleInterleaved1F1B", lambda stages, n_microbatches, loss_fn, scale_grads: None)
    with pytest.raises(ConfigError, match=r"interleaved_overlap: found False with torch .*, expected torch 2\.13 or"):
        built("interleaved", 2, 2, 4, early_receive=False)
    assert built("interleaved", 2, 2, 4, early_receive=True) is None
