"""Update rules: how a shard of master weights changes, given its reduced gradient.

A rule names its state tensors. The optimizer allocates, shards and saves them; `update` reads and writes them. A new
elementwise rule needs a class here, its entry in `RULES`, and its name in `OptimizerConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.optim.adamw import adamw

from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter
from internlm_lite.optim.groups import ParamGroup


@dataclass(frozen=True)
class Piece:
    """Elements start..stop-1 of a shard belong to `param`: its elements from `first` on, in row-major order."""

    param: Parameter
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Shard:
    """This rank's part of one bucket. All tensors are 1-D, of the same length, in the dtype of the master weights."""

    weights: torch.Tensor
    """Master weights: fp32, or fp64 in an fp64 model."""
    state: Mapping[str, torch.Tensor]
    """Role -> tensor, for each of the rule's `roles`; zeros at the start."""
    pieces: tuple[Piece, ...] = ()
    """The parameters in it, for rules that need shapes; between and behind them is padding."""


@dataclass(frozen=True)
class UpdateStep:
    """What the groups of one update share, and what is made of it for kernels once, not once per group."""

    rates: torch.Tensor
    """[peaks] fp64: learning rates; `updates.GroupUpdates` knows the row of a group."""
    beta2: float
    """That of beta2_scheduler."""
    factor: torch.Tensor
    """fp64 device scalar, by which gradients are to be multiplied."""
    skipped: torch.Tensor
    """bool device scalar."""

    @cached_property
    def single_rates(self) -> torch.Tensor:
        return self.rates.float()

    @cached_property
    def divisor(self) -> torch.Tensor:
        """1 / `factor`, fp32."""
        return self.factor.reciprocal().float()

    @cached_property
    def found_inf(self) -> torch.Tensor:
        """fp32: 1 in a skipped step, else 0."""
        return self.skipped.float()


class UpdateRule:
    """Updates the shards of one parameter group on one rank. Subclasses define `roles` and `update`; the other members
    are optional."""

    roles: tuple[str, ...]
    """Names of the state tensors, as checkpoints store them."""
    non_negative: tuple[str, ...] = ()
    """Those of `roles` that never hold a negative number; checked before a save and after a load."""
    whole_matrices = False
    """True: no parameter may be split between ranks of `zero`. False, for elementwise rules: shards are cut anywhere.
    Read by `buckets.build_buckets`."""

    def __init__(self, shards: Sequence[Shard], group: ParamGroup) -> None:
        self._shards, self._group = shards, group

    @classmethod
    def roles_with(cls, group: ParamGroup) -> tuple[str, ...]:
        """Those of `roles` that there are in this group."""
        return cls.roles

    @classmethod
    def operations(cls, group: ParamGroup) -> int | None:
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

    def beta2_of(self, step: UpdateStep) -> float:
        return step.beta2 if self._group.beta2 is None else self._group.beta2

    def scales(self, grads: Sequence[torch.Tensor]) -> bool:
        """Whether `update_scaled` takes these gradients. False: they are multiplied first, those of all groups in one
        launch, and `update` is called."""
        return False

    def update_scaled(self, grads: Sequence[torch.Tensor], step: UpdateStep, row: int) -> None:
        """`update` by `grads` times `step.factor`, with the learning rate `step.rates[row]`, multiplying in passing."""
        raise NotImplementedError

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


RULES: dict[str, type[UpdateRule]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD}
"""optimizer.name of the config -> class."""
