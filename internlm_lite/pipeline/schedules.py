"""Which of torch's pipeline schedules runs a number of micro-batches."""

from __future__ import annotations

import inspect
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

from internlm_lite.errors import ConfigError

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def schedule_class(schedule: str, size: int, micro_num: int) -> type[Any]:
    """For `size` pipeline ranks. Too few micro-batches for a schedule, as at the start of a ramp-up, run all forward
    passes first, then all backward passes: the same gradients."""
    if schedule == "zbv":
        return ScheduleZBVZeroBubble
    if schedule == "interleaved":
        return ScheduleInterleaved1F1B if micro_num % size == 0 else ScheduleLoopedBFS
    return Schedule1F1B if micro_num >= size else ScheduleGPipe


def new_schedule(schedule: str, stages: list[PipelineStage], micro_num: int, loss: Loss, *, early_receive: bool) -> Any:
    """A torch schedule over this rank's `stages`. `loss` sums, hence no scaling of gradients.

    Raises ConfigError without `early_receive` where torch is too old (`config.cross` refuses most such configs).
    """
    chosen = schedule_class(schedule, stages[0].group_size, micro_num)
    if schedule == "1f1b":
        return chosen(stages[0], micro_num, loss_fn=loss, scale_grads=False)
    options = {} if early_receive else _late_receive(chosen)
    return chosen(stages, micro_num, loss_fn=loss, scale_grads=False, **options)


def _late_receive(chosen: type[Any]) -> dict[str, bool]:
    """Raises ConfigError where torch does not know how."""
    if "defer_pp_recv" not in inspect.signature(chosen).parameters:
        raise ConfigError(
            f"parallel.pipeline.interleaved_overlap: found False with torch {torch.__version__}, expected torch 2.13 "
            "or newer; set it to True"
        )
    return {"defer_pp_recv": True}
