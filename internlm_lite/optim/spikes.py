"""Spikes: steps whose loss or gradient norm is far above its running median. Detected on the device.

    z = (log x - median) / (1.4826 * median absolute deviation),   both of log x over the last `window` finite steps

Outliers hardly change the median and the median deviation (Iglewicz and Hoaglin, 1993); the logarithm makes z
independent of the scale of x. Every rank computes the same from the same totals.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from internlm_lite.config.schema import GuardConfig
from internlm_lite.mesh import comm

_NORMAL = 1.4826
"""Standard deviation / median absolute deviation of a normal distribution."""
_LEAST_DEVIATION = 0.02
"""Lower bound of the deviation of log x (2 %): without it any change of a curve without noise would be a spike."""
_LEAST_HISTORY = 32
"""Steps before the first spike is reported."""


class SpikeGuard:
    """Watches loss and gradient norm. Outliers also enter the history: after half a window at a new level the median
    reaches it, and steps at that level stop being outliers. If outliers are skipped, guard.max_bad_steps may end the
    run before."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._limit = config.spike_zscore
        self._skips_outliers = config.spike != "note"
        # Ring buffer [loss, norm][step]; NaN in unused entries, which nanmedian ignores.
        self._logs = torch.full((2, config.spike_window), math.nan, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one step's mean loss and gradient norm, fp64 device scalars, to the history. Does not read the device.

        Returns ([2] z-scores of loss and norm, 0 without a spike; bool scalar: whether to skip this step because it is
        a spike and guard.spike is not "note")."""
        logs = torch.stack((loss, norm)).log()
        median = nanmedians(self._logs)
        deviation = _NORMAL * nanmedians((self._logs - median[:, None]).abs())
        scores = (logs - median) / deviation.clamp(min=_LEAST_DEVIATION)
        known = self._count >= min(_LEAST_HISTORY, self._logs.shape[1])
        spikes = torch.where(known & (scores > self._limit) & scores.isfinite(), scores, 0.0)
        self._remember(logs)
        return spikes, (spikes > 0).any() & self._skips_outliers

    def _remember(self, logs: torch.Tensor) -> None:
        finite = logs.isfinite().all()
        slot = (self._count % self._logs.shape[1]).reshape(1)
        kept = torch.where(finite, logs[:, None], self._logs.index_select(1, slot))
        self._logs.index_copy_(1, slot, kept)
        self._count += finite

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; reads the device."""
        count = comm.read(self._count)
        return {"count": count, "logs": comm.read(self._logs[:, : min(count, self._logs.shape[1])])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history; an unsuitable one (saved with another window) is ignored."""
        logs = torch.tensor(state["logs"], dtype=torch.float64).reshape(2, -1)
        if logs.shape[1] == min(state["count"], self._logs.shape[1]):
            self._logs.fill_(math.nan)  # after a rollback it contains undone steps
            self._logs[:, : logs.shape[1]].copy_(logs)
            self._count.fill_(state["count"])


def nanmedians(rows: torch.Tensor) -> torch.Tensor:
    """[n] from [n, m]: `rows.nanmedian(dim=1)`, the lower median, which has no deterministic kernel on CUDA."""
    ordered = rows.sort(dim=1).values  # NaN last
    middle = ((~rows.isnan()).sum(dim=1) - 1).clamp(min=0) // 2
    return ordered.gather(1, middle[:, None]).squeeze(1)
