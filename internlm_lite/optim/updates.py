"""The update of all parameter groups: their shards, one instance of a rule for each group, and their learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internlm_lite.config.run_stages import peak_rates
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Group, Mesh
from internlm_lite.optim.buckets import Bucket
from internlm_lite.optim.groups import ParamGroup
from internlm_lite.optim.lr_schedule import learning_rate
from internlm_lite.optim.rules import RULES
from internlm_lite.optim.update_rule import Piece, Shard, UpdateRule, UpdateStep


class GroupUpdates:
    """Updates the shards of `buckets`. Allocates their state, so that memory use is known and a checkpoint can be
    loaded before the first step."""

    def __init__(self, buckets: Sequence[Bucket], config: Config, mesh: Mesh) -> None:
        self.shards = [_shard(bucket, mesh.tp if bucket.kind.tp_sharded else None) for bucket in buckets]
        peaks = list(dict.fromkeys([config.adam.lr, *(bucket.kind.group.lr for bucket in buckets)]))
        self._rates = torch.tensor(
            [_curve(peak, config) for peak in peaks], dtype=torch.float64, device=mesh.device
        )  # [peaks, steps]
        members: dict[ParamGroup, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket.kind.group, []).append(index)
        self._members = list(members.values())
        """Indices of the shards of each group."""
        self._rows = [peaks.index(group.lr) for group in members]
        """Row of `_rates` of each group."""
        self.rules: list[UpdateRule] = [
            RULES[group.rule]([self.shards[index] for index in indices], group) for group, indices in members.items()
        ]

    def rates(self, good_steps: torch.Tensor) -> torch.Tensor:
        """[peaks] fp64: the learning rate of each peak after `good_steps` (int64 device scalar) updates; first
        that of adam.lr. Does not read the device."""
        # index_select, because self._rates[:, step] would read `step` on the host.
        step = good_steps.clamp(max=self._rates.shape[1] - 1)
        return self._rates.index_select(1, step.unsqueeze(0)).squeeze(1)

    def update(self, grads: Sequence[torch.Tensor], step: UpdateStep) -> None:
        """Update all shards by `grads` (one per shard, in the dtype of its weights; may be overwritten) times
        `step.factor`."""
        grads_of = [[grads[index] for index in indices] for indices in self._members]
        in_passing = [rule.scales(mine) for rule, mine in zip(self.rules, grads_of, strict=True)]
        others = [grad for mine, scales in zip(grads_of, in_passing, strict=True) if not scales for grad in mine]
        if others:  # one launch for all groups
            torch._foreach_mul_(others, step.factor.to(others[0].dtype))
        for rule, mine, row, scales in zip(self.rules, grads_of, self._rows, in_passing, strict=True):
            if scales:
                rule.update_scaled(mine, step, row)
            else:
                rule.update(mine, step.rates[row], rule.beta2_of(step), step.skipped)

    def state_dict(self) -> dict[str, int]:
        """Counters of the rules, JSON-able: those of a rule are equal in all its groups. Reads the device."""
        firsts = {type(rule): rule for rule in reversed(self.rules)}
        return {key: value for rule in firsts.values() for key, value in rule.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any], *, moments: bool) -> None:
        """`moments` False: the rules' state was not loaded, so it and its counters are reset."""
        for rule in self.rules:
            rule.load_state_dict(state if moments else {})
        if not moments:  # not zero already: after a rollback it is the state of undone steps
            for shard in self.shards:
                for tensor in shard.state.values():
                    tensor.zero_()


def _curve(peak: float, config: Config) -> list[float]:
    """Learning rates of all steps: those of adam.lr, or of the stages, down to eta_min, scaled to this peak."""
    base, schedule = config.adam.lr, config.lr_scheduler
    steps = max(schedule.total_steps, config.data.total_steps) + 2
    if not base and peak:
        return [learning_rate(i, peak, schedule) for i in range(steps)]
    rates = [learning_rate(i, of_stage, schedule) for i, of_stage in enumerate(peak_rates(config, steps))]
    return rates if peak == base else [rate * (peak / base) for rate in rates]


def _shard(bucket: Bucket, holders: Group | None) -> Shard:
    """This rank's shard of `bucket`; `holders` have the other parts of its parameters. Master weights of fp32 or fp64
    weights are a view of them, not a copy."""
    part, group = bucket.weight_shard, bucket.kind.group
    weights = part.float() if part.dtype.itemsize < 4 else part
    pieces = tuple(
        Piece(slot.param, start - bucket.shard_start, stop - bucket.shard_start, start - slot.start)
        for slot, start, stop in bucket.owned()
    )
    state = {role: torch.zeros_like(weights) for role in RULES[group.rule].roles_with(group)}
    return Shard(weights, state, pieces, holders)
