"""Tokens of each step: what ramps and skipped batches make of data.micro_num; pure functions of the config."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from internlm_lite.config.ranges import Rampup, parse_rampup, parse_skip_batches
from internlm_lite.config.schema import Config, DataConfig
from internlm_lite.errors import ConfigError

_MOST_WARMUP = 10**12


def rampup_of(data: DataConfig, dp_size: int) -> Rampup | None:
    """The ramp by batch ids, also where it is written in tokens."""
    rampup = parse_rampup(data.rampup_batch_size)
    return rampup and rampup.in_batches(data.micro_num, data.micro_bsz * data.seq_len * dp_size)


def step_tokens(data: DataConfig, dp_size: int) -> Iterator[tuple[int, int]]:
    """(number of steps, tokens over all ranks of each of them) from the first step on; the last has no end."""
    rampup, full, micro_tokens = rampup_of(data, dp_size), data.micro_num, data.micro_bsz * data.seq_len * dp_size
    skipped = parse_skip_batches(data.skip_batches)
    skips = sorted({*chain.from_iterable((ids.start, ids.stop) for ids in skipped)}, reverse=True)
    batch = 0
    while True:
        while skips and skips[-1] <= batch:
            skips.pop()
        border = rampup.next_border(batch, full) if rampup else None
        nearest = [stop for stop in (border, skips[-1] if skips else None) if stop is not None]
        stop = min(nearest, default=2**62)
        if not any(batch in ids for ids in skipped):
            yield stop - batch, (rampup.micro_num(batch, full) if rampup else full) * micro_tokens
        if not nearest:
            return
        batch = stop


def with_warmup_steps(config: Config, dp_size: int) -> Config:
    """`config` with lr_scheduler.warmup_steps in place of warmup_tokens: the first steps that have so many tokens.

    Raises ConfigError if the warm-up and the decay do not fit total_steps.
    """
    curve = config.lr_scheduler
    if curve.warmup_tokens is None:
        return config
    steps, tokens = 0, 0
    for count, each in step_tokens(config.data, dp_size):
        wanted = -(-(curve.warmup_tokens - tokens) // each)
        steps, tokens = steps + min(count, wanted), tokens + min(count, wanted) * each
        if wanted <= count or steps > _MOST_WARMUP:
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
