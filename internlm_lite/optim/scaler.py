"""Dynamic loss scaling for fp16 (arXiv:1710.03740), computed on the device: no host read, no branch.

overflow:                      counter += 1; counter >= hysteresis -> scale *= backoff   (not below min_scale)
growth_interval good in a row: counter  = 0; scale *= growth                             (not above max_scale)

A resumed fp16 run restores its checkpoint's scale; an fp16 run that resumes another dtype starts at initial_scale.
"""

from __future__ import annotations

import math

import torch

from internlm_lite.config.schema import GradScalerConfig
from internlm_lite.mesh import comm


class LossScaler:
    """`scale`: fp32 device scalar that multiplies the loss. With `config` None (bf16, fp32, fp64) it stays 1."""

    def __init__(self, config: GradScalerConfig | None, device: torch.device) -> None:
        self.config = config
        start = config.fp16.initial_scale if config else 1.0
        self.scale = torch.tensor(start, dtype=torch.float32, device=device)
        self._good_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._overflows = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, overflow: torch.Tensor, *, counts: torch.Tensor) -> None:
        """Set the scale of the next step. Bool device scalars: `overflow`, this step's gradients overflowed; `counts`
        false: it says nothing about the scale, which stays."""
        if self.config is None:
            return
        config = self.config
        self._overflows += overflow
        self._good_in_a_row.add_(counts).masked_fill_(overflow, 0)
        backs_off = overflow & (self._overflows >= config.hysteresis)
        grows = self._good_in_a_row == config.fp16.growth_interval
        self._good_in_a_row.masked_fill_(grows, 0)
        self._overflows.masked_fill_(grows, 0)
        smaller = (self.scale * config.backoff_factor).clamp(min=config.fp16.min_scale or 0.0)
        larger = (self.scale * config.growth_factor).clamp(max=config.max_scale or math.inf)
        self.scale.copy_(torch.where(backs_off, smaller, torch.where(grows, larger, self.scale)))

    def state_dict(self) -> dict[str, float | int]:
        """JSON-able; empty if the loss is not scaled. Reads the device."""
        if self.config is None:
            return {}
        return {
            "scale": comm.read(self.scale),
            "good_in_a_row": comm.read(self._good_in_a_row),
            "overflows": comm.read(self._overflows),
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        if self.config is None or not state:
            return
        self.scale.fill_(state["scale"])
        self._good_in_a_row.fill_(state["good_in_a_row"])
        self._overflows.fill_(state["overflows"])
