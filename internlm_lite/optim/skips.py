"""Decides on the device whether a step is skipped, and counts skipped steps there: the host never waits.

    overflow    the gradient norm is not finite           the loss scale may shrink
    bad loss    the loss is not finite                    the gradient may still be finite
    outlier     loss or norm is a spike, and guard.spike is not "note"

A skipped step changes neither weights nor optimizer state, and the next step uses the same learning rate.
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
class SkipDecision:
    """Device tensors about one step."""

    skipped: torch.Tensor
    """bool scalar."""
    spikes: torch.Tensor
    """[2] fp64 z-scores; see `spikes.SpikeGuard.judge`."""


class SkipDecider:
    """Decides the same on every rank, without communication, because all ranks pass the same totals."""

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

    def decide(self, mean_loss: torch.Tensor, norm: torch.Tensor) -> SkipDecision:
        """Decide about one step, count it, and update the loss scale for the next. Arguments: device scalars of the
        global batch, the norm before clipping. Does not read the device."""
        overflow = ~norm.isfinite()
        spikes, rejected = self._spikes.judge(mean_loss, norm)
        skipped = overflow | rejected
        self.scaler.update(overflow)
        self.good_steps += ~skipped
        self.skipped_steps += skipped
        self.consecutive_skips.add_(1).mul_(skipped)
        self.consecutive_overflows.add_(1).mul_(overflow)
        return SkipDecision(skipped, spikes)

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
