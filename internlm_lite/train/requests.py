"""What is asked of a run while it trains: to save, or to save and stop. All ranks obey after the same step.

    a signal to any rank            -> save and stop
    stop file, read by rank 0: N    -> save after step N and stop          -N -> save after step N and go on

The requests travel with the gradient norm's all-reduce and are read one step later: no collective of their own, and the
host waits for the step before at most, never for the one under way.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from internlm_lite.faults.signals import StopSignals

logger = logging.getLogger("internlm_lite")
_LARGEST = 10**12
"""Of a step in the stop file: it travels as a float."""


@dataclass(frozen=True)
class Order:
    """What all ranks do now."""

    save: bool = False
    stop: bool = False
    why: str = ""
    """Empty: nothing was asked."""
    spikes: tuple[float, float] = (0.0, 0.0)
    """Of the step before: z-scores of loss and gradient norm that stand out (`optim.spikes`)."""


class Requests:
    """`stop_file` is read on the main rank alone."""

    def __init__(self, signals: StopSignals, stop_file: Path | None, is_main: bool) -> None:
        self._signals = signals
        self._stop_file = stop_file if is_main else None
        self._told: _OnTheWay | None = None
        self._obeyed: float = 0
        self._problem = ""

    def now(self) -> tuple[float, float]:
        """(1 if this rank was signalled, the number in the stop file): to be summed over all ranks in this step."""
        return float(self._signals.received is not None), float(self._read())

    def forget(self) -> None:
        """What is on its way belongs to steps that are undone."""
        self._told = None

    def order(self, summed: torch.Tensor, spikes: torch.Tensor, steps_done: int) -> Order:
        """`summed` [2]: this step's sums, `spikes` [2] its scores, kept for the next call; obeyed are those of the step
        before.
        """
        told, self._told = self._told, _OnTheWay(torch.cat((summed, spikes)))
        if told is None:
            return Order()
        signalled, number, loss_z, norm_z = told.read()
        return replace(self._asked(signalled, number, steps_done), spikes=(loss_z, norm_z))

    def _asked(self, signalled: float, number: float, steps_done: int) -> Order:
        if signalled:
            return Order(save=True, stop=True, why=self._signals.received or "a signal to another rank")
        if number == 0:
            self._obeyed = 0
        elif number != self._obeyed and steps_done >= abs(number):
            self._obeyed = number
            self._reset()
            return Order(save=True, stop=number > 0, why=f"stop file with {number:.0f}")
        return Order()

    def _read(self) -> int:
        if self._stop_file is None:
            return 0
        try:
            text = self._stop_file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return 0
        except (OSError, UnicodeDecodeError) as error:
            self._ignore(str(error))
            return 0
        try:
            number = int(text or "0")
        except ValueError:
            number = _LARGEST + 1
        if abs(number) <= _LARGEST:
            return number
        self._ignore(f"found {text[:40]!r}, expected one integer")
        return 0

    def _ignore(self, problem: str) -> None:
        """Say each problem once."""
        if problem != self._problem:
            self._problem = problem
            logger.warning("ckpt.stop_file_path %s is not obeyed: %s", self._stop_file, problem)

    def _reset(self) -> None:
        if self._stop_file is None:
            return
        try:
            self._stop_file.write_text("0\n", encoding="utf-8")
        except OSError as error:
            logger.warning("ckpt.stop_file_path %s cannot be set back to 0: %s", self._stop_file, error)


class _OnTheWay:
    """A few numbers being copied to the host. Reading a device tensor later would also wait for all enqueued since."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = numbers

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._host.tolist()
        return values
