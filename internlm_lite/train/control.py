"""Decides what all ranks do after a step: continue, save, stop, or roll back.

    a signal to any rank            -> save and stop
    stop file, read by rank 0: N    -> save after step N and stop          -N -> save after step N and continue
    spike of the loss or the norm   -> report it; with guard.spike=rollback also roll back
    too many updates were skipped   -> NumericsError, DataError
    the end, after a bad forward    -> NumericsError: nothing is saved

Requests are summed in the gradient norm's all-reduce, and updates are skipped on the device (optim/zero.py,
optim/spikes.py). The host reads both one step later: no extra collective, and no wait for the current step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from internlm_lite.checkpoint.format.manifest import Kind
from internlm_lite.config.schema import CkptConfig, Config
from internlm_lite.errors import DataError, NumericsError
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh import comm
from internlm_lite.optim.grad_norm import Requests
from internlm_lite.optim.step_decision import StepOutcome
from internlm_lite.train.reporter import Reporter

logger = logging.getLogger("internlm_lite")

_LAG_STEPS = 1
"""Steps after which the host reads the results of a step."""
_MAX_BAD_STEPS_FP16 = 50
"""More than a loss scale needs to fall from 2^24 to 1: 24 halvings and the hysteresis."""
_MAX_BAD_STEPS = 10
"""Where the loss scale plays no part: between two skipped steps only the data changes."""
_LARGEST_STEP = 10**12
"""Largest number in the stop file; it is exact as the float that ranks exchange."""


@dataclass(frozen=True)
class Command:
    """A request of the user or the launcher to the whole job."""

    save: bool = False
    stop: bool = False
    source: str = ""
    """Where the request came from; empty: no request."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step."""

    save: Kind | None = None
    """Kind of the checkpoint to write now."""
    final: bool = False
    """No step follows: all steps are done, or a stop was requested."""
    stopped_by: str = ""
    """Source of the request to stop before all steps are done; empty: none."""
    rollback_before: int | None = None
    """The step with a spike; the checkpoint to restore is from before it."""
    bad_losses: int = 0
    """If no step follows: the most recent consecutive steps whose loss was not finite."""

    @property
    def stop(self) -> bool:
        return bool(self.stopped_by)


@dataclass(frozen=True)
class StepSignals:
    """The results of a step that control needs on the host; the same on every rank."""

    signalled: float = 0.0
    """Number of ranks that received a signal."""
    stop_file: float = 0.0
    """The number in the stop file."""
    loss_z: float = 0.0
    """z-score of the loss if it is a spike (`optim.spikes`), else 0."""
    norm_z: float = 0.0
    """z-score of the gradient norm if it is a spike, else 0."""
    consecutive_skips: float = 0.0
    """Steps skipped since the last update."""
    consecutive_overflows: float = 0.0
    """The most recent consecutive steps with a finite loss whose gradient norm was not finite."""
    consecutive_bad_losses: float = 0.0
    """The most recent consecutive steps whose loss was not finite."""
    consecutive_unlabelled: float = 0.0
    """The most recent consecutive steps without a label."""
    loss_scale: float = 1.0

    @staticmethod
    def pack(outcome: StepOutcome) -> torch.Tensor:
        """The fields, in order, as one 1-D fp64 device tensor."""
        scalars = {
            "signalled": outcome.signalled,
            "stop_file": outcome.stop_file,
            "loss_z": outcome.spikes[0],
            "norm_z": outcome.spikes[1],
            **vars(outcome.skips),
            "loss_scale": outcome.loss_scale,
        }
        return torch.stack([scalars[field.name].double() for field in fields(StepSignals)])


