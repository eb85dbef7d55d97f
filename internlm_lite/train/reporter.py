"""Collects metrics of steps from the device into one record per log line, and passes records to rank 0's sinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import torch

from internlm_lite.batch import Batch
from internlm_lite.config.schema import Config
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import model_flops_per_token
from internlm_lite.monitor.flops import internlm_flops_per_token, mfu, tflops_per_gpu
from internlm_lite.monitor.metrics import Collected
from internlm_lite.monitor.record import Origin, Sample, StepRecord, ValidationRecord
from internlm_lite.monitor.scalars import perplexity
from internlm_lite.monitor.sinks import FanOut
from internlm_lite.monitor.speed import SpeedMeter
from internlm_lite.optim.zero import StepOutcome
from internlm_lite.runtime.device import peak_flops
from internlm_lite.train.train_state import TrainState
from internlm_lite.train.trainer import Trainer

logger = logging.getLogger("internlm_lite")


class Reporter:
    """Every rank has one, because collecting metrics is collective. Only rank 0 has sinks."""

    def __init__(self, config: Config, mesh: Mesh, trainer: Trainer) -> None:
        """`trainer`: the source of metrics and times."""
        self.speed = SpeedMeter(mesh.world.size)
        self._config, self._mesh, self._trainer = config, mesh, trainer
        self._sinks: FanOut | None = None
        self._make_sinks: Callable[[int], FanOut] | None = None
        self._flops_per_token = internlm_flops_per_token(config.model, config.data.seq_len)
        self._model_flops_per_token = model_flops_per_token(config.model, config.data.seq_len)
        self._peak = peak_flops(mesh.device, config.model.dtype)
        self._begin = time.perf_counter()
        self._last: TrainState | None = None

    def open_sinks(self, make: Callable[[int], FanOut], done: int) -> None:
        """Call on rank 0, once it is known that the run continues after `done` steps."""
        self._make_sinks = make
        self._sinks = make(done)

    def reopen_sinks(self, done: int) -> None:
        """Close the sinks and make them again, as in a restart after `done` steps: for a rollback."""
        if self._sinks is not None and self._make_sinks is not None:
            self._sinks.close()
            self._sinks = self._make_sinks(done)

    def state_dict(self) -> dict[str, Any]:
        """Speed and metrics, which a resume restores; JSON-able. Collective."""
        return {"speed": self.speed.state_dict(), "metrics": self._trainer.metrics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.speed.load_state_dict(state["speed"])
        self._trainer.metrics.load_state_dict(state["metrics"])

    def start(self, state: TrainState) -> None:
        """Start timing: the next step begins now, from `state`. Waits for the device."""
        self._trainer.fwd_bwd_time.take()  # discards the time of undone steps
        self._begin, self._last = time.perf_counter(), state

    @contextmanager
    def excluded_from_timing(self) -> Iterator[None]:
        """Excludes the block (evaluation, saving) from training time. First waits for the steps in progress."""
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def step_line(self, state: TrainState, batch: Batch, outcome: StepOutcome) -> None:
        """Report the steps since the last line; `batch`, `outcome`: the last step's. Collective; reads the device."""
        assert self._last is not None, "start() was called"
        collected = self._trainer.metrics.collect()
        now = time.perf_counter()
        seconds, steps = now - self._begin, state.step - self._last.step
        tokens = state.consumed_tokens - self._last.consumed_tokens
        speed = self.speed.add(tokens, seconds, steps)
        self._begin, self._last = now, state
        fwd_bwd_seconds = self._trainer.fwd_bwd_time.take() / steps
        if self._sinks is None:
            return
        norm, norm_fp32, skipped, loss_scale, next_lr = _read(outcome)
        world, remaining = self._mesh.world.size, self._config.data.total_steps - state.step
        per_step = self.speed.seconds_per_step
        record = StepRecord(
            time=datetime.now().astimezone(),
            step=state.step - 1,
            loss=collected.loss,
            tflops=tflops_per_gpu(self._flops_per_token, tokens, seconds, world),
            speed=speed,
            lr=next_lr,
            loss_scale=loss_scale,
            grad_norm={"0_default": norm, "1_fp32": norm_fp32},
            micro_num=batch.micro_num,
            num_consumed_tokens=state.consumed_tokens,
            inf_nan_skip_batches=int(skipped),
            num_samples_in_batch=batch.stats.num_samples,
            largest_length=batch.stats.largest_length,
            largest_batch=batch.stats.largest_batch,
            smallest_batch=batch.stats.smallest_batch,
            adam_beta2=outcome.beta2,
            fwd_bwd_time=fwd_bwd_seconds,
            acc=collected.accuracy,
            perplexity=perplexity(collected.cross_entropy),
            loss_from_metric=collected.cross_entropy,
            folders=collected.folders,
            mfu=mfu(self._model_flops_per_token, tokens, seconds, world, self._peak),
            eta_seconds=None if per_step is None else per_step * remaining,
            pack_fill=batch.stats.num_labels / batch.stats.num_tokens,
            memory_bytes=_peak_memory(self._mesh.device),
            origin=Origin.here(),
        )
        self._sinks.step(record)

    def validation(self, state: TrainState, collected: Collected) -> None:
        """Report an evaluation after `state.step` steps, with the figures of every validation folder."""
        if self._sinks is None:
            return
        found = ValidationRecord(
            step=state.step - 1,
            loss=collected.cross_entropy,
            acc=collected.accuracy,
            perplexity=perplexity(collected.cross_entropy),
            folders=collected.folders,
        )
        logger.info(
            f"evaluation after {found.step + 1} steps: loss={found.loss:.4f} perplexity={found.perplexity:.4f} "
            f"acc={found.acc:.4f} " + " ".join(f"loss/{name}={f.loss:.4f}" for name, f in found.folders.items())
        )
        folders = {name: [f.tokens, f.loss, f.acc] for name, f in found.folders.items()}
        self._sinks.event("evaluation", step=found.step, loss=found.loss, acc=found.acc, folders=folders)
        self._sinks.validation(found)

    def sample(self, steps_done: int, prompt: str, text: str) -> None:
        """Log the continuation `text` of a prompt and pass it to the sinks."""
        if self._sinks is not None:
            logger.info(f"sample after {steps_done} steps: {prompt!r} -> {text!r}")
            self._sinks.sample(Sample(steps_done, prompt, text))

    def event(self, kind: str, /, **facts: object) -> None:
        """Pass an event to all sinks of rank 0; events.jsonl stores it."""
        if self._sinks is not None:
            self._sinks.event(kind, **facts)

    def close(self) -> None:
        if self._sinks is not None:
            self._sinks.close()


def _read(outcome: StepOutcome) -> list[float]:
    """Norms, skipped steps, loss scale and learning rate, in one copy to the host. Waits for the device."""
    scalars = (
        outcome.norm_model_dtype,
        outcome.norm_fp32,
        outcome.skips.skipped_steps,
        outcome.loss_scale,
        outcome.next_lr,
    )
    values: list[float] = comm.read(torch.stack([scalar.double() for scalar in scalars]))
    return values


def _peak_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
