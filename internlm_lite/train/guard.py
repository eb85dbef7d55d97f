"""When skipping steps no longer helps: a run whose gradients stay non-finite ends instead of burning hours."""

from __future__ import annotations

from internlm_lite.config.schema import ModelConfig
from internlm_lite.errors import NumericsError
from internlm_lite.train.state import TrainState

MAX_SKIPS_FP16 = 50
"""In a row; a loss scale of 2^24 needs 24 halvings and the hysteresis to come down to 1."""
MAX_SKIPS = 10
"""In a row, of dtypes without a loss scale: nothing changes between two tries but the data."""


def check_updates(skips: int, model: ModelConfig, state: TrainState) -> None:
    """`skips`: steps skipped in a row, the same on every rank. Raises NumericsError when they are too many."""
    limit = MAX_SKIPS_FP16 if model.torch_dtype_name == "float16" else MAX_SKIPS
    if skips > limit:
        raise NumericsError(
            f"step {state.step - 1}: the last {skips} updates were skipped because a gradient was not finite, expected "
            f"at most {limit} in a row with {model.dtype}; the weights are those of step {state.step - 1 - skips}: "
            "lower adam.lr, look at the data of these steps, or go on from an older checkpoint with --resume PATH"
        )
