"""Steps that stand out from those before: a loss or gradient norm far above its running median. On the device.

    z = (log x - median) / (1.4826 * median absolute deviation),   over the last `window` steps that were finite

The median and its deviation do not follow the outliers that they are to find (Iglewicz and Hoaglin, 1993); the
logarithm makes norms and losses of any size comparable. Every rank computes the same from the same totals.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from internlm_lite.config.schema import GuardConfig

_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation of normally distributed values."""
_LEAST_DEVIATION = 0.02
"""Of logarithms: two percent. A curve without noise would make a spike of anything."""
_LEAST_HISTORY = 32


class SpikeGuard:
    """Watches (loss, gradient norm). A level that stays enters the history, and the median follows: after half a window
    it stands out no more. Where such steps are left out, guard.max_bad_steps of them may end the run before that.
    """

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._limit = config.spike_zscore
        self._skips = config.spike != "note"
        # [loss, norm][step]; nan where there is no history yet, which nanmedian leaves out
        self._logs = torch.full((2, config.spike_window), math.nan, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in one step's mean loss and gradient norm, device scalars.

        Returns ([2] z-scores, 0 where there is no spike; bool scalar: leave this step out, as it stands out, or as its
        loss is not finite, which its gradient may be all the same).
        """
        logs = torch.stack((loss, norm)).log()
        median = self._logs.nanmedian(dim=1).values
        deviation = _NORMAL * (self._logs - median[:, None]).abs().nanmedian(dim=1).values
        scores = (logs - median) / deviation.clamp(min=_LEAST_DEVIATION)
        known = self._count >= min(_LEAST_HISTORY, self._logs.shape[1])
        spikes = torch.where(known & (scores > self._limit) & scores.isfinite(), scores, 0.0)
        self._take(logs)
        return spikes, (spikes > 0).any() & self._skips | ~loss.isfinite()

    def _take(self, logs: torch.Tensor) -> None:
        finite = logs.isfinite().all()
        place = (self._count % self._logs.shape[1]).reshape(1)
        kept = torch.where(finite, logs[:, None], self._logs.index_select(1, place))
        self._logs.index_copy_(1, place, kept)
        self._count += finite

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; reads the device."""
        count = int(self._count.item())
        return {"count": count, "logs": self._logs[:, : min(count, self._logs.shape[1])].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a history of another length begins anew."""
        logs = torch.tensor(state["logs"], dtype=torch.float64).reshape(2, -1)
        if logs.shape[1] == min(state["count"], self._logs.shape[1]):
            self._logs.fill_(math.nan)  # a rollback leaves steps behind that are undone
            self._logs[:, : logs.shape[1]].copy_(logs)
            self._count.fill_(state["count"])
