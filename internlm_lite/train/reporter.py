"""Collects metrics of steps from the device into one record per log line, and passes records to rank 0's sinks."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

from internlm_lite.batch import Batch, PassStep
from internlm_lite.config.run_stages import stages_of
from internlm_lite.config.schema import Config
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import model_flops_per_token
from internlm_lite.monitor.flops import internlm_flops_per_token, mfu, tflops_per_gpu
from internlm_lite.monitor.record import Origin, PassFigures, Sample, StepRecord, ValidationRecord, task_words
from internlm_lite.monitor.scalars import perplexity
from internlm_lite.monitor.sinks import FanOut
from internlm_lite.monitor.speed import SpeedMeter
from internlm_lite.optim.step_decision import StepOutcome
from internlm_lite.runtime.device import peak_flops
from internlm_lite.train.profiling import Stopwatch
from internlm_lite.train.train_state import TrainState
from internlm_lite.train.trainer import Trainer

logger = logging.getLogger("internlm_lite")
_LAST_LINES_SECONDS = 10.0
"""How long a failing rank waits for the numbers of lines that are due."""
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class _Line:
    """A step line whose numbers are on their way to the host."""

    numbers: comm.Pending
    """`_scalars`, then the sums of the metrics."""
    seconds: Callable[[], float]
    """Known once the numbers have arrived, as the next one."""
    fwd_bwd_seconds: Callable[[], float]
    tokens: int
    steps: int
    seq_len: int
    """Of the stage; a line is about steps of one stage."""
    in_pass: PassStep | None
    """Of the last batch."""
    known: dict[str, Any]
    """Those fields of the `StepRecord` that the host knew when the line was due."""


class Reporter:
    """Every rank has one, because collecting metrics is collective. Only rank 0 has sinks."""

    def __init__(self, config: Config, mesh: Mesh, trainer: Trainer) -> None:
        """`trainer`: the source of metrics and times."""
        self.speed = SpeedMeter(mesh.world.size)
        self._config, self._mesh, self._trainer = config, mesh, trainer
        self._sinks: FanOut | None = None
        self._make_sinks: Callable[[int], FanOut] | None = None
        self._stages = stages_of(config.data, config.stages)
        lengths = {stage.seq_len for stage in self._stages}
        model, share = config.model, config.source_share
        self._flops_per_token = {n: internlm_flops_per_token(model, n, share) for n in lengths}
        self._model_flops_per_token = {n: model_flops_per_token(model, n, share) for n in lengths}
        self._peak = peak_flops(mesh.device, config.model.dtype)
        self._time, self._last = Stopwatch(mesh.device), TrainState()
        self._lines: deque[_Line] = deque()

    def open_sinks(self, make: Callable[[int], FanOut], done: int) -> None:
        """Call on rank 0, once it is known that the run continues after `done` steps."""
        self._make_sinks = make
        self._sinks = make(done)

    def reopen_sinks(self, done: int) -> None:
        """Close the sinks and make them again, as in a restart after `done` steps: for a rollback."""
        if self._sinks is not None and self._make_sinks is not None:
            self._sinks.close()
            self._sinks = self._make_sinks(done)

    def state_dict(self, sums: torch.Tensor) -> dict[str, Any]:
        """Speed, and metrics as their `total` was; JSON-able, for a resume. Waits for the device."""
        self.write_lines(math.inf)
        return {"speed": self.speed.state_dict(), "metrics": self._trainer.metrics.state_dict(sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.write_lines(math.inf)  # the speed of undone steps must not count
        self.speed.load_state_dict(state["speed"])
        self._trainer.metrics.load_state_dict(state["metrics"])

    def start(self, state: TrainState) -> None:
        """Start timing: the next step begins now, from `state`."""
        self._trainer.fwd_bwd_time.take()  # discards the time of undone steps
        self._time, self._last = Stopwatch(self._mesh.device), state
        self._time.start()

    @contextmanager
    def excluded_from_timing(self) -> Iterator[None]:
        """Excludes the block (evaluation, saving) from training time, on CUDA from the time of the device."""
        self._time.stop()
        yield
        self._time.start()

    def step_line(self, state: TrainState, batch: Batch, outcome: StepOutcome) -> None:
        """Report the steps since the last line; `batch`, `outcome`: the last step's. Collective.

        Does not wait for the device: `write_lines` writes the line when its numbers are on the host."""
        sums, last = self._trainer.metrics.take(), self._last
        self._time.stop()
        seconds, fwd_bwd_seconds = self._time.take(), self._trainer.fwd_bwd_time.take()
        self._time.start()
        self._last = state
        if self._sinks is None:
            return
        known = {
            "step": state.step - 1,
            "micro_num": batch.micro_num,
            "num_consumed_tokens": state.consumed_tokens,
            "num_samples_in_batch": batch.stats.num_samples,
            "largest_length": batch.stats.largest_length,
            "largest_batch": batch.stats.largest_batch,
            "smallest_batch": batch.stats.smallest_batch,
            "adam_beta2": outcome.beta2,
            "pack_fill": batch.stats.num_labels / batch.stats.num_tokens,
            "stage": batch.stage if len(self._stages) > 1 else None,
            "memory_bytes": _peak_memory(self._mesh.device),
            "origin": Origin.here(),
        }
        numbers = comm.read_later(torch.cat([_scalars(outcome), sums]))
        tokens, steps = state.consumed_tokens - last.consumed_tokens, state.step - last.step
        seq_len = self._stages[batch.stage].seq_len
        in_pass = batch.stats.in_pass
        self._lines.append(_Line(numbers, seconds, fwd_bwd_seconds, tokens, steps, seq_len, in_pass, known))
        self.write_lines()

    def write_lines(self, until: float = -1) -> None:
        """Write the lines whose numbers have arrived; wait for those of steps up to index `until`."""
        while self._lines and (self._lines[0].known["step"] <= until or self._lines[0].numbers.ready()):
            self._write(self._lines.popleft())

    @contextmanager
    def all_lines_written(self) -> Iterator[None]:
        """Write all lines at the end of the block; after an error those that arrive soon, as the device may be lost."""
        try:
            yield
            self.write_lines(math.inf)
        except BaseException:
            deadline = time.monotonic() + _LAST_LINES_SECONDS
            with suppress(*comm.GPU_ERRORS):
                self.write_lines()
                while self._lines and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                    self.write_lines()
            self._lines.clear()
            raise

    def _write(self, line: _Line) -> None:
        if self._sinks is None:
            return
        norm, norm_fp32, skipped, loss_scale, next_lr, *sums = line.numbers.value()
        collected, seconds = self._trainer.metrics.figures(sums), line.seconds()
        speed = self.speed.add(line.tokens, seconds, line.steps)
        world, remaining = self._mesh.world.size, self._config.data.total_steps - 1 - line.known["step"]
        at = line.in_pass
        per_step, per_second = self.speed.seconds_per_step, collected.num_labels / seconds
        record = StepRecord(
            time=datetime.now().astimezone(),
            loss=collected.loss,
            tflops=tflops_per_gpu(self._flops_per_token[line.seq_len], line.tokens, seconds, world),
            speed=speed,
            lr=next_lr,
            loss_scale=loss_scale,
            grad_norm={"0_default": norm, "1_fp32": norm_fp32},
            inf_nan_skip_batches=int(skipped),
            fwd_bwd_time=line.fwd_bwd_seconds() / line.steps,
            acc=collected.accuracy,
            perplexity=perplexity(collected.cross_entropy),
            loss_from_metric=collected.cross_entropy,
            folders=collected.folders,
            mfu=mfu(self._model_flops_per_token[line.seq_len], line.tokens, seconds, world, self._peak),
            eta_seconds=None if per_step is None else per_step * remaining,
            in_pass=None if at is None else PassFigures(at.epoch, at.epoch_step, at.accumulation_step, per_second),
            **line.known,
        )
        self._sinks.step(record)

    def validation(self, found: ValidationRecord) -> None:
        if self._sinks is None:
            return
        self.write_lines(math.inf)
        logger.info(str(found))
        folders = {name: [f.tokens, f.loss, f.acc] for name, f in found.folders.items()}
        more: dict[str, Any] = {} if found.train_loss is None else {"train_loss": found.train_loss}
        if found.bits_per_byte is not None:
            more["bits_per_byte"] = found.bits_per_byte
        if found.tasks:
            more["tasks"] = found.tasks
        more |= {} if found.ema is None else {"ema": dict(found.ema)}
        self._sinks.event("evaluation", step=found.step, loss=found.loss, acc=found.acc, folders=folders, **more)
        self._sinks.validation(found)

    def tasks(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Report tasks that were evaluated without validation data; `step`: index of the last step before."""
        if self._sinks is not None:
            self.write_lines(math.inf)
            logger.info(f"tasks after {step + 1} steps:{task_words(scores)}")
            self._sinks.event("tasks", step=step, tasks=scores)

    def sample(self, steps_done: int, prompt: str, text: str) -> None:
        """Log the continuation `text` of a prompt and pass it to the sinks."""
        if self._sinks is not None:
            self.write_lines(math.inf)
            logger.info(f"sample after {steps_done} steps: {prompt!r} -> {text!r}")
            self._sinks.sample(Sample(steps_done, prompt, text))

    def event(self, kind: str, /, **facts: Any) -> None:
        """Pass an event to all sinks of rank 0; events.jsonl stores it. Lines of steps up to the one that it names come
        before it."""
        self.write_lines(facts.get("step", -1))
        if self._sinks is not None:
            self._sinks.event(kind, **facts)

    def close(self) -> None:
        if self._sinks is not None:
            self._sinks.close()


def _scalars(outcome: StepOutcome) -> torch.Tensor:
    """Norms, skipped steps, loss scale and learning rate: [5] fp64 on the device."""
    skipped = outcome.skips.skipped_steps
    scalars = (outcome.norm_model_dtype, outcome.norm_fp32, skipped, outcome.loss_scale, outcome.next_lr)
    return torch.stack([scalar.double() for scalar in scalars])


def _peak_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
