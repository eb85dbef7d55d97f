"""The stages of a run as pure functions of the batch, without torch.

    batches    0 ......... 99 | 100 ....... 149 | 150 ......
    stage      0              | 1               | 2              until=100, until=150, None

Batch ids count skipped batches, too; without any they are the steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

from internlm_lite.config.ranges import Rampup, parse_rampup, parse_skip_batches
from internlm_lite.config.schema import Config, DataConfig, StageConfig


@dataclass(frozen=True)
class RunStage:
    """One stage, with the values that it takes from `data` filled in."""

    number: int
    start: int
    """Id of its first batch."""
    stop: int | None
    """Id of the first batch after it; None: it is the last."""
    seq_len: int
    micro_bsz: int
    weights: Mapping[str, float] | None
    """None: every document once per epoch. Folders left out are not read."""
    rope_base: float | None = None
    """None: model.rope_base."""
    lr: float | None = None
    """None: adam.lr."""
    weights_key: str = "data.weights"
    """Where the weights are written, for messages."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row."""
        return self.micro_bsz * self.seq_len

    @property
    def packing(self) -> tuple[object, ...]:
        """Equal for stages whose rows continue one order."""
        return self.seq_len, self.micro_bsz, None if self.weights is None else tuple(sorted(self.weights.items()))

    def facts(self) -> dict[str, object]:
        """What a change of stage may change, JSON-able."""
        weights = None if self.weights is None else dict(self.weights)
        values = {"weights": weights, "seq_len": self.seq_len, "rope_base": self.rope_base}
        return {**values, "micro_bsz": self.micro_bsz, "lr": self.lr}


def stages_of(data: DataConfig, stages: Sequence[StageConfig] = ()) -> tuple[RunStage, ...]:
    """The stages of a run, at least one. The last one has no end: with skipped batches a run needs some more."""
    given, found = stages or (StageConfig(),), []
    for number, stage in enumerate(given):
        found.append(
            RunStage(
                number,
                start=(given[number - 1].until or 0) if number else 0,
                stop=stage.until if number + 1 < len(given) else None,
                seq_len=stage.seq_len or data.seq_len,
                micro_bsz=stage.micro_bsz or data.micro_bsz,
                weights=data.weights if stage.weights is None else stage.weights,
                rope_base=stage.rope_base,
                lr=stage.lr,
                weights_key="data.weights" if stage.weights is None else f"stages[{number}].weights",
            )
        )
    return tuple(found)


def at_batch(stages: Sequence[RunStage], batch: int) -> RunStage:
    """The one that batch `batch` belongs to."""
    return stages[bisect_right(stages, batch, key=lambda stage: stage.start) - 1]


def stage_at(config: Config, step: int) -> RunStage:
    """The stage of batch `step`."""
    return at_batch(stages_of(config.data, config.stages), step)


def peak_rate(config: Config, step: int) -> float:
    """The peak learning rate of update `step`: that of the stage whose batch it trains on."""
    if not config.stages:
        return config.adam.lr
    *_, last = planned_spans(config.data, stages_of(config.data, config.stages), None, step + 1)
    return config.adam.lr if last.stage.lr is None else last.stage.lr


def peak_rates(config: Config, steps: int) -> Iterator[float]:
    """`peak_rate` of the first `steps` updates."""
    for span in planned_spans(config.data, stages_of(config.data, config.stages), None, steps):
        rate = config.adam.lr if span.stage.lr is None else span.stage.lr
        yield from repeat(rate, len(span.batches) if span.trained else 0)


def in_stage(config: Config, stage: RunStage) -> Config:
    """`config` as if the run had this stage alone: its values under the keys that it replaces."""
    data = {"seq_len": stage.seq_len, "micro_bsz": stage.micro_bsz, "weights": stage.weights}
    model = {} if stage.rope_base is None else {"rope_base": stage.rope_base}
    adam = {} if stage.lr is None else {"lr": stage.lr}
    sections = {"data": config.data.model_copy(update=data), "model": config.model.model_copy(update=model)}
    return config.model_copy(update={**sections, "adam": config.adam.model_copy(update=adam), "stages": []})


@dataclass(frozen=True)
class Span:
    """Batches in a row of one stage and one size, all trained on or all skipped."""

    batches: range
    stage: RunStage
    micro_num: int
    """Micro-batches of a data-parallel rank."""
    trained: bool


def rampup_of(data: DataConfig, stages: Sequence[RunStage], dp_size: int) -> Rampup | None:
    """The ramp by batch ids, also where it is written in tokens."""
    rampup = parse_rampup(data.rampup_batch_size)
    return rampup and rampup.in_batches(data.micro_num, [(stage.start, stage.row_tokens * dp_size) for stage in stages])


def spans(data: DataConfig, stages: Sequence[RunStage], rampup: Rampup | None) -> Iterator[Span]:
    """All batches in order, without end. `rampup`: from `rampup_of`."""
    skipped = parse_skip_batches(data.skip_batches)
    skips = sorted(chain.from_iterable((ids.start, ids.stop) for ids in skipped))
    borders = sorted({*skips, *(stage.start for stage in stages)})
    start = 0
    while True:
        stop = _next_border(start, borders, rampup, data.micro_num)
        size = data.micro_num if rampup is None else rampup.micro_num(start, data.micro_num)
        trained = not any(start in ids for ids in skipped)
        yield Span(range(start, stop), at_batch(stages, start), size, trained)
        start = stop


_ENDLESS = 2**62


def _next_border(start: int, borders: Sequence[int], rampup: Rampup | None, full: int) -> int:
    """The first batch after `start` that may differ in stage, size, or in being skipped."""
    at = bisect_right(borders, start)
    stop = borders[at] if at < len(borders) else _ENDLESS
    larger = None if rampup is None else rampup.next_border(start, full)
    return stop if larger is None else min(stop, larger)


def planned_spans(data: DataConfig, stages: Sequence[RunStage], rampup: Rampup | None, steps: int) -> Iterator[Span]:
    """`spans`, until `steps` batches have been trained on."""
    for span in spans(data, stages, rampup):
        if steps <= 0:
            return
        kept = replace(span, batches=span.batches[:steps]) if span.trained else span
        steps -= len(kept.batches) if span.trained else 0
        yield kept
