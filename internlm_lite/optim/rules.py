"""Update rules: how a shard of master weights changes, given its reduced gradient.

A rule names its state tensors. The optimizer allocates, shards and saves them; `update` reads and writes them. A new
elementwise rule needs a class here, its entry in `RULES`, and its name in `OptimizerConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from internlm_lite.config.schema import AdamConfig, OptimizerConfig
from internlm_lite.mesh import comm


@dataclass(frozen=True)
class Shard:
    """This rank's part of one bucket. All tensors are 1-D, of the same length, in the dtype of the master weights."""

    weights: torch.Tensor
    """Master weights: fp32, or fp64 in an fp64 model."""
    decay: bool
    """Whether weight decay applies."""
    state: Mapping[str, torch.Tensor]
    """Role -> tensor, for each of the rule's `roles`; zeros at the start."""


class UpdateRule:
    """Updates the shards of one rank. Subclasses define `roles` and `update`; the other members are optional."""

    roles: tuple[str, ...]
    """Names of the state tensors, as checkpoints store them."""
    non_negative: tuple[str, ...] = ()
    """Those of `roles` that never hold a negative number; checked before a save and after a load."""
    whole_matrices = False
    """True: no parameter may be split between ranks of `zero`. False, for elementwise rules: shards are cut anywhere.
    Read by `buckets.build_buckets`."""

    def __init__(
        self, shards: Sequence[Shard], config: AdamConfig, options: OptimizerConfig = OptimizerConfig()
    ) -> None:
        self._shards, self._config, self._options = shards, config, options

    @classmethod
    def roles_with(cls, options: OptimizerConfig) -> tuple[str, ...]:
        """Those of `roles` that there are with these options."""
        return cls.roles

    @classmethod
    def operations(cls, options: OptimizerConfig) -> int | None:
        """Of an update of one element, as the rule's formulas are written: sums, products, roots and the like. Weight
        decay takes two more. None: not said."""
        return None

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        """Update weights and state of all shards in place.

        `grads`: one per shard, clipped, in the dtype of its weights; may be overwritten. `lr` (fp64) and `skipped`
        (bool) are device scalars; an implementation must not read them on the host. If `skipped` is true, weights and
        state must stay bitwise the same, although gradients may be NaN or infinite.
        """
        raise NotImplementedError

    def update_scaled(
        self, grads: Sequence[torch.Tensor], factor: torch.Tensor, lr: torch.Tensor, beta2: float, skipped: torch.Tensor
    ) -> None:
        """`update` by `grads` times `factor` (fp64 device scalar). For rules that can multiply in passing."""
        torch._foreach_mul_(list(grads), factor.to(grads[0].dtype))
        self.update(grads, lr, beta2, skipped)

    def state_dict(self) -> dict[str, int]:
        """Counters to save besides the state tensors; JSON-able. Reads the device."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters; an empty `state` resets them, for state tensors that are zero again."""


class AdamW(UpdateRule):
    """AdamW (arXiv:1711.05101) by torch's fused kernel."""

    roles = ("exp_avg", "exp_avg_sq")
    non_negative = ("exp_avg_sq",)

    @classmethod
    def operations(cls, options: OptimizerConfig) -> int:
        return 3 + 4 + 5  # first moment; second; root, plus eps, quotient, times lr, minus

    def __init__(
        self, shards: Sequence[Shard], config: AdamConfig, options: OptimizerConfig = OptimizerConfig()
    ) -> None:
        super().__init__(shards, config, options)
        # Number of updates, for the bias correction. On the device, because a skipped step does not count; one scalar
        # per shard, because the kernel increments each.
        self._steps = [torch.zeros((), dtype=torch.float32, device=shard.weights.device) for shard in shards]

    def update_scaled(
        self, grads: Sequence[torch.Tensor], factor: torch.Tensor, lr: torch.Tensor, beta2: float, skipped: torch.Tensor
    ) -> None:
        if grads[0].is_cuda and grads[0].dtype == torch.float32:
            self._update(grads, lr, beta2, skipped, factor.reciprocal().float())
        else:  # the kernels divide by an fp32 number, which fp64 would notice, and the bits of a CPU stay
            super().update_scaled(grads, factor, lr, beta2, skipped)

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        self._update(grads, lr, beta2, skipped)

    def _update(
        self,
        grads: Sequence[torch.Tensor],
        lr: torch.Tensor,
        beta2: float,
        skipped: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> None:
        found_inf = skipped.float()  # 1: weights, state and step count stay the same
        if lr.device.type == "cuda":
            lr = lr.float()  # the CUDA kernel reads it in single precision, the CPU kernel in double
        for decay in (True, False):
            chosen = [index for index, shard in enumerate(self._shards) if shard.decay is decay]
            shards = [self._shards[index] for index in chosen]
            adamw(
                [shard.weights for shard in shards],
                [grads[index] for index in chosen],
                [shard.state["exp_avg"] for shard in shards],
                [shard.state["exp_avg_sq"] for shard in shards],
                [],
                [self._steps[index] for index in chosen],
                fused=True,
                grad_scale=divisor,  # the kernel divides gradients by it, and writes them back
                found_inf=found_inf,
                amsgrad=False,
                beta1=self._config.adam_beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=self._config.weight_decay if decay else 0.0,
                eps=self._config.adam_eps,
                maximize=False,
            )

    def state_dict(self) -> dict[str, int]:
        return {"adam_steps": int(comm.read(self._steps[0]))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for step in self._steps:
            step.fill_(state["adam_steps"] if state else 0)


class Lion(UpdateRule):
    """Lion: the update is the sign of an interpolated momentum (arXiv:2302.06675, algorithm 2).

        weights -= lr * (sign(beta1 * exp_avg + (1 - beta1) * grad) + weight_decay * weights)
        exp_avg  = beta2 * exp_avg + (1 - beta2) * grad

    Every element changes by lr, so Lion needs an lr 3 to 10 times smaller than AdamW (the paper), and a weight decay
    larger by the same factor.
    """

    roles = ("exp_avg",)

    @classmethod
    def operations(cls, options: OptimizerConfig) -> int:
        return 6 + 3  # interpolation (3), sign, times lr, minus; momentum

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for shard, grad in zip(self._shards, grads, strict=True):
            step = shard.state["exp_avg"].lerp(grad, 1 - self._config.adam_beta1).sign_()
            if shard.decay:
                step.add_(shard.weights, alpha=self._config.weight_decay)
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
    def roles_with(cls, options: OptimizerConfig) -> tuple[str, ...]:
        return cls.roles if options.momentum else ()

    @classmethod
    def operations(cls, options: OptimizerConfig) -> int:
        return 2 + 2 * (options.momentum > 0)  # times lr, minus; momentum

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for shard, step in zip(self._shards, grads, strict=True):
            if self._options.momentum:
                before = shard.state["momentum"]
                step = torch.where(skipped, before, before.mul(self._options.momentum).add_(step))
                before.copy_(step)
            if shard.decay:
                step.add_(shard.weights, alpha=self._config.weight_decay)
            shard.weights.sub_(step.mul_(lr).masked_fill_(skipped, 0.0))


RULES: dict[str, type[UpdateRule]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD}
"""optimizer.name of the config -> class."""
