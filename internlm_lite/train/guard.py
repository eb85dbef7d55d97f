"""When steps go wrong: how many may be left out, what is told about a spike, and how often a run may go back.

Which steps are left out is decided on the device (optim/zero.py, optim/spikes.py); here it is read, a step later, and
obeyed by all ranks alike.
"""

from __future__ import annotations

import logging

from internlm_lite.config.schema import Config
from internlm_lite.errors import NumericsError
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.requests import Order, Skips

logger = logging.getLogger("internlm_lite")

_BAD_STEPS_FP16 = 50
"""In a row; a loss scale of 2^24 needs 24 halvings and the hysteresis to come down to 1."""
_BAD_STEPS = 10
"""In a row, of dtypes without a loss scale: nothing changes between two tries but the data."""


class Guard:
    """Counts what cannot go on for ever. The same on every rank."""

    def __init__(self, config: Config, reporter: Reporter, is_main: bool) -> None:
        """`is_main`: this rank tells."""
        self._config, self._reporter, self._is_main = config, reporter, is_main
        is_fp16 = config.model.torch_dtype_name == "float16"
        self._most_bad_steps = config.guard.max_bad_steps or (_BAD_STEPS_FP16 if is_fp16 else _BAD_STEPS)
        self._rollbacks: dict[int, int] = {}

    def check_skips(self, order: Order, step: int) -> None:
        """Raises NumericsError when too many steps up to `step` were left out since the last update."""
        skips = order.skips
        if self._at_floor(skips):
            found = f"gradients still overflow with the smallest loss scale, {skips.loss_scale:g}"
        elif skips.in_a_row > self._most_bad_steps:
            found = (
                f"the last {skips.in_a_row} updates were left out because a gradient was not finite or stood out, "
                f"expected at most {self._most_bad_steps} in a row with {self._config.model.dtype}"
            )
        else:
            return
        updated = step - skips.in_a_row
        last = f"the last update was that of step {updated}" if updated >= 0 else "no update was made yet"
        raise NumericsError(
            f"step {step}: {found}; {last}: lower adam.lr, look at the data of these steps, or go on from an older "
            "checkpoint with --resume PATH"
        )

    def _at_floor(self, skips: Skips) -> bool:
        scaler = self._config.grad_scaler
        if scaler is None or self._config.model.torch_dtype_name != "float16":
            return False
        at_floor = skips.loss_scale <= (scaler.fp16.min_scale or 0.0)
        return at_floor and skips.overflows_in_a_row > scaler.hysteresis

    def check_weights(self, optimizer: HybridZeroOptimizer, step: int) -> None:
        """Raises NumericsError where a last checkpoint would hold ruined weights. Collective; waits for the device."""
        if not optimizer.is_finite():
            raise NumericsError(
                f"step {step}: the weights are not finite, so they are not saved: started again, the run goes on from "
                "its newest checkpoint; lower adam.lr, or go on from an older one with --resume PATH"
            )

    def wants_rollback(self, order: Order) -> bool:
        return self._config.guard.spike == "rollback" and any(order.spikes)

    def note_spike(self, order: Order, step: int) -> None:
        """Tell if `step` stood out."""
        scores = order.spikes
        if not any(scores) or not self._is_main:
            return
        named = [f"{what} (z = {z:.0f})" for what, z in zip(("loss", "gradient norm"), scores, strict=True) if z]
        done = "noted" if self._config.guard.spike == "note" else "its update was left out"
        logger.warning(f"step {step}: a spike of {' and '.join(named)}: {done} (guard.spike)")
        self._reporter.event("spike", step=step, loss_z=scores[0] or None, norm_z=scores[1] or None, action=done)

    def allow_rollback(self, step: int, back_to: int) -> None:
        """Raises NumericsError when the run went back to that step too often."""
        count = self._rollbacks[back_to] = self._rollbacks.get(back_to, 0) + 1
        most = self._config.guard.max_rollbacks
        if count > most:
            raise NumericsError(
                f"step {step}: a spike again, after going back to step {back_to} as often as "
                f"guard.max_rollbacks={most} allows: lower adam.lr, or go on from an older checkpoint with "
                "--resume PATH"
            )
