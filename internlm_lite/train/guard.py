"""When skipping steps no longer helps: a run whose gradients stay non-finite ends instead of burning hours."""

from __future__ import annotations

from internlm_lite.errors import NumericsError
from internlm_lite.optim.zero import StepOutcome
from internlm_lite.train.state import TrainState

MAX_SKIPS_FP16 = 50
"""In a row; a loss scale of 2^24 needs 24 halvings and the hysteresis to come down to 1."""
MAX_SKIPS = 10
"""In a row, of dtypes without a loss scale: nothing changes between two tries but the data."""


def check_updates(outcome: StepOutcome, dtype: str, state: TrainState) -> None:
    """Reads the device. Raises NumericsError, the same on every rank, after too many skipped steps in a row."""
    limit = MAX_SKIPS_FP16 if dtype in ("torch.float16", "torch.half") else MAX_SKIPS
    skips = int(outcome.skips_in_a_row.item())
    if skips > limit:
        raise NumericsError(
            f"step {state.step - 1}: the last {skips} updates were skipped because a gradient was not finite, expected "
            f"at most {limit} in a row with {dtype}; the weights are those of step {state.step - 1 - skips}: lower "
            "adam.lr, look at the data of these steps, or go on from an older checkpoint with --resume PATH"
        )
