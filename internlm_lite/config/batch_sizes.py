"""Tokens of each step: what ramps and skipped batches make of data.micro_num; pure functions of the config."""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.run_stages import rampup_of, spans, stages_of
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError

_MOST_STEPS = 10**12


def step_tokens(config: Config, dp_size: int) -> Iterator[tuple[int, int, int]]:
    """(number of steps, tokens over all ranks of each of them, their stage) from the first step on; what comes
    after the last change of size goes on for more than 10^12 steps."""
    stages, steps = stages_of(config.data, config.stages), 0
    for span in spans(config.data, stages, rampup_of(config.data, stages, dp_size)):
        if span.trained:
            yield len(span.batches), span.micro_num * span.stage.row_tokens * dp_size, span.stage.number
            steps += len(span.batches)
        if steps > _MOST_STEPS:
            return


def with_warmup_steps(config: Config, dp_size: int) -> Config:
    """`config` with lr_scheduler.warmup_steps in place of warmup_tokens: the first steps that have so many tokens.

    Raises ConfigError if the warm-up and the decay do not fit total_steps.
    """
    curve = config.lr_scheduler
    if curve.warmup_tokens is None:
        return config
    steps, tokens = 0, 0
    for count, each, _ in step_tokens(config, dp_size):
        wanted = -(-(curve.warmup_tokens - tokens) // each)
        steps, tokens = steps + min(count, wanted), tokens + min(count, wanted) * each
        if wanted <= count:
            break
    decay = curve.num_decay_steps if curve.kind == "wsd" else 0
    if curve.init_steps + steps + decay > curve.total_steps:
        raise ConfigError(
            f"lr_scheduler.warmup_tokens: found {curve.warmup_tokens}, {steps} steps, after {curve.init_steps} "
            f"init_steps and before {decay} of decay; expected at most lr_scheduler.total_steps {curve.total_steps} in "
            "all; lower one of them"
        )
    curve = curve.model_copy(update={"warmup_steps": steps, "warmup_tokens": None})
    return config.model_copy(update={"lr_scheduler": curve})