class StopFile:
    """`ckpt.stop_file_path`: holds one integer. Without a path `read` returns 0. A problem is logged once."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._problem = ""

    def read(self) -> int:
        if self._path is None:
            return 0
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace").strip()
            number = int(text or "0")
        except FileNotFoundError:
            return 0
        except OSError as error:
            return self._ignore(str(error))
        except ValueError:
            number = _LARGEST_STEP + 1
        return number if abs(number) <= _LARGEST_STEP else self._ignore(f"found {text[:40]!r}, expected one integer")

    def _ignore(self, problem: str) -> int:
        if problem != self._problem:
            self._problem = problem
            logger.warning("ckpt.stop_file_path %s is not obeyed: %s", self._path, problem)
        return 0

    def reset(self) -> None:
        if self._path is None:
            return
        try:
            self._path.write_text("0\n", encoding="utf-8")
        except OSError as error:
            logger.warning("ckpt.stop_file_path %s cannot be set back to 0: %s", self._path, error)


class ControlChannel:
    """Passes requests of single ranks to all ranks, and results of a step from the device to the host."""

    def __init__(self, signals: StopSignals, stop_file: Path | None) -> None:
        self._signals, self._stop_file = signals, StopFile(stop_file)
        self._obeyed = 0.0
        self._in_flight: comm.Pending | None = None

    def requests(self) -> Requests:
        """This rank's requests now, to be summed over all ranks in the current step."""
        return Requests(float(self._signals.received is not None), float(self._stop_file.read()))

    def exchange(self, outcome: StepOutcome | None) -> StepSignals | None:
        """Start copying a step's results to the host (None: no step follows); wait for and return the previous ones."""
        sent = None if outcome is None else comm.read_later(StepSignals.pack(outcome))
        before, self._in_flight = self._in_flight, sent
        return None if before is None else StepSignals(*before.value())

    def command(self, signals: StepSignals, steps_done: int) -> Command:
        """The request to follow after `steps_done` steps. A number in the stop file is followed once and reset to 0."""
        if signals.signalled:
            return Command(save=True, stop=True, source=self._signals.received or "a signal to another rank")
        number = signals.stop_file
        if number == 0:
            self._obeyed = 0
        elif number != self._obeyed and steps_done >= abs(number):
            self._obeyed = number
            self._stop_file.reset()
            return Command(save=True, stop=number > 0, source=f"stop file with {number:.0f}")
        return Command()


