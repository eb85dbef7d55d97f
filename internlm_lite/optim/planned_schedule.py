"""Learning rate, momenta and batch size over a whole run, before it starts: for people, and as schedule.json.

Everything is a function of the step: nothing that happens in a run, such as skipped updates, is in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from internlm_lite.config.batch_sizes import step_tokens
from internlm_lite.config.run_stages import peak_rate
from internlm_lite.config.schema import Config
from internlm_lite.optim.lr_schedule import beta2, learning_rate

MOST_POINTS = 500
FILE = "schedule.json"


@dataclass(frozen=True)
class PlannedSchedule:
    """One list each, with an entry for each of `step`, ascending from 0. At most MOST_POINTS steps."""

    step: list[int]
    """Index of the step, as in the step line."""
    lr: list[float]
    """Learning rate of that step's update. (The step line shows that of the next one, as InternLM's does.)"""
    momentum: list[float]
    """beta1 of Adam and Lion, momentum of SGD, Muon's own."""
    beta2: list[float]
    batch_tokens: list[int]
    """Tokens of the step over all ranks."""
    tokens: list[int]
    """Tokens trained on before the step."""
    stage: list[int]


def planned_schedule(config: Config, dp_size: int) -> PlannedSchedule:
    """Of a run on `dp_size` data-parallel ranks. lr_scheduler.warmup_tokens is steps already (`with_warmup_steps`)."""
    batches = _batches(config, dp_size)
    steps = _shown_steps(config, [start for start, *_ in batches])
    tokens, sizes, stages, at = [], [], [], 0
    for step in steps:
        while at + 1 < len(batches) and batches[at + 1][0] <= step:
            at += 1
        start, size, before, stage = batches[at]
        sizes.append(size)
        stages.append(stage)
        tokens.append(before + (step - start) * size)
    return PlannedSchedule(
        step=steps,
        lr=[learning_rate(step, peak_rate(config, step), config.lr_scheduler) for step in steps],
        momentum=[_momentum(config)] * len(steps),
        beta2=[beta2(step, config.beta2_scheduler) for step in steps],
        batch_tokens=sizes,
        tokens=tokens,
        stage=stages,
    )


def write_schedule(folder: Path, config: Config, dp_size: int) -> None:
    """Write schedule.json, which the report draws; a full disk is no reason to end a run here."""
    text = json.dumps(asdict(planned_schedule(config, dp_size)))
    part = folder / f".{FILE}.part"
    with suppress(OSError):
        part.write_text(text, "utf-8")
        part.replace(folder / FILE)


def borders(config: Config) -> dict[str, int]:
    """Name of a part of the learning-rate curve -> its first step, in order; those before the run are left out."""
    curve = config.lr_scheduler
    warm = curve.init_steps + curve.num_warmup_steps
    found = {"init": 0, "warm-up": curve.init_steps, "wsd: stable" if curve.kind == "wsd" else curve.kind: warm}
    if curve.kind == "wsd":
        found["wsd: decay"] = curve.total_steps - curve.num_decay_steps
    if curve.kind in ("cosine", "linear", "wsd"):
        found["eta_min"] = curve.total_steps
    starts = list(found.values())
    kept = {name: step for (name, step), after in zip(found.items(), [*starts[1:], 2**62], strict=True) if after > step}
    done = curve.last_epoch + 1
    return {name: step - done for name, step in kept.items() if 0 <= step - done <= config.data.total_steps}


def _batches(config: Config, dp_size: int) -> list[tuple[int, int, int, int]]:
    """(first step, tokens of a step, tokens before the first step, stage) of steps of one stage and size."""
    found: list[tuple[int, int, int, int]] = []
    step, tokens = 0, 0
    for count, each, stage in step_tokens(config, dp_size):
        if not found or found[-1][1::2] != (each, stage):
            found.append((step, each, tokens, stage))
        step, tokens = step + count, tokens + count * each
        if step >= config.data.total_steps:
            break
    return found


def _shown_steps(config: Config, starts: Sequence[int]) -> list[int]:
    """Borders with their neighbours, and steps at equal distances between."""
    total = config.data.total_steps
    if total <= MOST_POINTS:
        return list(range(total))
    parts = [*borders(config).values(), *(int(step) for step, _ in config.lr_scheduler.step_factors or [])]
    corners = [step + aside for step in [total - 1, *parts, *starts] for aside in (-1, 0, 1)]
    special = [step for step in dict.fromkeys(corners) if 0 <= step < total][: MOST_POINTS // 2]
    even = [step * (total - 1) // (MOST_POINTS // 2 - 1) for step in range(MOST_POINTS // 2)]
    return sorted({*special, *even})


def _momentum(config: Config) -> float:
    rule = config.optimizer
    if rule.name == "sgd":
        return rule.momentum or 0.0
    if rule.name == "muon":
        return 0.95 if rule.momentum is None else rule.momentum
    return config.adam.adam_beta1
