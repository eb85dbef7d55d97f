"""When steps go wrong: how many may be left out, what is told about a spike, and how often a run may go back.

Which steps are left out is decided on the device (optim/zero.py, optim/spikes.py); here it is read, a step later or at
the next step line, and obeyed by all ranks alike.
"""

from __future__ import annotations

import logging

from internlm_lite.config.schema import Config
from internlm_lite.errors import NumericsError
from internlm_lite.train.reporter import Reporter, Skips
from internlm_lite.train.requests import Order
from internlm_lite.train.state import TrainState

logger = logging.getLogger("internlm_lite")

_BAD_STEPS_FP16 = 50
"""In a row; a loss scale of 2^24 needs 24 halvings and the hysteresis to come down to 1."""
_BAD_STEPS = 10
"""In a row, of dtypes without a loss scale: nothing changes between two tries but the data."""


class Guard:
    """Counts what cannot go on for ever. The same on every rank."""

    def __init__(self, config: Config, reporter: Reporter) -> None:
        self._config, self._reporter = config, reporter
        is_fp16 = config.model.torch_dtype_name == "float16"
        self._most_bad_steps = config.guard.max_bad_steps or (_BAD_STEPS_FP16 if is_fp16 else _BAD_STEPS)
        self._rollbacks: dict[int, int] = {}

    def check_skips(self, skips: Skips, state: TrainState) -> None:
        """Raises NumericsError when too many steps were left out since the last update."""
        in_a_row, loss_scale = skips.in_a_row, skips.loss_scale
        if self._at_floor(in_a_row, loss_scale):
            found = f"gradients still overflow with the smallest loss scale, {loss_scale:g}"
        elif in_a_row > self._most_bad_steps:
            found = (
                f"the last {in_a_row} updates were left out because a gradient was not finite or stood out, expected "
                f"at most {self._most_bad_steps} in a row with {self._config.model.dtype}"
            )
        else:
            return
        raise NumericsError(
            f"step {state.step - 1}: {found}; the weights are those of step {state.step - 1 - in_a_row}: lower "
            "adam.lr, look at the data of these steps, or go on from an older checkpoint with --resume PATH"
        )

    def _at_floor(self, in_a_row: int, loss_scale: float) -> bool:
        scaler = self._config.grad_scaler
        if scaler is None or self._config.model.torch_dtype_name != "float16":
            return False
        return loss_scale <= (scaler.fp16.min_scale or 0.0) and in_a_row > scaler.hysteresis

    def wants_rollback(self, order: Order) -> bool:
        return self._config.guard.spike == "rollback" and any(order.spikes)

    def note_spike(self, step: int, order: Order) -> None:
        """Tell of a step that stood out, if one did."""
        scores = order.spikes
        if not any(scores):
            return
        named = [f"{what} (z = {z:.0f})" for what, z in zip(("loss", "gradient norm"), scores, strict=True) if z]
        done = {"note": "noted", "skip": "its update was left out", "rollback": "rolling back"}[
            self._config.guard.spike
        ]
        logger.warning(f"step {step}: a spike of {' and '.join(named)}: {done} (guard.spike)")
        self._reporter.event("spike", step=step, loss_z=scores[0] or None, norm_z=scores[1] or None, action=done)

    def allow_rollback(self, step: int, back_to: int) -> None:
        """Raises NumericsError when the run went back to that step too often."""
        count = self._rollbacks[back_to] = self._rollbacks.get(back_to, 0) + 1
        most = self._config.guard.max_rollbacks
        if count > most:
            raise NumericsError(
                f"step {step}: a spike for the {count}th time after going back to step {back_to}, expected at most "
                f"{most} (guard.max_rollbacks): lower adam.lr, or go on from an older checkpoint with --resume PATH"
            )
