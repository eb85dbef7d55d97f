"""When a save that is due takes place: at once, or on a GPU beside the next forward and backward pass, which change
nothing that a checkpoint holds.

    host          step s | mark | enqueue both passes of step s + 1 | the save: waits for `mark` | enqueue the update
    main stream     step s ....... | forward and backward pass of step s + 1 .......... | wait for the copy | update
    save stream                    | skipped? sound? counters | copy to host memory ......... |

So the device always has work, and the step takes longer only if the copy takes longer than both passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from internlm_lite.config.schema import Config
from internlm_lite.errors import NumericsError
from internlm_lite.mesh.consensus import on_all
from internlm_lite.optim.step_decision import StepOutcome
from internlm_lite.optim.training_optimizer import TrainingOptimizer
from internlm_lite.train.build import Run
from internlm_lite.train.checkpoints import Moment
from internlm_lite.train.control import Control, Decision, bad_losses_error
from internlm_lite.train.train_state import TrainState


@dataclass(frozen=True)
class _Due:
    """A save of what was after a step; at the end of training perhaps without a save the checks alone."""

    moment: Moment
    outcome: StepOutcome
    decision: Decision
    mark: torch.cuda.Event | None
    """Behind the step; None on the CPU."""


class Saving:
    """Does the saves that `control` decides on. Methods are collective."""

    def __init__(self, run: Run, control: Control) -> None:
        self._run, self._control = run, control
        device = run.mesh.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._due: _Due | None = None

    def note(self, state: TrainState, outcome: StepOutcome) -> None:
        """Call after a step, if something is due by control's last decision: remember it for `do`."""
        mark = None
        if self._stream is not None:
            mark = torch.cuda.Event()
            mark.record()
        self._due = _Due(self._run.checkpoints.contents.moment(state), outcome, self._control.decision, mark)

    def can_wait(self) -> bool:
        """Whether what is due gains by waiting for `before_update` of the next step."""
        in_background = self._stream is not None and self._run.config.ckpt.async_upload
        return self._due is not None and in_background and not self._due.decision.final

    def before_update(self) -> None:
        """Call in every step between the backward pass and the update, which then waits for the copy of a save."""
        if self._due is not None:
            with self._run.watchdog.inside("saving"):
                self.do()
        self._run.checkpoints.manager.allow_changes()

    def do(self) -> None:
        """Do what is due, unless its update was skipped: the cause may be in the weights already, and saving them could
        rotate out a good snapshot.

        Raises NumericsError if the state is not sound, since it must not replace a good checkpoint, or if the forward
        pass was not finite; StorageError or CheckpointError for a final checkpoint."""
        due, self._due = self._due, None
        assert due is not None, "note() was called"
        decision, step = due.decision, due.moment.state.step - 1
        with self._beside(due.mark):
            if not decision.final and self._control.defer_if_skipped(due.outcome, decision):
                return
            on_all(self._run.mesh, partial(_require_sound_state, self._run.trainer.optimizer, step))
            if decision.bad_losses:
                raise bad_losses_error(decision.bad_losses, step)
            if decision.save:
                self._run.checkpoints.save(due.moment, decision.save, blocking=decision.final)

    def keep_if_best(self, state: TrainState, figures: Mapping[str, float]) -> None:
        """With ckpt.keep_best or evaluation.keep_best: call after an evaluation that changed nothing since `state`;
        saves what is better than all before. `figures`: name -> value. Raises NumericsError as `do`."""
        checkpoints, name = self._run.checkpoints, best_figure(self._run.config)
        if name is None or name not in figures or not state.step:
            return
        sign = -1 if self._run.more_is_better(name) else 1
        value, before = figures[name], checkpoints.best_value(name)
        if not sign * value < (math.inf if before is None else sign * before):  # nan is never better, nor beaten
            return
        with self._run.watchdog.inside("saving"):
            on_all(self._run.mesh, partial(_require_sound_state, self._run.trainer.optimizer, state.step - 1))
            moment = checkpoints.contents.moment(state)
            moment = replace(moment, valid_loss=figures.get("loss"), best=(name, value))
            checkpoints.save(moment, "best", blocking=False)

    @contextmanager
    def _beside(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Device reads and copies of the block wait for `mark`, not for what was enqueued after it."""
        if self._stream is None or mark is None:
            yield
            return
        self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield


def best_figure(config: Config) -> str | None:
    """The name of the figure by which the best checkpoint is kept; None: none is."""
    return config.evaluation.keep_best or ("loss" if config.ckpt.keep_best else None)


def _require_sound_state(optimizer: TrainingOptimizer, step: int) -> None:
    if problem := optimizer.problem():
        raise NumericsError(
            f"step {step}: {problem}, so nothing is saved: started again, the run goes on from its newest checkpoint; "
            "lower adam.lr, or go on from an older one with --resume PATH"
        )
