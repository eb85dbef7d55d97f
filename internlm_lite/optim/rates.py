"""Learning rates of all steps on the device, where the number of updates so far is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from internlm_lite.config.run_stages import peak_rates
from internlm_lite.config.schema import Config
from internlm_lite.optim.lr_schedule import learning_rate


class Rates:
    """The schedule, scaled to each of `peaks`."""

    def __init__(self, peaks: Sequence[float], config: Config, device: torch.device) -> None:
        curves = [_curve(peak, config) for peak in peaks]
        self._rates = torch.tensor(curves, dtype=torch.float64, device=device)  # [peaks, steps]

    def after(self, good_steps: torch.Tensor) -> torch.Tensor:
        """[peaks] fp64: the learning rate of each peak after `good_steps` (int64 device scalar) updates. Does not read
        the device."""
        # index_select, because self._rates[:, step] would read `step` on the host.
        step = good_steps.clamp(max=self._rates.shape[1] - 1)
        return self._rates.index_select(1, step.unsqueeze(0)).squeeze(1)


def _curve(peak: float, config: Config) -> list[float]:
    """Learning rates of all steps: those of adam.lr, or of the stages, down to eta_min, scaled to this peak."""
    base, schedule = config.adam.lr, config.lr_scheduler
    steps = max(schedule.total_steps, config.data.total_steps) + 2
    if not base and peak:
        return [learning_rate(i, peak, schedule) for i in range(steps)]
    rates = [learning_rate(i, of_stage, schedule) for i, of_stage in enumerate(peak_rates(config, steps))]
    return rates if peak == base else [rate * (peak / base) for rate in rates]
