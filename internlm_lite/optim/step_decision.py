"""What both engines do between the last backward pass of a step and its update: decide, on the device.

The host never waits: factor, learning rates and whether the step is skipped are device scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from internlm_lite.config.schema import Config
from internlm_lite.optim.grad_norm import Totals, clip_factor
from internlm_lite.optim.lr_schedule import beta2
from internlm_lite.optim.rates import Rates
from internlm_lite.optim.skips import SkipCounts, SkipDecider
from internlm_lite.optim.update_rule import UpdateStep


@dataclass(frozen=True)
class StepOutcome:
    """Results of one optimizer step: device scalars, fp64 unless stated otherwise."""

    norm_model_dtype: torch.Tensor
    """Gradient norm, unscaled and before clipping, of parameters in the model's dtype."""
    norm_fp32: torch.Tensor
    """The same norm of parameters kept in fp32 in a half-precision model."""
    spikes: torch.Tensor
    """[2], z-scores of loss and gradient norm if they are spikes, else 0 (see spikes.py)."""
    loss_scale: torch.Tensor
    """fp32, the scale that multiplied this step's loss."""
    skips: SkipCounts
    """Skipped steps up to this one."""
    next_lr: torch.Tensor
    """Learning rate of the next step, which the step line prints, as InternLM's does."""
    beta2: float
    signalled: torch.Tensor
    """Number of ranks that received a signal."""
    stop_file: torch.Tensor
    """The number in the stop file; 0 without one."""


def decide_step(
    totals: Totals, index: int, divisor: float, skips: SkipDecider, rates: Rates, config: Config
) -> tuple[UpdateStep, StepOutcome]:
    """What the update is to do, and what is reported of the step, which `skips` counts.

    `totals`: of gradients of the summed losses * loss scale / `divisor`; `index`: number of training steps before this
    one; `rates`: the first is that of adam.lr. Does not read the device.
    """
    labels = totals.num_labels.clamp(min=1)
    used_scale = skips.scaler.scale.clone()
    unscale = divisor / (labels * used_scale)
    norm = (totals.square_model_dtype + totals.square_fp32).sqrt() * unscale
    present = rates.after(skips.good_steps)  # before `decide` counts this step
    decision = skips.decide(totals.loss / labels, norm, totals.num_labels)
    factor = unscale * clip_factor(norm, config.hybrid_zero_optimizer.clip_grad_norm)
    step = UpdateStep(present, beta2(index, config.beta2_scheduler), factor, decision.skipped)
    return step, StepOutcome(
        norm_model_dtype=totals.square_model_dtype.sqrt() * unscale,
        norm_fp32=totals.square_fp32.sqrt() * unscale,
        spikes=decision.spikes,
        skips=skips.counts(),
        loss_scale=used_scale,
        next_lr=rates.after(skips.good_steps)[0],
        beta2=step.beta2,
        signalled=totals.signalled,
        stop_file=totals.stop_file,
    )
