"""Update rules: how a shard of master weights changes, given its reduced gradient.

A new elementwise rule needs a class here, its entry in `RULES`, and its name in `OptimizerConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from internlm_lite.mesh import comm
from internlm_lite.optim.groups import ParamGroup
from internlm_lite.optim.muon import Muon
from internlm_lite.optim.update_rule import Shard, UpdateRule, UpdateStep


class AdamW(UpdateRule):
    """AdamW (arXiv:1711.05101) by torch's fused kernel."""

    roles = ("exp_avg", "exp_avg_sq")
    non_negative = ("exp_avg_sq",)
    counts = ("adam_steps",)

    @classmethod
    def operations(cls, group: ParamGroup) -> int:
        return 3 + 4 + 5  # first moment; second; root, plus eps, quotient, times lr, minus

    def __init__(self, shards: Sequence[Shard], group: ParamGroup) -> None:
        super().__init__(shards, group)
        # Number of updates, for the bias correction. On the device, because a skipped step does not count; one scalar
        # per shard, because the kernel increments each.
        self._steps = [torch.zeros((), dtype=torch.float32, device=shard.weights.device) for shard in shards]

    def scales(self, grads: Sequence[torch.Tensor]) -> bool:
        # The kernels divide by an fp32 number, which fp64 would notice, and the bits of a CPU stay.
        return grads[0].is_cuda and grads[0].dtype == torch.float32

    def update_scaled(self, grads: Sequence[torch.Tensor], step: UpdateStep, row: int) -> None:
        self._update(grads, step.single_rates[row], self.beta2_of(step), step.found_inf, step.divisor)

    def update_in(self, grads: Sequence[torch.Tensor], step: UpdateStep, row: int) -> None:
        rates = step.single_rates if step.rates.is_cuda else step.rates
        self._update(grads, rates[row], self.beta2_of(step), step.found_inf)

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        # The CUDA kernel reads the learning rate in single precision, the CPU kernel in double.
        self._update(grads, lr.float() if lr.is_cuda else lr, beta2, skipped.float())

    def _update(
        self,
        grads: Sequence[torch.Tensor],
        lr: torch.Tensor,
        beta2: float,
        found_inf: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> None:
        adamw(
            [shard.weights for shard in self._shards],
            list(grads),
            [shard.state["exp_avg"] for shard in self._shards],
            [shard.state["exp_avg_sq"] for shard in self._shards],
            [],
            self._steps,
            fused=True,
            grad_scale=divisor,  # the kernel divides gradients by it, and writes them back
            found_inf=found_inf,  # 1: weights, state and step count stay the same
            amsgrad=False,
            beta1=self._group.beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=self._group.weight_decay,
            eps=self._group.eps,
            maximize=False,
        )

    def state_dict(self) -> dict[str, int]:
        return {"adam_steps": int(comm.read(self._steps[0]))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for step in self._steps:
            step.fill_(state.get("adam_steps", 0))


class HandoutAdamW(UpdateRule):
    """AdamW in the order of the handout of Stanford's CS336 (Spring 2025, assignment 1, section 4.3): eps is outside
    the bias correction, and the decay comes after the step.

        exp_avg    = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
        weights   -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq) + eps)
        weights   -= lr * weight_decay * weights
    """

    roles = AdamW.roles
    non_negative = AdamW.non_negative
    counts = AdamW.counts

    @classmethod
    def operations(cls, group: ParamGroup) -> int:
        return AdamW.operations(group)

    def __init__(self, shards: Sequence[Shard], group: ParamGroup) -> None:
        super().__init__(shards, group)
        self._steps = torch.zeros((), dtype=torch.float64, device=shards[0].weights.device)  # skipped: not counted

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        self._steps += ~skipped
        rate = lr * (1 - beta2**self._steps).sqrt() / (1 - self._group.beta1**self._steps)
        shrink = 1 - (lr * self._group.weight_decay).masked_fill(skipped, 0.0)
        for shard, grad in zip(self._shards, grads, strict=True):
            first, second = shard.state["exp_avg"], shard.state["exp_avg_sq"]
            first.sub_((first - grad).mul_(1 - self._group.beta1).masked_fill_(skipped, 0.0))
            second.sub_((second - grad.square_()).mul_(1 - beta2).masked_fill_(skipped, 0.0))
            step = first.mul(rate).div_(second.sqrt().add_(self._group.eps))
            shard.weights.sub_(step.masked_fill_(skipped, 0.0))
            if self._group.weight_decay:
                shard.weights.mul_(shrink)

    def state_dict(self) -> dict[str, int]:
        return {"adam_steps": int(comm.read(self._steps))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps.fill_(state.get("adam_steps", 0))


class Lion(UpdateRule):
    """Lion: the update is the sign of an interpolated momentum (arXiv:2302.06675, algorithm 2).

        weights -= lr * (sign(beta1 * exp_avg + (1 - beta1) * grad) + weight_decay * weights)
        exp_avg  = beta2 * exp_avg + (1 - beta2) * grad

    Every element changes by lr, so Lion needs an lr 3 to 10 times smaller than AdamW (the paper), and a weight decay
    larger by the same factor.
    """

    roles = ("exp_avg",)

    @classmethod
    def operations(cls, group: ParamGroup) -> int:
        return 6 + 3  # interpolation (3), sign, times lr, minus; momentum

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for shard, grad in zip(self._shards, grads, strict=True):
            step = shard.state["exp_avg"].lerp(grad, 1 - self._group.beta1).sign_()
            if self._group.weight_decay:
                step.add_(shard.weights, alpha=self._group.weight_decay)
            # In a skipped step +0 is subtracted, which keeps the bits of every number, also of -0.0.
            shard.weights.sub_(step.mul_(lr).masked_fill_(skipped, 0.0))
            change = grad.sub_(shard.state["exp_avg"]).mul_(beta2 - 1)
            shard.state["exp_avg"].sub_(change.masked_fill_(skipped, 0.0))


class SGD(UpdateRule):
    """Gradient descent, with a momentum as torch's; weight decay is decoupled, and so no part of the momentum.

    momentum = optimizer.momentum * momentum + grad
    weights -= lr * (momentum + weight_decay * weights)
    """

    roles = ("momentum",)

    @classmethod
    def roles_with(cls, group: ParamGroup) -> tuple[str, ...]:
        return cls.roles if group.momentum else ()

    @classmethod
    def operations(cls, group: ParamGroup) -> int:
        return 2 + 2 * (group.momentum > 0)  # times lr, minus; momentum

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for shard, step in zip(self._shards, grads, strict=True):
            if self._group.momentum:
                before = shard.state["momentum"]
                step = torch.where(skipped, before, before.mul(self._group.momentum).add_(step))
                before.copy_(step)
            if self._group.weight_decay:
                step.add_(shard.weights, alpha=self._group.weight_decay)
            shard.weights.sub_(step.mul_(lr).masked_fill_(skipped, 0.0))


RULES: dict[str, type[UpdateRule]] = {
    "adamw": AdamW,
    "adamw_cs336": HandoutAdamW,
    "lion": Lion,
    "sgd": SGD,
    "muon": Muon,
}
"""optimizer.name of the config -> class."""
