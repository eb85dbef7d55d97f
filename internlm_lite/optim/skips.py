"""Decides on the device whether a step is skipped, and counts skipped steps there: the host never waits.

    bad loss    the loss is not finite: the forward pass itself, which the loss scale has no part in
    unlabelled  no token of the global batch has a label
    overflow    neither, and the gradient norm is not finite: the loss scale may shrink
    outlier     loss or norm is a spike, and guard.spike is not "note"

A skipped step changes neither weights nor optimizer state, and the next step uses the same learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.config.schema import Config
from internlm_lite.mesh import comm
from internlm_lite.optim.scaler import LossScaler
from internlm_lite.optim.spikes import SpikeGuard


@dataclass(frozen=True)
class SkipCounts:
    """Counters after one step: int64 device scalars."""

    skipped_steps: torch.Tensor
    """Since the run began."""
    consecutive_skips: torch.Tensor
    """Steps skipped since the last update."""
    consecutive_overflows: torch.Tensor
    """The most recent consecutive steps with a finite loss whose gradient norm was not finite."""
    consecutive_bad_losses: torch.Tensor
    """The most recent consecutive steps whose loss was not finite."""
    consecutive_unlabelled: torch.Tensor
    """The most recent consecutive steps without a label."""


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
        # By their names in checkpoints. Those "in_a_row" count the most recent consecutive steps of a kind.
        names = ("good_steps", "skipped_steps", "skips_in_a_row", "overflows_in_a_row", "bad_losses_in_a_row",
                 "unlabelled_in_a_row")  # fmt: skip
        self._counters = {name: torch.zeros((), dtype=torch.int64, device=device) for name in names}
        self.good_steps = self._counters["good_steps"]

    def decide(self, mean_loss: torch.Tensor, norm: torch.Tensor, num_labels: torch.Tensor) -> SkipDecision:
        """Decide about one step, count it, and update the loss scale for the next. Arguments: device scalars of the
        global batch, the norm before clipping. Does not read the device."""
        bad_loss, unlabelled = ~mean_loss.isfinite(), num_labels == 0
        overflow = ~(norm.isfinite() | bad_loss | unlabelled)
        spikes, outlier = self._spikes.judge(mean_loss, norm)
        skipped = bad_loss | overflow | unlabelled | outlier
        self.scaler.update(overflow, counts=~(bad_loss | unlabelled))
        self.good_steps += ~skipped
        self._counters["skipped_steps"] += skipped
        happened = {"skips": skipped, "overflows": overflow, "bad_losses": bad_loss, "unlabelled": unlabelled}
        for kind, now in happened.items():
            self._counters[f"{kind}_in_a_row"].add_(1).mul_(now)
        return SkipDecision(skipped, spikes)

    def counts(self) -> SkipCounts:
        """A copy of the counters, on the device."""
        _, *counters = self._counters.values()
        return SkipCounts(*(counter.clone() for counter in counters))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; reads the device."""
        counts = {name: comm.read(counter) for name, counter in self._counters.items()}
        return {**counts, "scaler": self.scaler.state_dict(), "spikes": self._spikes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, counter in self._counters.items():
            counter.fill_(state.get(name, 0) if name.endswith("_in_a_row") else state[name])  # older ones lack some
        self.scaler.load_state_dict(state["scaler"])
        self._spikes.load_state_dict(state["spikes"])
