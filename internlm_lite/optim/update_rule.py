"""What an update rule is given, and what it has to do; `optim.rules` has the rules.

A rule names its state tensors. The optimizer allocates, shards and saves them; `update` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Group
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
    """Role -> tensor, for each of the rule's `roles`; zeros at the start. As it is stored, it may be of bf16."""
    pieces: tuple[Piece, ...] = ()
    """The parameters in it, for rules that need shapes; between and behind them is padding."""
    holders: Group | None = None
    """The tensor-parallel ranks that have the other parts of its parameters, at the same places of their shards. None:
    there are no other parts."""


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
    counts: tuple[str, ...] = ()
    """Keys of `state_dict`. A rule with one needs all of its `roles`, as old as the counter: see `rule_change`."""
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
    def product_flops(cls, param: Parameter, group: ParamGroup) -> int:
        """Operations of matrix products on a whole parameter, in an update. With `whole_matrices` ranks get about as
        many each."""
        return 0

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

    def update_in(self, grads: Sequence[torch.Tensor], step: UpdateStep, row: int) -> None:
        """`update` with the learning rate `step.rates[row]`; `grads` are multiplied by `step.factor` already."""
        self.update(grads, step.rates[row], self.beta2_of(step), step.skipped)

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
        """Restore the counters; those that `state` lacks are reset, for state tensors that are zero again."""
