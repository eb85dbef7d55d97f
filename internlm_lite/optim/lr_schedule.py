"""Learning rate and beta2 as pure functions of the step, without torch and without state.

lr:  0 ... 0 | 1/w*lr, 2/w*lr ... lr | by lr_scheduler.kind, such as a cosine down to eta_min | eta_min
     init    | warm-up of w steps    | until total_steps                                      |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import takewhile

from internlm_lite.config.schema import Beta2SchedulerConfig, LrSchedulerConfig


def learning_rate(step: int, peak: float, schedule: LrSchedulerConfig) -> float:
    """Learning rate of optimizer step `step`, which counts from 0; `last_epoch` + 1 steps are added to it.

    As InternLM's FineTuneCosineAnnealingWarmupLR up to total_steps; later it rises again, and this stays at eta_min.
    """
    epoch = step + schedule.last_epoch + 1
    warmup_steps = schedule.num_warmup_steps
    decay_start = schedule.init_steps + warmup_steps
    if schedule.kind == "noam":
        peak /= math.sqrt((schedule.noam_width or 1) * max(warmup_steps, 1))
    if epoch < schedule.init_steps:
        return 0.0
    if epoch < decay_start:
        return (epoch + (0 if schedule.warmup_from_zero else 1) - schedule.init_steps) / warmup_steps * peak
    return _KINDS[schedule.kind](epoch - decay_start, peak, schedule)


def _cosine(t: int, peak: float, schedule: LrSchedulerConfig) -> float:
    steps, least = _steps_after_warmup(schedule), schedule.eta_min
    return least if t >= steps else least + (peak - least) * (1 + math.cos(math.pi * t / steps)) / 2


def _linear(t: int, peak: float, schedule: LrSchedulerConfig) -> float:
    steps, least = _steps_after_warmup(schedule), schedule.eta_min
    return least if t >= steps else least + (peak - least) * (1 - t / steps)


def _wsd(t: int, peak: float, schedule: LrSchedulerConfig) -> float:
    """Counted from the end: with more steps in all, the rates of the stable phase stay what they were."""
    steps, least = schedule.num_decay_steps, schedule.eta_min
    decayed = t - (_steps_after_warmup(schedule) - steps)
    if decayed <= 0:
        return peak
    return least if decayed >= steps else _SHAPES[schedule.decay_shape](decayed / steps, peak, least)


def _inverse_sqrt(t: int, peak: float, schedule: LrSchedulerConfig) -> float:
    timescale = max(schedule.num_warmup_steps, 1)
    return max(schedule.eta_min, peak * math.sqrt(timescale / (timescale + t)))


def _noam(t: int, peak: float, schedule: LrSchedulerConfig) -> float:
    return _inverse_sqrt(t + (0 if schedule.warmup_from_zero else 1), peak, schedule)  # k counts as the warm-up does


def _constant(t: int, peak: float, schedule: LrSchedulerConfig) -> float:
    return peak


def _steps(t: int, peak: float, schedule: LrSchedulerConfig) -> float:
    step = t + schedule.init_steps + schedule.num_warmup_steps
    passed = list(takewhile(lambda entry: entry[0] <= step, schedule.step_factors or []))
    return peak * passed[-1][1] if passed else peak


def _steps_after_warmup(schedule: LrSchedulerConfig) -> int:
    return schedule.total_steps - schedule.init_steps - schedule.num_warmup_steps


_KINDS: dict[str, Callable[[int, float, LrSchedulerConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "noam": _noam,
    "constant": _constant,
    "steps": _steps,
}
"""lr_scheduler.kind -> function of the step after the warm-up, the peak and the schedule."""
_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda x, peak, least: least + (peak - least) * (1 - x),
    "cosine": lambda x, peak, least: least + (peak - least) * (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x, peak, least: least + (peak - least) * (1 - math.sqrt(x)),
    "exponential": lambda x, peak, least: peak * (least / peak) ** x if peak else 0.0,
}
"""lr_scheduler.decay_shape -> function of the progress from 0 to 1, the peak and the least rate."""


def beta2(step: int, schedule: Beta2SchedulerConfig) -> float:
    """beta2 of step `step`, from 0: max(init_beta2, 1 - i^-c) with i = step + cur_iter + 1; init_beta2 for c <= 0.

    Skipped steps count here, but not for the learning rate: update rules take beta2 as a host number, and only the
    device knows the number of skipped steps.
    """
    i = step + schedule.cur_iter + 1
    if schedule.c <= 0 or i < 1:
        return schedule.init_beta2
    return max(schedule.init_beta2, 1 - i**-schedule.c)
