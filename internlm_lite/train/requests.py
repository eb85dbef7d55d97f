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
from internlm_lite.optim.zero import StepOutcome

logger = logging.getLogger("internlm_lite")
_LARGEST = 10**12
"""Of a step in the stop file: it travels as a float."""


@dataclass(frozen=True)
class Skips:
    """Updates that were left out, up to one step."""

    in_a_row: int = 0
    """Since the last update."""
    overflows_in_a_row: int = 0
    """Of them, those at the end whose gradient was not finite."""
    loss_scale: float = 1.0


@dataclass(frozen=True)
class Order:
    """What all ranks do now, and what they know of the step before the one just done."""

    save: bool = False
    stop: bool = False
    why: str = ""
    """Empty: nothing was asked."""
    spikes: tuple[float, float] = (0.0, 0.0)
    """z-scores of loss and gradient norm that stand out (`optim.spikes`)."""
    skips: Skips = Skips()


class Requests:
    """`stop_file` is read on the main rank alone."""

    def __init__(self, signals: StopSignals, stop_file: Path | None, is_main: bool) -> None:
        self._signals = signals
        self._stop_file = stop_file if is_main else None
        self._told: _OnTheWay | None = None
        self._put_off = Order()
        self._obeyed: float = 0
        self._problem = ""

    def now(self) -> tuple[float, float]:
        """(1 if this rank was signalled, the number in the stop file): to be summed over all ranks in this step."""
        return float(self._signals.received is not None), float(self._read())

    def order(self, outcome: StepOutcome, steps_done: int) -> Order:
        """`outcome`: this step's, kept for the next call; obeyed is what was asked in the step before."""
        told, self._told = self._told, _OnTheWay(outcome)
        return self._read_order(told, steps_done)

    def rest(self) -> Order:
        """What the last step told, when no other follows. Nobody is left to obey."""
        told, self._told = self._told, None
        return self._read_order(told, steps_done=0)

    def undo(self, order: Order) -> None:
        """What is on its way belongs to steps that are undone; what `order` asks for is obeyed after the next one: also
        a stop file, whose step was reached before.
        """
        self._told, self._put_off = None, order

    def _read_order(self, told: _OnTheWay | None, steps_done: int) -> Order:
        if told is None:
            put_off, self._put_off = self._put_off, Order()
            return Order(put_off.save, put_off.stop, put_off.why)
        signalled, number, loss_z, norm_z, in_a_row, overflows, loss_scale = told.read()
        skips = Skips(int(in_a_row), int(overflows), loss_scale)
        return replace(self._asked(signalled, number, steps_done), spikes=(loss_z, norm_z), skips=skips)

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

    def __init__(self, outcome: StepOutcome) -> None:
        scalars = (outcome.skips_in_a_row, outcome.overflows_in_a_row, outcome.loss_scale)
        numbers = torch.cat((outcome.requests, outcome.spikes, torch.stack([scalar.double() for scalar in scalars])))
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
