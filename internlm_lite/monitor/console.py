"""Console output: step lines, a progress bar on a terminal, and a heartbeat line in long phases.

    terminal:      11:46:20  step 1  loss 11.3380  tgs 965  ...          off it: the full step line
                   step 2/50000 ------------ 0% eta 1:02:05 loss 11.34 tgs 965 mfu 38% next checkpoint 50

The rank's log file always gets the full step line.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from internlm_lite.monitor.line import clock, format_step_line
from internlm_lite.monitor.record import Sink, StepRecord
from internlm_lite.units import human_bytes

logger = logging.getLogger("internlm_lite")

HEARTBEAT_SECONDS = 15.0
_BOLD, _DIM, _GREEN, _RED, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[0m"
_BAR_TEXT = "eta {task.fields[eta]}  loss {task.fields[loss]}  tgs {task.fields[tgs]}{task.fields[rest]}"


class Console(Sink):
    """The console sink of rank 0. `close` removes the bar from the terminal."""

    def __init__(self, total_steps: int, *, terminal: bool, save_every: Sequence[int] = (), done: int = 0) -> None:
        """`terminal`: show colours and the bar. `save_every`: checkpoint intervals in steps."""
        self._total_steps = total_steps
        self._save_every = save_every
        self._terminal = terminal
        self._bar: Progress | None = None
        if terminal:
            columns = (TextColumn("{task.completed} of {task.total} steps"), BarColumn(), TaskProgressColumn())
            self._bar = Progress(*columns, TextColumn(_BAR_TEXT), refresh_per_second=2)
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=done, eta="?", loss="?", tgs="?", rest=""
            )
            self._bar.start()

    def step(self, record: StepRecord) -> None:
        """Show one step line, and move the bar."""
        columns = shutil.get_terminal_size().columns if self._terminal else None
        extra = {"verbatim": True, "compact": compact_line(record, colour=self._terminal, width=columns)}
        logger.info(format_step_line(record), extra=extra)
        if self._bar is None:
            return
        done = record.step + 1
        rest = "" if record.mfu is None else f"  mfu {record.mfu:.1%}"
        if self._save_every and done < self._total_steps:
            rest += f"  next checkpoint {next_checkpoint(done, self._save_every, self._total_steps)}"
        self._bar.update(
            self._task,
            completed=done,
            eta="?" if record.eta_seconds is None else clock(record.eta_seconds),
            loss=f"{record.loss:.4f}",
            tgs=f"{record.speed.tgs:.0f}",
            rest=rest,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def next_checkpoint(done: int, every: Sequence[int], total: int) -> int:
    """The number of steps after which the next checkpoint is due: a multiple of one of `every`, or `total`."""
    return min(total, *((done // steps + 1) * steps for steps in every))


def compact_line(record: StepRecord, *, colour: bool, width: int | None = None) -> str:
    """One short line for a terminal: time, step, loss, other numbers, and the loss of each folder with tokens.

    Columns beyond `width` are dropped; None: no limit.
    """
    parts = [
        (_DIM, record.time.strftime("%H:%M:%S")),
        (_BOLD, f"step {record.step}"),
        (_GREEN if record.loss == record.loss else _RED, f"loss {record.loss:.4f}"),
    ]
    if record.inf_nan_skip_batches:
        parts.append((_RED, f"skipped {record.inf_nan_skip_batches}"))
    parts += [
        ("", f"lr {record.lr:.3g}"),
        ("", f"grad {sum(norm**2 for norm in record.grad_norm.values()) ** 0.5:.3g}"),
        ("", f"tgs {record.speed.tgs:.0f}"),
        ("", f"tflops {record.tflops:.3g}" if record.mfu is None else f"mfu {record.mfu:.1%}"),
    ]
    if record.memory_bytes is not None:
        parts.append(("", human_bytes(record.memory_bytes)))
    if len(record.folders) > 1:
        parts += [(_DIM, f"{name} {folder.loss:.3f}") for name, folder in record.folders.items() if folder.tokens]
    ends = accumulate(len(text) + 2 for _, text in parts)
    fitting = [part for part, end in zip(parts, ends, strict=True) if width is None or end - 2 <= width]
    return "  ".join(f"{code}{text}{_RESET}" if colour and code else text for code, text in fitting)


@contextmanager
def heartbeat(what: str, every_seconds: float = HEARTBEAT_SECONDS) -> Iterator[None]:
    """While the body runs, log a line every `every_seconds`."""
    ended = threading.Event()
    start = time.monotonic()

    def beat() -> None:
        while not ended.wait(every_seconds):
            logger.info("%s: still at it after %s", what, clock(time.monotonic() - start))

    thread = threading.Thread(target=beat, name=f"heartbeat {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
