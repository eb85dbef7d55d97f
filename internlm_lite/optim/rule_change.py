"""What becomes of the state of a checkpoint whose run had another update rule.

Roles are stored by name, and a name has one meaning for all rules: "exp_avg" is an average of gradients, "momentum" a
decaying sum. So a rule takes over what is there under the names of its `roles`; the rest starts at zero. Rules with a
counter (`UpdateRule.counts`) need all their roles: with some at zero, no count would correct the bias of both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from internlm_lite.optim.rules import RULES

WEIGHTS = ("master", "ema")
"""Roles that no update rule owns."""


@dataclass(frozen=True)
class RuleChange:
    left: frozenset[tuple[str, str]]
    """(role, name) of tensors that start at zero."""
    text: str
    """What was, what is now, and what becomes of the state; one line."""


def rule_change(
    then: str | None, now: str, wanted: Mapping[str, Collection[str]], stored: Mapping[str, Collection[str]]
) -> RuleChange | None:
    """None if the state of the checkpoint is that of this run.

    `then`, `now`: optimizer.name (None: not known); `wanted`, `stored`: role -> names of the tensors that this run has,
    over all ranks, and that the checkpoint has. State of weights that the checkpoint lacks is not looked at.
    """
    roles = {role: {*names} & {*stored.get("master", ())} for role, names in wanted.items() if role not in WEIGHTS}
    left = {(role, name) for role, names in roles.items() for name in names - {*stored.get(role, ())}}
    for needed in {rule.roles for rule in RULES.values() if rule.counts}:
        names = set.intersection(*(roles.get(role, set()) for role in needed))
        if any((role, name) in left for role in needed for name in names):
            left |= {(role, name) for role in needed for name in names}
    if not left and then in (None, now):
        return None
    kept = {role: len(names - {name for other, name in left if other == role}) for role, names in roles.items()}
    zero = {role: len(names) - kept[role] for role, names in roles.items()}
    dropped = [role for role in stored if role not in wanted and role not in WEIGHTS]
    parts = [
        f"{_listed(kept)} kept" if any(kept.values()) else "",
        f"{_listed(zero)} at zero" if any(zero.values()) else "nothing at zero",
        f"{', '.join(dropped)} dropped" if dropped else "",
    ]
    return RuleChange(frozenset(left), f"optimizer.name {then!r} then, {now!r} now: {'; '.join(filter(None, parts))}")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{role} of {n} tensors" for role, n in counts.items() if n)


def counters_left(left: Collection[tuple[str, str]]) -> set[str]:
    """Keys of counters whose roles start at zero."""
    roles = {role for role, _ in left}
    return {key for rule in RULES.values() for key in rule.counts if roles >= {*rule.roles}}


def without(state: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}
