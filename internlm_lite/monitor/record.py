"""The records of a run, and `Sink`, the interface of what receives them: log, files, terminal, charts.

Plain numbers, read from the device once per line. A folder without tokens in the interval has loss nan and acc 0.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origin:
    """The source code position that a line names."""

    file: str
    line: int
    function: str
    pid: int

    @staticmethod
    def here() -> Origin:
        """The line of the caller."""
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        assert caller is not None, "a function has a caller"
        code = caller.f_code
        return Origin(Path(code.co_filename).name, caller.f_lineno, code.co_name, os.getpid())


@dataclass(frozen=True)
class FolderFigures:
    """Figures of one data folder over the steps of the line."""

    tokens: int
    """Labels trained on, over all data-parallel ranks."""
    loss: float
    """Mean cross-entropy over them, without label smoothing; nan without tokens."""
    acc: float
    """Fraction of the labels predicted correctly; 0 without tokens."""
    seen: int | None = None
    """All tokens of the folder, including those without a label, such as prompts; None: unknown."""
    bits_per_byte: float | None = None
    """Of an evaluation: cross-entropy in bits over the UTF-8 bytes of the text; None: unknown."""


@dataclass(frozen=True)
class SpeedFigures:
    """Tokens per GPU and second over different spans, rounded to 2 digits as printed (see speed.py)."""

    tgs: float
    last_tgs_1: float
    tgs_all: float
    tgs_avg: float
    tgs_sma: float
    last_tgs_10: float
    last_tgs_50: float


@dataclass(frozen=True)
class PassFigures:
    """The columns of the annotated transformer, of a run on pairs: see `PassStep`."""

    epoch: int
    epoch_step: int
    accumulation_step: int
    tokens_per_second: float
    """Target tokens with a label, over all ranks."""


@dataclass(frozen=True)
class StepRecord:
    """One step line. Times in seconds, memory in bytes."""

    time: datetime
    """When the line was made, with time zone."""
    step: int
    """Index of the step, from 0."""
    loss: float
    """Training loss, with label smoothing."""
    tflops: float
    """TFLOP/s per GPU, by InternLM's formula (flops.py)."""
    speed: SpeedFigures
    lr: float
    """Learning rate of the next step, as InternLM prints it."""
    loss_scale: float
    grad_norm: Mapping[str, float]
    """'0_default': parameters in the model's dtype, '1_fp32': those kept in fp32; unscaled, before clipping."""
    micro_num: int
    num_consumed_tokens: int
    """All tokens since step 0, over all data-parallel ranks."""
    inf_nan_skip_batches: int
    """Steps skipped since the start because of overflow."""
    num_samples_in_batch: int
    """Attention spans (segments) in the batch of rank 0."""
    largest_length: int
    """Tokens of the longest segment in the batch of rank 0."""
    largest_batch: int
    """Most segments in one micro-batch."""
    smallest_batch: int
    """Fewest segments in one micro-batch."""
    adam_beta2: float
    fwd_bwd_time: float
    acc: float
    """Fraction of labels predicted correctly."""
    perplexity: float
    """exp(loss_from_metric)."""
    loss_from_metric: float
    """Mean cross-entropy over the labels of the batch, without label smoothing."""
    folders: Mapping[str, FolderFigures] = field(default_factory=dict)
    """Figures per data folder, in the run's order."""
    mfu: float | None = None
    """Fraction of the device's peak FLOP/s reached; None: the peak is unknown."""
    eta_seconds: float | None = None
    """Estimated time to the last step."""
    pack_fill: float | None = None
    """Fraction of the batch's tokens that have a label."""
    stage: int | None = None
    """Number of the stage of the data; None: the run has one alone."""
    in_pass: PassFigures | None = None
    """None: the data are no pairs, or have no passes in common."""
    memory_bytes: int | None = None
    """Peak memory of rank 0's device since the last line."""
    origin: Origin = field(default_factory=lambda: Origin("train.py", 0, "main", os.getpid()))
    """The code position that the text line names."""


@dataclass(frozen=True)
class ValidationRecord:
    """One evaluation. `step` is the index of the last step before it; -1: none."""

    step: int
    loss: float
    """Mean cross-entropy over all validation folders."""
    acc: float
    perplexity: float
    folders: Mapping[str, FolderFigures]
    train_loss: float | None = None
    """Mean cross-entropy over batches of training data; None: not measured."""
    bits_per_byte: float | None = None
    """Cross-entropy in bits over the bytes of all folders' text; None: of a folder they are not recorded."""
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task -> metric -> value, of the tasks that were evaluated with it."""
    ema: Mapping[str, float] | None = None
    """"loss", "acc", "perplexity" and, if known, "bits_per_byte" of the averaged weights on the same batches; None: not
    measured."""

    def __str__(self) -> str:
        """The line of the log."""
        on_train = "" if self.train_loss is None else f" train_loss={self.train_loss:.4f}"
        bits = "" if self.bits_per_byte is None else f" bits_per_byte={self.bits_per_byte:.4f}"
        on_train += "" if self.ema is None else f" ema_loss={self.ema['loss']:.4f}"
        folders = "".join(f" loss/{name}={figures.loss:.4f}" for name, figures in self.folders.items())
        return (
            f"evaluation after {self.step + 1} steps: loss={self.loss:.4f} perplexity={self.perplexity:.4f} "
            f"acc={self.acc:.4f}{bits}{on_train}{folders}{task_words(self.tasks)}"
        )


def task_words(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of tasks in a line of the log."""
    return "".join(f" {name}/{metric}={value:.4f}" for name, of in tasks.items() for metric, value in of.items())


@dataclass(frozen=True)
class Sample:
    """How the model continued a prompt after `step` steps."""

    step: int
    prompt: str
    text: str


class Sink:
    """Receives the records of a run. A subclass overrides the methods for the records it needs."""

    def step(self, record: StepRecord) -> None:
        """A step line."""

    def validation(self, record: ValidationRecord) -> None:
        """An evaluation."""

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """An event of events.jsonl: a checkpoint, an alert, the end."""

    def sample(self, sample: Sample) -> None:
        """A text that the model generated."""

    def close(self) -> None:
        """Flush buffers and release resources. No method is called afterwards."""
