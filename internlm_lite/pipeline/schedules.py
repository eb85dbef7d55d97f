"""Chooses and builds torch's pipeline schedule for a number of micro-batches."""

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
    """torch's class for `size` pipeline ranks. With too few micro-batches for the schedule, as at the start of a batch
    ramp-up, a class that runs all forward passes, then all backward passes: same gradients."""
    if schedule == "zbv":
        return ScheduleZBVZeroBubble
    if schedule == "interleaved":
        return ScheduleInterleaved1F1B if micro_num % size == 0 else ScheduleLoopedBFS
    return Schedule1F1B if micro_num >= size else ScheduleGPipe


def new_schedule(schedule: str, stages: list[PipelineStage], micro_num: int, loss: Loss, *, early_receive: bool) -> Any:
    """A torch schedule over this rank's `stages`. Gradients are not scaled, because `loss` is a sum over micro-batches.

    `early_receive` False: receives are posted late. Raises ConfigError if torch does not support that.
    """
    chosen = schedule_class(schedule, stages[0].group_size, micro_num)
    if schedule == "1f1b":
        return chosen(stages[0], micro_num, loss_fn=loss, scale_grads=False)
    options = {} if early_receive else _late_receive(chosen)
    return chosen(stages, micro_num, loss_fn=loss, scale_grads=False, **options)


def _late_receive(chosen: type[Any]) -> dict[str, bool]:
    """The schedule's option for late receives. Raises ConfigError if this torch does not have it."""
    if "defer_pp_recv" not in inspect.signature(chosen).parameters:
        raise ConfigError(
            f"parallel.pipeline.interleaved_overlap: found False with torch {torch.__version__}, expected torch 2.13 "
            "or newer; set it to True"
        )
    return {"defer_pp_recv": True}