class Control:
    """Decides after every step; the same on every rank."""

    def __init__(self, config: Config, reporter: Reporter, signals: StopSignals, *, is_main: bool) -> None:
        """`is_main`: this rank reads the stop file and writes reports."""
        self._config, self._reporter, self._is_main = config, reporter, is_main
        path = config.ckpt.stop_file_path
        self._channel = ControlChannel(signals, Path(path) if path and is_main else None)
        self.requests = self._channel.requests
        self.decision = Decision()
        """The last decision."""
        self._command = Command()
        self._requeued = Command()
        self._deferred: Kind | None = None
        is_fp16 = config.model.torch_dtype_name == "float16"
        self._scaler = config.grad_scaler if is_fp16 else None
        self._max_bad_steps = config.guard.max_bad_steps or _MAX_BAD_STEPS
        self._max_skips = config.guard.max_bad_steps or (_MAX_BAD_STEPS_FP16 if is_fp16 else _MAX_BAD_STEPS)
        self._rollbacks: dict[int, int] = {}

    def after_step(self, outcome: StepOutcome, steps_done: int) -> Decision:
        """Sets and returns `decision`. Waits for the previous step, and for this one if it is the last. Raises
        NumericsError or DataError when too many consecutive updates were skipped (`check_skips`)."""
        arrived, known_step = self._channel.exchange(outcome), steps_done - 1 - _LAG_STEPS
        self._reporter.write_lines()
        spiked = False
        if arrived is None:
            self._command, self._requeued = self._requeued, Command()
        else:
            self._command = self._channel.command(arrived, steps_done)
            spiked = self._report_spike(arrived, known_step)
            self.check_skips(arrived, known_step)
        all_done = steps_done == self._config.data.total_steps
        final = all_done or self._command.stop
        kind = due_kind(self._config.ckpt, steps_done, self._command, all_done=all_done, deferred=self._deferred)
        self._deferred = None
        self.decision = Decision(
            save=kind,
            final=final,
            stopped_by=self._command.source if self._command.stop and not all_done else "",
            rollback_before=known_step if spiked and self._config.guard.spike == "rollback" else None,
            bad_losses=comm.read(outcome.skips.consecutive_bad_losses) if final else 0,
        )
        return self.decision

    def defer_if_skipped(self, outcome: StepOutcome, decision: Decision) -> bool:
        """Whether this step's update was skipped; then the save of `decision` is due after the next step, too."""
        skipped = comm.read(outcome.skips.consecutive_skips) > 0
        if skipped:
            self._deferred = decision.save
        return bool(skipped)

    def rolled_back(self, back_to: int) -> None:
        """Call after restoring step `back_to`: drops results of undone steps, and defers a pending request to the next
        step. Raises NumericsError after more than guard.max_rollbacks rollbacks to the same step."""
        count = self._rollbacks[back_to] = self._rollbacks.get(back_to, 0) + 1
        most = self._config.guard.max_rollbacks
        if count > most:
            raise NumericsError(
                f"step {self.decision.rollback_before}: a spike again, after going back to step {back_to} as often as "
                f"guard.max_rollbacks={most} allows: lower adam.lr, or go on from an older checkpoint with "
                "--resume PATH"
            )
        self._channel.exchange(None)
        self._requeued, self._deferred, self.decision = self._command, None, Decision()

    def finish(self, steps_done: int) -> None:
        """Report the spikes of the last step. Call it after the loop."""
        if last := self._channel.exchange(None):
            self._report_spike(last, steps_done - 1)

    def _report_spike(self, signals: StepSignals, step: int) -> bool:
        """Report a spike in `step`, if there is one; returns whether."""
        scores = {"loss": signals.loss_z, "gradient norm": signals.norm_z}
        named = [f"{what} (z = {z:.0f})" for what, z in scores.items() if z]
        if named and self._is_main:
            action = "noted" if self._config.guard.spike == "note" else "its update was left out"
            logger.warning(f"step {step}: a spike of {' and '.join(named)}: {action} (guard.spike)")
            z_scores = {"loss_z": signals.loss_z or None, "norm_z": signals.norm_z or None}
            self._reporter.event("spike", step=step, **z_scores, action=action)
        return bool(named)

    def check_skips(self, signals: StepSignals, step: int) -> None:
        """Raises NumericsError when too many consecutive updates up to that of `step` were skipped, DataError if they
        had no label."""
        skips = int(signals.consecutive_skips)
        if signals.consecutive_unlabelled > self._max_bad_steps:
            raise DataError(
                f"step {step}: no token of the last {signals.consecutive_unlabelled:.0f} batches has a label, so they "
                "teach nothing: look at how their folders were tokenised (a token with a negative id has no label)"
            )
        if signals.consecutive_bad_losses > self._max_bad_steps:
            raise bad_losses_error(int(signals.consecutive_bad_losses), step)
        if self._is_at_floor(signals):
            found = f"gradients still overflow with the smallest loss scale, {signals.loss_scale:g}"
        elif skips > self._max_skips:
            found = (
                f"the last {skips} updates were left out because a gradient was not finite or stood out, "
                f"expected at most {self._max_skips} in a row with {self._config.model.dtype}"
            )
        else:
            return
        updated = step - skips
        last = f"the last update was that of step {updated}" if updated >= 0 else "no update was made yet"
        raise NumericsError(
            f"step {step}: {found}; {last}: lower adam.lr, look at the data of these steps, or go on from an older "
            "checkpoint with --resume PATH"
        )

    def _is_at_floor(self, signals: StepSignals) -> bool:
        if self._scaler is None or signals.loss_scale > (self._scaler.fp16.min_scale or 0.0):
            return False
        return signals.consecutive_overflows > self._scaler.hysteresis


def bad_losses_error(count: int, step: int) -> NumericsError:
    """The error for `count` consecutive steps up to `step` whose forward pass was not finite."""
    return NumericsError(
        f"step {step}: the loss is not finite since step {step - count + 1}; the loss scale has no part in that: the "
        "weights may be ruined and are not saved; started again, the run goes on from its newest checkpoint; lower "
        "adam.lr, look at the data of these steps, or go on from an older checkpoint with --resume PATH"
    )


def due_kind(
    ckpt: CkptConfig, steps_done: int, command: Command, *, all_done: bool, deferred: Kind | None = None
) -> Kind | None:
    """Kind of the checkpoint due after `steps_done` steps; if several are due, the one that is kept longest."""
    if not ckpt.enable_save_ckpt or steps_done == 0:
        return None
    if all_done:
        return "final"
    asked = command.save and not command.stop
    if asked or deferred == "milestone" or _divides(ckpt.checkpoint_steps, steps_done):
        return "milestone"
    if command.stop:
        return "rescue"
    return "snapshot" if deferred or _divides(ckpt.oss_snapshot_freq, steps_done) else None


def _divides(every: int | None, steps_done: int) -> bool:
    return bool(every and steps_done % every == 0)
