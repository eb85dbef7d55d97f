"""The update of all parameter groups: their shards, one instance of a rule for each group, and their learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Group, Mesh
from internlm_lite.optim.bf16_state import Bf16State
from internlm_lite.optim.buckets import Bucket
from internlm_lite.optim.groups import ParamGroup
from internlm_lite.optim.rates import Rates
from internlm_lite.optim.rules import RULES
from internlm_lite.optim.update_rule import Piece, Shard, UpdateRule, UpdateStep


class GroupUpdates:
    """Updates the shards of `buckets`. Allocates their state, so that memory use is known and a checkpoint can be
    loaded before the first step."""

    def __init__(self, buckets: Sequence[Bucket], config: Config, mesh: Mesh) -> None:
        self.shards = [_shard(bucket, mesh.tp if bucket.kind.tp_sharded else None) for bucket in buckets]
        peaks = list(dict.fromkeys([config.adam.lr, *(bucket.kind.group.lr for bucket in buckets)]))
        self.rates = Rates(peaks, config, mesh.device)
        """The first is that of adam.lr."""
        bf16 = config.optimizer.moments == "bf16" and any(shard.state for shard in self.shards)
        self._bf16 = Bf16State(self.shards, config.seed) if bf16 else None
        members: dict[tuple[ParamGroup, int], list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault((bucket.kind.group, index if bf16 else 0), []).append(index)
        self._members = list(members.values())
        """Indices of the shards of each rule: all of a group, or one, where its state is read and written by itself."""
        self._rows = [peaks.index(group.lr) for group, _ in members]
        """Row of `rates` of each rule."""
        of = self.shards.__getitem__ if self._bf16 is None else self._bf16.working
        self.rules: list[UpdateRule] = [
            RULES[group.rule]([of(index) for index in indices], group) for (group, _), indices in members.items()
        ]
        if self._bf16 is not None:
            self._bf16.release()

    def update(self, grads: Sequence[torch.Tensor], step: UpdateStep, updates: torch.Tensor) -> None:
        """Update all shards by `grads` (one per shard, in the dtype of its weights; may be overwritten) times
        `step.factor`. `updates`: int64 device scalar, a number that no two steps with an update share."""
        grads_of = [[grads[index] for index in indices] for indices in self._members]
        in_passing = [rule.scales(mine) for rule, mine in zip(self.rules, grads_of, strict=True)]
        others = [grad for mine, scales in zip(grads_of, in_passing, strict=True) if not scales for grad in mine]
        if others:  # one launch for all groups
            torch._foreach_mul_(others, step.factor.to(others[0].dtype))
        if self._bf16 is not None:
            self._bf16.allocate()
        for number, rule in enumerate(self.rules):
            mine, row = grads_of[number], self._rows[number]
            if self._bf16 is not None:
                self._bf16.read(self._members[number][0])
            if in_passing[number]:
                rule.update_scaled(mine, step, row)
            else:
                rule.update_in(mine, step, row)
            if self._bf16 is not None:
                self._bf16.write(self._members[number][0], updates)
        if self._bf16 is not None:
            self._bf16.release()

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


def _shard(bucket: Bucket, holders: Group | None) -> Shard:
    """This rank's shard of `bucket`; `holders` have the other parts of its parameters."""
    weights, group = bucket.master, bucket.kind.group
    pieces = tuple(
        Piece(slot.param, start - bucket.shard_start, stop - bucket.shard_start, start - slot.start)
        for slot, start, stop in bucket.owned()
    )
    dtype = torch.bfloat16 if group.options.moments == "bf16" else weights.dtype
    state = {role: torch.zeros_like(weights, dtype=dtype) for role in RULES[group.rule].roles_with(group)}
    return Shard(weights, state, pieces, holders)
