"""Spikes: steps whose loss or gradient norm is far above its running median. Detected on the device.

    z = (log x - median) / (1.4826 * median absolute deviation),   over the last `window` steps that were finite

Outliers move the median and the median deviation little (Iglewicz and Hoaglin, 1993); the logarithm makes losses and
norms of any size comparable. Every rank computes the same from the same totals.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from internlm_lite.config.schema import GuardConfig

_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation of normally distributed values."""
_LEAST_DEVIATION = 0.02
"""Of logarithms: two percent. In a curve without noise any change would be a spike otherwise."""
_LEAST_HISTORY = 32
"""Steps before the first spike is reported."""


class SpikeGuard:
    """Watches loss and gradient norm. Outliers enter the history too, so after half a window at a new level the median
    is there, and steps of that level are no outliers any more. Where outliers are skipped, guard.max_bad_steps of them
    may end the run before that.
    """

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._limit = config.spike_zscore
        self._skips_outliers = config.spike != "note"
        # [loss, norm][step], a ring; nan where there is no history yet, which nanmedian ignores
        self._logs = torch.full((2, config.spike_window), math.nan, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one step's mean loss and gradient norm, device scalars, to the history.

        Returns ([2] z-scores, 0 where there is no spike; bool scalar: skip this step, because it is an outlier and
        those are skipped, or because its loss is not finite).
        """
        logs = torch.stack((loss, norm)).log()
        median = self._logs.nanmedian(dim=1).values
        deviation = _NORMAL * (self._logs - median[:, None]).abs().nanmedian(dim=1).values
        scores = (logs - median) / deviation.clamp(min=_LEAST_DEVIATION)
        known = self._count >= min(_LEAST_HISTORY, self._logs.shape[1])
        spikes = torch.where(known & (scores > self._limit) & scores.isfinite(), scores, 0.0)
        self._remember(logs)
        return spikes, (spikes > 0).any() & self._skips_outliers | ~loss.isfinite()

    def _remember(self, logs: torch.Tensor) -> None:
        finite = logs.isfinite().all()
        slot = (self._count % self._logs.shape[1]).reshape(1)
        kept = torch.where(finite, logs[:, None], self._logs.index_select(1, slot))
        self._logs.index_copy_(1, slot, kept)
        self._count += finite

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; reads the device."""
        count = int(self._count.item())
        return {"count": count, "logs": self._logs[:, : min(count, self._logs.shape[1])].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with that history; it is dropped if its length does not fit this window."""
        logs = torch.tensor(state["logs"], dtype=torch.float64).reshape(2, -1)
        if logs.shape[1] == min(state["count"], self._logs.shape[1]):
            self._logs.fill_(math.nan)  # after a rollback it has steps that are undone
            self._logs[:, : logs.shape[1]].copy_(logs)
            self._count.fill_(state["count"])
