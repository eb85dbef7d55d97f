"""Whether a step is skipped, decided on the device, and the counts of what was skipped: the host never waits.

    overflow    the gradient norm is not finite           the loss scale may shrink
    bad loss    the loss is not finite                    its gradient may be finite all the same
    outlier     loss or norm is a spike, and guard.spike is not "note"

A skipped step changes no weight and no optimizer state, and its learning rate is used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.config.schema import Config
from internlm_lite.optim.scaler import LossScaler
from internlm_lite.optim.spikes import SpikeGuard


@dataclass(frozen=True)
class Decision:
    """About one step."""

    skipped: torch.Tensor
    """bool scalar."""
    spikes: torch.Tensor
    """[2], see `spikes.SpikeGuard.judge`."""


class SkipDecider:
    """Every rank decides the same, because it is given the same totals."""

    def __init__(self, config: Config, model_dtype: torch.dtype, device: torch.device) -> None:
        self.scaler = LossScaler(config.grad_scaler if model_dtype == torch.float16 else None, device)
        self._spikes = SpikeGuard(config.guard, device)
        counters = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]
        self.good_steps, self.skipped_steps, self.consecutive_skips, self.consecutive_overflows = counters
        self._counters = {  # by their names in checkpoints
            "good_steps": self.good_steps,
            "skipped_steps": self.skipped_steps,
            "skips_in_a_row": self.consecutive_skips,
            "overflows_in_a_row": self.consecutive_overflows,
        }

    def decide(self, mean_loss: torch.Tensor, norm: torch.Tensor) -> Decision:
        """Decide about a step and count it; the loss scale becomes that of the next step. Both arguments: scalars of
        the whole global batch, the norm before clipping.
        """
        overflow = ~norm.isfinite()
        spikes, is_outlier = self._spikes.judge(mean_loss, norm)
        skipped = overflow | is_outlier
        self.scaler.update(overflow)
        self.good_steps += ~skipped
        self.skipped_steps += skipped
        self.consecutive_skips.add_(1).mul_(skipped)
        self.consecutive_overflows.add_(1).mul_(overflow)
        return Decision(skipped, spikes)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; reads the device."""
        counts = {name: int(counter.item()) for name, counter in self._counters.items()}
        return {**counts, "scaler": self.scaler.state_dict(), "spikes": self._spikes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        older = {"skips_in_a_row": 0, "overflows_in_a_row": 0}  # older checkpoints do not have them
        for name, counter in self._counters.items():
            counter.fill_({**older, **state}[name])
        self.scaler.load_state_dict(state["scaler"])
        self._spikes.load_state_dict(state["spikes"])
