"""Simulates the pipeline schedule: idle share of a step, and activations in memory at the same time.

The action lists are those of torch's schedules, which the trainer runs. Costs, without communication:

    forward F    the stage's layers; on the last stage also three times the head: forward and gradient at once
    backward B   twice the layers, plus once the recomputed layers (forward : backward = 1 : 2)
    zero bubble  B is split into I, gradients of the input and recomputation, and W, gradients of the weights
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from internlm_lite.models.decoder import Transformer
from internlm_lite.pipeline.schedules import new_schedule
from internlm_lite.pipeline.split import rank_to_stages

_LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


@dataclass(frozen=True)
class Action:
    """One computation of a rank."""

    kind: str
    """One of F, B, I, W."""
    stage: int
    micro: int


@dataclass(frozen=True)
class StageCost:
    """Cost of a stage's actions, in FLOPs per token or any other unit."""

    forward: float
    backward_input: float
    backward_weight: float

    def of(self, kind: str) -> float:
        return {
            "F": self.forward,
            "B": self.backward_input + self.backward_weight,
            "I": self.backward_input,
            "W": self.backward_weight,
        }[kind]


def actions_of(schedule: str, size: int, chunks: int, micro_num: int) -> list[list[Action]]:
    """Actions of each of `size` pipeline ranks, in order; without a pipeline, forward and backward alternate."""
    if size == 1:
        return [[Action(kind, 0, micro) for micro in range(micro_num) for kind in "FB"]]
    numbers = rank_to_stages(0, size, chunks, schedule)
    # The attributes of stages that torch's schedules read when they compute their order.
    stubs = [
        SimpleNamespace(
            num_stages=size * chunks, group_size=size, group_rank=0, stage_index=number, submod=None, is_last=False
        )
        for number in numbers
    ]
    built = new_schedule(schedule, cast(Any, stubs), micro_num, _no_loss, early_receive=True)
    return [_actions(built.pipeline_order[rank]) for rank in range(size)]


def _no_loss(hidden: torch.Tensor, micro: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a plan computes nothing")


def _actions(entries: Sequence[Any]) -> list[Action]:
    """Micro-batches pass a stage in order, so they are counted: torch 2.13 numbers the last stage's of 1F1B from 1."""
    seen: Counter[tuple[str, int]] = Counter()
    actions = []
    for entry in entries:
        kind = None if entry is None else _LETTERS.get(entry.computation_type.name)
        if kind is not None:
            actions.append(Action(kind, entry.stage_index, seen[kind, entry.stage_index]))
            seen[kind, entry.stage_index] += 1
    return actions


def stage_cost(stage: Transformer, seq_len: int) -> StageCost:
    """Cost of a stage in FLOPs per token."""
    layers = [(block.flops_per_token(seq_len), block.recompute) for block in stage.blocks()]
    once, again = sum(flops for flops, _ in layers), sum(flops for flops, recompute in layers if recompute)
    embeddings = [one for one in (stage.source_embeddings, stage.tok_embeddings) if one is not None]
    lookups = sum(one.lookup_ops_per_token() for one in embeddings)
    head = 0 if stage.output is None else stage.output.flops_per_token(seq_len)
    return StageCost(once + lookups + 3 * head, once + again, once)


def bubble_fraction(ranks: Sequence[Sequence[Action]], costs: Sequence[StageCost]) -> float:
    """Idle share of all ranks from the first action to the last; `costs` by stage number."""
    busy = sum(busy_time(rank, costs) for rank in ranks)
    return 1 - busy / (len(ranks) * last_end(ranks, costs))


def busy_time(rank: Sequence[Action], costs: Sequence[StageCost]) -> float:
    """The sum of a rank's actions."""
    return sum(costs[action.stage].of(action.kind) for action in rank)


def last_end(ranks: Sequence[Sequence[Action]], costs: Sequence[StageCost], sending: float = 0.0) -> float:
    """Time from the first action to the end of the last.

    An action starts when its rank is free and its input exists: F after F of the previous stage, B and I after B or I
    of the next stage, and `sending` later where that stage is on another rank.
    """
    home = {action.stage: index for index, rank in enumerate(ranks) for action in rank}
    ends: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * len(ranks), [0] * len(ranks)
    last = len(costs) - 1
    while any(position < len(rank) for position, rank in zip(at, ranks, strict=True)):
        moved = False
        for index, rank in enumerate(ranks):
            while at[index] < len(rank):
                action = rank[at[index]]
                ready = _ready(action, last, ends)
                if ready is None:
                    break
                source = action.stage + (-1 if action.kind == "F" else 1)
                if ready and home.get(source) != index:
                    ready += sending
                clock[index] = max(clock[index], ready) + costs[action.stage].of(action.kind)
                ends["F" if action.kind == "F" else action.kind.replace("I", "B"), action.stage, action.micro] = clock[
                    index
                ]
                at[index] += 1
                moved = True
        assert moved, "every action of a schedule becomes possible"
    return max(clock)


def _ready(action: Action, last: int, ends: dict[tuple[str, int, int], float]) -> float | None:
    """Time at which the input of `action` from another stage exists; None: not yet known."""
    if action.kind == "W" or (action.kind == "F" and action.stage == 0):
        return 0.0
    if action.kind == "F":
        return ends.get(("F", action.stage - 1, action.micro))
    if action.stage == last:
        return 0.0
    return ends.get(("B", action.stage + 1, action.micro))


def moments(actions: Sequence[Action]) -> list[tuple[dict[int, int], dict[int, int]]]:
    """After each action of a rank, by stage: micro-batches whose activations are kept, whose weight gradients wait."""
    kept: dict[int, int] = {}
    waiting: dict[int, int] = {}
    found = []
    for action in actions:
        stage = action.stage
        if action.kind == "F":
            kept[stage] = kept.get(stage, 0) + 1
        elif action.kind == "W":
            waiting[stage] -= 1
        else:
            kept[stage] -= 1
            waiting[stage] = waiting.get(stage, 0) + (action.kind == "I")
        found.append((dict(kept), dict(waiting)))
    return found
