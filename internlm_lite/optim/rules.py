"""Update rules: what is done to a shard of master weights, given its reduced gradient.

A rule names the state tensors it needs. The optimizer allocates, shards and saves them; the rule reads and writes them
in `update`. A new elementwise rule is a class here, with its entry in `RULES`, and its name in `OptimizerConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from internlm_lite.config.schema import AdamConfig


@dataclass(frozen=True)
class Shard:
    """This rank's part of one bucket. All tensors are 1-D, of the same length, in the dtype of the master weights."""

    weights: torch.Tensor
    """Master weights: fp32, or fp64 in an fp64 model."""
    decay: bool
    """Whether weight decay applies."""
    state: Mapping[str, torch.Tensor]
    """One tensor for each of the rule's `roles`; zeros at the start."""


class UpdateRule:
    """Updates the shards of one rank. A rule has `roles` and `update`; the rest where it needs more."""

    roles: tuple[str, ...]
    """Names of the state tensors, as checkpoints store them."""
    whole_matrices = False
    """True: no parameter is cut between the ranks of `zero`. False, for elementwise rules: shards are cut anywhere.
    `buckets.build_buckets` obeys it, for the trainer and for the planner."""

    def __init__(self, shards: Sequence[Shard], config: AdamConfig) -> None:
        self._shards, self._config = shards, config

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        """Change weights and state of all shards in place.

        `grads`: one per shard, clipped, in the dtype of its weights; may be overwritten. `lr` (fp64) and `skipped`
        (bool) are scalars on the device that must not be read on the host. Where `skipped` is true, weights and state
        keep their bits, and gradients may be anything.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """Counters to be saved beside the state tensors. Reads the device."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters; an empty `state` sets them to the start, as the state tensors are zero again."""


class AdamW(UpdateRule):
    """Torch's fused kernel (arXiv:1711.05101)."""

    roles = ("exp_avg", "exp_avg_sq")

    def __init__(self, shards: Sequence[Shard], config: AdamConfig) -> None:
        super().__init__(shards, config)
        # Updates done, for the bias correction. On the device, because a skipped step does not count; one scalar per
        # shard, because the kernel advances each of them.
        self._steps = [torch.zeros((), dtype=torch.float32, device=shard.weights.device) for shard in shards]

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
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
                found_inf=skipped.float(),  # 1 leaves weights, state and step count as they are
                amsgrad=False,
                beta1=self._config.adam_beta1,
                beta2=beta2,
                # The CUDA kernel reads lr in single precision, the CPU kernel in double.
                lr=lr.float() if lr.device.type == "cuda" else lr,
                weight_decay=self._config.weight_decay if decay else 0.0,
                eps=self._config.adam_eps,
                maximize=False,
            )

    def state_dict(self) -> dict[str, int]:
        return {"adam_steps": int(self._steps[0].item())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for step in self._steps:
            step.fill_(state["adam_steps"] if state else 0)


class Lion(UpdateRule):
    """Sign of an interpolated momentum (arXiv:2302.06675, algorithm 2).

        weights -= lr * (sign(beta1 * exp_avg + (1 - beta1) * grad) + weight_decay * weights)
        exp_avg  = beta2 * exp_avg + (1 - beta2) * grad

    Every element moves by lr, so Lion wants a smaller lr than AdamW (3 to 10 times, says the paper), and a weight decay
    that is larger by the same factor.
    """

    roles = ("exp_avg",)

    def update(self, grads: Sequence[torch.Tensor], lr: torch.Tensor, beta2: float, skipped: torch.Tensor) -> None:
        for shard, grad in zip(self._shards, grads, strict=True):
            step = shard.state["exp_avg"].lerp(grad, 1 - self._config.adam_beta1).sign_()
            if shard.decay:
                step.add_(shard.weights, alpha=self._config.weight_decay)
            # Where the step is skipped, +0 is subtracted, which keeps the bits of any number, -0.0 included.
            shard.weights.sub_(step.mul_(lr).masked_fill_(skipped, 0.0))
            change = grad.sub_(shard.state["exp_avg"]).mul_(beta2 - 1)
            shard.state["exp_avg"].sub_(change.masked_fill_(skipped, 0.0))


RULES: dict[str, type[UpdateRule]] = {"adamw": AdamW, "lion": Lion}
"""By `optimizer.name` of the config."""
