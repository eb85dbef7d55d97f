"""Learning rate and beta2 as pure functions of the step, without torch and without state.

lr:  0 ... 0 | 1/w*lr, 2/w*lr ... lr | cosine from lr down to eta_min | eta_min
     init    | warm-up of w steps    | until total_steps              |
                                     | or lr, or lr/sqrt(1), lr/sqrt(2) ...
"""

from __future__ import annotations

import math

from internlm_lite.config.schema import Beta2SchedulerConfig, LrSchedulerConfig


def learning_rate(step: int, peak: float, schedule: LrSchedulerConfig) -> float:
    """Learning rate of optimizer step `step`, which counts from 0; `last_epoch` + 1 steps are added to it.

    As InternLM's FineTuneCosineAnnealingWarmupLR up to total_steps; later it rises again, and this stays at eta_min.
    """
    epoch = step + schedule.last_epoch + 1
    warmup_steps = schedule.num_warmup_steps
    decay_start = schedule.init_steps + warmup_steps
    if epoch < schedule.init_steps:
        return 0.0
    if epoch < decay_start:
        return (epoch + (0 if schedule.warmup_from_zero else 1) - schedule.init_steps) / warmup_steps * peak
    return _DECAYS[schedule.decay](epoch - decay_start, schedule.total_steps - decay_start, peak, schedule.eta_min)


def _cosine(t: int, steps: int, peak: float, least: float) -> float:
    return least if t >= steps else least + (peak - least) * (1 + math.cos(math.pi * t / steps)) / 2


def _constant(t: int, steps: int, peak: float, least: float) -> float:
    return peak


def _inverse_sqrt(t: int, steps: int, peak: float, least: float) -> float:
    return max(least, peak / math.sqrt(t + 1))


_DECAYS = {"cosine": _cosine, "constant": _constant, "inverse_sqrt": _inverse_sqrt}
"""lr_scheduler.decay -> function of the step after the warm-up, the steps up to total_steps, lr and eta_min."""


def beta2(step: int, schedule: Beta2SchedulerConfig) -> float:
    """beta2 of step `step`, from 0: max(init_beta2, 1 - i^-c) with i = step + cur_iter + 1; init_beta2 for c <= 0.

    Skipped steps count here, but not for the learning rate: update rules take beta2 as a host number, and only the
    device knows the number of skipped steps.
    """
    i = step + schedule.cur_iter + 1
    if schedule.c <= 0 or i < 1:
        return schedule.init_beta2
    return max(schedule.init_beta2, 1 - i**-schedule.c)
