"""What a run reads of its data: its number of steps from epochs or tokens, the steps of an epoch, tokens and epochs of
each folder by stage.

All of it is computed from the sizes of rows and folders before the run starts; no token is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from internlm_lite.batch import Position
from internlm_lite.config.cross import cross_problems
from internlm_lite.config.run_stages import RunStage, Span, planned_spans, spans
from internlm_lite.config.schema import Config, DataConfig
from internlm_lite.data.data_loader import TrainingData
from internlm_lite.data.phases import FolderState, states_after
from internlm_lite.errors import ConfigError, DataError

MOST_STEPS = 10**12
_ROUNDING = 1e-9


@dataclass(frozen=True)
class FolderUse:
    """What a stage reads of a folder."""

    tokens: int
    """Of its rows, skipped batches included."""
    epochs: float
    """Passes over the folder from the start of the run to the end of the stage, the last one in part."""


@dataclass(frozen=True)
class StageUse:
    """What a stage trains on."""

    stage: RunStage
    steps: int
    tokens: int
    """Without skipped batches."""
    folders: dict[str, FolderUse]


def with_total_steps(config: Config, data: TrainingData) -> Config:
    """`config` with data.total_steps, and lr_scheduler.total_steps where that is left out, from data.epochs or
    data.total_tokens, and with the steps of an epoch where a key says "epoch". Raises ConfigError where other keys do
    not fit the number of steps."""
    config = _with_epoch_steps(config, data)
    if config.data.epochs is None and config.data.total_tokens is None:
        return config
    steps = _steps(config.data, data)
    curve = config.lr_scheduler
    curve = curve if curve.total_steps else curve.model_copy(update={"total_steps": steps})
    length = {"total_steps": steps, "epochs": None, "total_tokens": None}  # for the checks, which want one of them
    checked = config.model_copy(update={"data": config.data.model_copy(update=length), "lr_scheduler": curve})
    known = list(cross_problems(config, None))
    if problems := [problem for problem in cross_problems(checked, None) if problem not in known]:
        lines = "\n".join(f"{problem.keys[0]}: {problem.text}" for problem in problems)
        raise ConfigError(f"with data.total_steps={steps}, from {_length(config.data)}:\n{lines}")
    return checked.model_copy(update={"data": config.data.model_copy(update={"total_steps": steps})})


def _with_epoch_steps(config: Config, data: TrainingData) -> Config:
    """The checks of the config leave nothing that would make passes of different length."""
    rows, steps = data.phases.at(()).mix.epoch_rows, None
    if rows is not None:
        steps = max(1, rows // (config.data.micro_num * data.order.dp_size))
    if config.data.valid_every == "epoch":
        config = config.model_copy(update={"data": config.data.model_copy(update={"valid_every": steps})})
    if config.ckpt.checkpoint_every == "epoch":
        config = config.model_copy(update={"ckpt": config.ckpt.model_copy(update={"checkpoint_every": steps})})
    return config


def _length(config: DataConfig) -> str:
    return f"data.epochs={config.epochs:g}" if config.epochs else f"data.total_tokens={config.total_tokens}"


def _steps(config: DataConfig, data: TrainingData) -> int:
    """The first number of steps that reaches the tokens; of epochs without weights or stages, the last within them."""
    plain_rows = data.phases.at(()).mix.epoch_rows if len(data.stages) == 1 else None
    size = data.order.dp_size
    if config.epochs is not None and plain_rows is not None:
        wanted, round_up = round(config.epochs * plain_rows), False
        per_micro = [size] * len(data.stages)
    else:
        wanted, round_up = config.total_tokens or round((config.epochs or 0) * data.total_tokens), True
        per_micro = [size * stage.row_tokens for stage in data.stages]
    steps, done = 0, 0
    for span in spans(config, data.stages, data.order.rampup):
        if round_up and not span.trained:
            continue
        batch = span.micro_num * per_micro[span.stage.number]
        left = wanted - done
        count = min(len(span.batches), -(-left // batch) if round_up else left // batch)
        steps, done = steps + count * span.trained, done + count * batch
        if count < len(span.batches) or done >= wanted or steps > MOST_STEPS:
            break
    if not 0 < steps <= MOST_STEPS:
        raise ConfigError(
            f"{_length(config)} is {steps} steps, expected at least 1 and at most {MOST_STEPS}; change the value, or "
            "give data.total_steps"
        )
    return steps


def stage_uses(config: DataConfig, data: TrainingData) -> list[StageUse]:
    """What each stage reads in a run of config.total_steps steps from the beginning."""
    uses = []
    first, position = Position(), Position()
    steps, tokens = [0] * len(data.stages), [0] * len(data.stages)
    for stage, some in _by_stage(config, data):
        for span in some:
            rows = len(span.batches) * span.micro_num * data.order.dp_size
            position = data.order.after_batches(position, span.batches.stop, rows)
            if span.trained:
                steps[stage.number] += len(span.batches)
                tokens[stage.number] += rows * stage.row_tokens
        folders = _folder_uses(data, stage, first, position)
        uses.append(StageUse(stage, steps[stage.number], tokens[stage.number], folders))
        first = position
    return uses


def _by_stage(config: DataConfig, data: TrainingData) -> Iterator[tuple[RunStage, list[Span]]]:
    planned = list(planned_spans(config, data.stages, data.order.rampup, config.total_steps))
    for stage in data.stages:
        if some := [span for span in planned if span.stage.number == stage.number]:
            yield stage, some


def _folder_uses(data: TrainingData, stage: RunStage, first: Position, last: Position) -> dict[str, FolderUse]:
    """What is read between two positions of one stage; `last` is in its phase."""
    phase, start = data.phases.at(last.borders), last.borders[-1] if last.borders else 0
    before = max(0, first.packs - start)
    rows = phase.mix.taken(last.packs - start) - phase.mix.taken(before)
    states = states_after(phase, last.packs - start)
    return {
        folder.name: FolderUse(int(count) * stage.row_tokens, _epochs(state, folder.tokens))
        for folder, count, state in zip(data.packed, rows, states, strict=True)
    }


def _epochs(state: FolderState, tokens: int) -> float:
    if state.unread is None or not tokens:
        return float(state.passes)
    return state.passes + 1 - int(np.sum(state.unread[:, 1] - state.unread[:, 0])) / tokens


def check_caps(config: DataConfig, data: TrainingData) -> None:
    """Raises DataError if the run reads a folder more often than data.max_epochs allows, or that names none."""
    caps = config.max_epochs
    if caps is None:
        return
    names = list(data.folders)
    if isinstance(caps, dict) and (unknown := [name for name in caps if name not in names]):
        raise DataError(
            f"data.max_epochs: {unknown[0]!r} is no folder with data; expected some of {', '.join(names)}; correct it"
        )
    last = stage_uses(config, data)[-1].folders
    most = caps if isinstance(caps, dict) else dict.fromkeys(names, caps)
    over = [name for name, cap in most.items() if last[name].epochs > cap + _ROUNDING]
    if over:
        found = ", ".join(f"{name!r} {last[name].epochs:.4g} times (allowed {most[name]:g})" for name in over)
        raise DataError(
            f"data.max_epochs: in {config.total_steps} steps the run would read folder {found}; lower its weight or "
            "the number of steps, add data, or raise data.max_epochs"
        )
