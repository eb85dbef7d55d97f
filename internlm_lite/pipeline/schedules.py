"""Which of torch's pipeline schedules runs a number of micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def schedule_class(schedule: str, size: int, micro_num: int) -> type[Any]:
    """For `size` pipeline ranks. Too few micro-batches for a schedule, as at the start of a ramp-up, run all forward
    passes first, then all backward passes: the same gradients."""
    if schedule == "zbv":
        return ScheduleZBVZeroBubble
    if schedule == "interleaved":
        return ScheduleInterleaved1F1B if micro_num % size == 0 else ScheduleLoopedBFS
    return Schedule1F1B if micro_num >= size else ScheduleGPipe


def new_schedule(schedule: str, stages: list[PipelineStage], micro_num: int, loss: Loss, early_receive: bool) -> Any:
    """A torch schedule over this rank's `stages`. `loss` sums, hence no scaling of gradients. Without `early_receive`
    torch 2.13 is needed (`config.cross`).
    """
    chosen = schedule_class(schedule, stages[0].group_size, micro_num)
    if schedule == "1f1b":
        return chosen(stages[0], micro_num, loss_fn=loss, scale_grads=False)
    options = {} if early_receive else {"defer_pp_recv": True}
    return chosen(stages, micro_num, loss_fn=loss, scale_grads=False, **options)
