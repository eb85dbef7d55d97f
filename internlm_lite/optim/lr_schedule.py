"""Learning rate and beta2 as pure functions of the step, without torch and without state.

lr:  0 ... 0 | 1/w*lr, 2/w*lr ... lr | cosine from lr down to eta_min | eta_min
     init    | warm-up of w steps    | until total_steps              |
"""

from __future__ import annotations

import math

from internlm_lite.config.schema import Beta2SchedulerConfig, LrSchedulerConfig


def learning_rate(step: int, peak: float, schedule: LrSchedulerConfig) -> float:
    """Learning rate of optimizer step `step`, which counts from 0; `last_epoch` + 1 steps are added to it.

    As InternLM's FineTuneCosineAnnealingWarmupLR up to total_steps; later it rises again, and this stays at eta_min.
    """
    epoch = step + schedule.last_epoch + 1
    warmup_steps = int(schedule.total_steps * schedule.warmup_ratio)
    cosine_start = schedule.init_steps + warmup_steps
    if epoch < schedule.init_steps:
        return 0.0
    if epoch < cosine_start:
        return (epoch + 1 - schedule.init_steps) / warmup_steps * peak
    if epoch >= schedule.total_steps:
        return schedule.eta_min
    turn = math.pi * (epoch - cosine_start) / (schedule.total_steps - cosine_start)
    return schedule.eta_min + (peak - schedule.eta_min) * (1 + math.cos(turn)) / 2


def beta2(step: int, schedule: Beta2SchedulerConfig) -> float:
    """beta2 of step `step`, from 0: max(init_beta2, 1 - i^-c) with i = step + cur_iter + 1; init_beta2 for c <= 0.

    Skipped steps count here, but not for the learning rate: update rules take beta2 as a host number, and only the
    device knows the number of skipped steps.
    """
    i = step + schedule.cur_iter + 1
    if schedule.c <= 0 or i < 1:
        return schedule.init_beta2
    return max(schedule.init_beta2, 1 - i**-schedule.c)
