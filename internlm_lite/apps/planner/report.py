"""A finished plan and its JSON form. Sizes in bytes, times in seconds; the keys are stable:

job, world_size      the run
layout               {tp, pp, dp, zero, replica, zero_stage, schedule, stages, sequence_parallel, recomputed_layers,
                     selective_recomputation, offloaded_layers, micro_num, micro_bsz, seq_len, dtype, attention}
parameters_total     of the whole model
components           of the whole model, once, whatever the layout, without padding:
    lengths          tokens of documents that FLOPs are counted for: seq_len, and those asked for
    rows             [{name, parameters, decayed, weights, gradients, optimizer, flops}]: module, parameters, those of
                     them with weight decay, bytes, FLOPs per token of a forward pass for each of `lengths`
    total            the same, of all rows
    update_flops     operations of the update rule in a step; null if it does not say
    groups           [{name, rule, lr, weight_decay, averages, parameters, tensors, state, traffic}]: parameter groups;
                     lr is the peak, averages its momentum or betas as text; bytes of the rule's state, and of what the
                     update reads and writes
    flops_6n         6 * parameters + attention, per token, forward and backward, for each of `lengths`
learning_rates       {step: learning rate} at the ends and in the middle of the warm-up, and at quarters of what follows
largest_batch        null without --memory; else {memory, micro_bsz, peak, per_row}: the largest data.micro_bsz that
                     fits (0: not even 1), bytes of the fullest rank with it, and those of one row more
ranks                all ranks of a world of up to 64, else one of each kind. For each:
    rank, count      its number; the number of ranks of its kind (1 if all are listed)
    tp, pp, dp, zero, replica    its index on each axis
    layers           [first, last + 1] of each pipeline stage it holds
    parameters       elements it holds
    zero_elements    elements that it optimizes, without padding
    bytes            {weights, gradients, optimizer, activations, buffers, workspace, update, host, whole, peak}: see
                     `RankBytes`
    traffic_bytes    {tp, pp, zero, replica, ends, world}: bytes it sends in a step; host: to its host and back
activations          {off, selective, configured, all}: bytes by component on the rank with the most, if nothing,
                     what is cheap, what is configured, or every layer is recomputed in the backward pass
traffic_bytes        {tp, pp, zero, replica, ends, world, host} of the rank that sends most, in a step
flops_per_step       F of monitor/flops.py (InternLM's formula), all ranks together
flops_per_token      F per token of the step
tokens_per_step      of all data-parallel ranks
steps_total          of the run
tokens_total         of the run, with its ramp-up of the batch size
bubble_fraction      idle share of the pipeline's ranks in a step, see planner/schedule.py
tflops_per_gpu       as given, or null
seconds_per_step     at that speed, which is the `tflops` of the step line and includes all waiting; or null
days                 of the whole run at that speed, or null
stages               [{stage, batches, steps, tokens, values, folders}] of each stage of the run, one without `stages`:
    batches          [id of its first batch, id of the first one after it; null: none]
    values           {weights, seq_len, rope_base, micro_bsz, lr}; null: as model.rope_base and adam.lr say
    folders          {name: {tokens, epochs}}: what it reads of each folder; passes over it from the start of the run
                     to the end of the stage. Memory, activations and traffic of the plan are those of the stage with
                     the longest rows, tokens_per_step, FLOPs and times those of the first one
batches              the first steps: {step, tokens, num_samples_in_batch, largest_length, largest_batch,
                     smallest_batch}, as in the step line
balance              with context parallelism, of the first steps: {step, attention_flops, imbalance}: see
                     `ContextBalance`
groups               {axis: {size, count, step, first}}: the ranks of a group are r, r + step, ... (`size` of them)
                     for each r in `first`, which names the first rank of up to 64 groups
clock                null without --device NAME or FILE; else the predicted step:
    device           name in the device file
    attention        its kernel there
    documents        whose lengths attention is counted for
    keys_per_query   tokens that a query attends to on average
    seconds_per_step, tokens_per_gpu_second, mfu (as in the step line: attention over all of seq_len), mfu_causal (half
                     of it), tflops (InternLM's formula, as in the step line)
    terms            {what takes time: seconds}; the sum is seconds_per_step
    kinds            {kind of kernel, as a profile shows them: seconds}; the same sum
    expensive        [{term, seconds, change}]: the two longest besides matrix products, and what shortens them
    buckets          [{elements, count, scatter, gather, fraction}] by reduce_bucket_size: exposed seconds of the
                     reduce-scatter and of the gather of weights, and their share of what both take
    changes          [{change, seconds_per_step, mfu}]: each on top of those before it, beginning with an eager step
notes                sentences
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internlm_lite.apps.planner.components import Component, Components
from internlm_lite.apps.planner.context_balance import ContextBalance
from internlm_lite.apps.planner.largest_batch import LargestBatch
from internlm_lite.data.demand import StageUse
from internlm_lite.data.render_batches import StepFigures
from internlm_lite.layers.costs import Bytes
from internlm_lite.mesh.mesh import Sizes


@dataclass(frozen=True)
class RankBytes:
    """Memory of one rank."""

    weights: int
    """In the model's dtype; like the next two, with padding of the buckets, and what lasts: see `whole`."""
    gradients: int
    optimizer: int
    """fp32 masters, state of the update rule and average of the weights, of the rank's shard."""
    activations: int
    """Kept for the backward passes of all micro-batches in flight, at the peak."""
    buffers: int
    """Receive buffers of the pipeline."""
    workspace: int
    """Estimate of the temporary memory of one operation: logits of a chunk, or one layer's backward pass, beside which
    activations come back from the host."""
    update: int
    """fp32 gradients of the shard during the optimizer's update, when activations are freed."""
    host: int = 0
    """Pinned memory of the host, for activations; not in `peak`."""
    whole: int = 0
    """Weights and gradients that ZeRO stages 2 and 3 hold for a while: of a unit, and of the next one; beside
    `workspace`, in the loss or in a backward pass, whichever takes more."""

    @property
    def peak(self) -> int:
        """Peak bytes at any time."""
        lasting = self.weights + self.gradients + self.optimizer + self.buffers
        return lasting + max(self.activations + self.workspace + self.whole, self.update)


@dataclass(frozen=True)
class RankPlan:
    """One rank, or `count` ranks like it."""

    rank: int
    count: int
    tp: int
    pp: int
    dp: int
    cp: int
    zero: int
    replica: int
    layers: list[list[int]]
    parameters: int
    zero_elements: int
    bytes: RankBytes
    traffic_bytes: Mapping[str, int]


@dataclass(frozen=True)
class GroupTable:
    """The groups of one axis: `count` groups of `size` ranks, each an arithmetic progression."""

    size: int
    count: int
    step: int
    first: list[int]
    """The first rank of each of the first groups."""

    def group(self, index: int) -> range:
        """Ranks of the group that starts at `first[index]`."""
        start = self.first[index]
        return range(start, start + self.size * self.step, self.step)


@dataclass(frozen=True)
class ExpensiveTerm:
    term: str
    seconds: float
    change: str


@dataclass(frozen=True)
class BucketClock:
    elements: int
    count: int
    scatter: float
    gather: float
    fraction: float


@dataclass(frozen=True)
class Change:
    change: str
    seconds_per_step: float
    mfu: float


@dataclass(frozen=True)
class ClockPlan:
    """`clock` of the module's docstring."""

    device: str
    attention: str
    documents: str
    keys_per_query: float
    seconds_per_step: float
    tokens_per_gpu_second: float
    mfu: float
    mfu_causal: float
    tflops: float
    terms: dict[str, float]
    kinds: dict[str, float]
    expensive: list[ExpensiveTerm]
    buckets: list[BucketClock]
    changes: list[Change]


@dataclass(frozen=True)
class RunPlan:
    """See the module's docstring."""

    job: str
    sizes: Sizes
    layout: Mapping[str, Any]
    parameters_total: int
    ranks: tuple[RankPlan, ...]
    activations: Mapping[str, Bytes]
    flops_per_step: float
    tokens_per_step: int
    steps_total: int
    tokens_total: int
    bubble_fraction: float
    tflops_per_gpu: float | None
    stages: tuple[StageUse, ...]
    batches: tuple[StepFigures, ...]
    balance: tuple[ContextBalance, ...]
    groups: Mapping[str, GroupTable]
    components: Components
    learning_rates: Mapping[int, float]
    largest_batch: LargestBatch | None
    clock: ClockPlan | None
    notes: list[str]

    @property
    def seconds_per_step(self) -> float | None:
        if self.tflops_per_gpu is None:
            return None
        return self.flops_per_step / (self.tflops_per_gpu * 1e12 * self.sizes.world)

    @property
    def days(self) -> float | None:
        """Days of the whole run at the given speed; None without a speed."""
        seconds = self.seconds_per_step
        return None if seconds is None else seconds * self.tokens_total / self.tokens_per_step / 86_400

    @property
    def busiest(self) -> RankPlan:
        """The rank that sends the most bytes."""
        return max(self.ranks, key=lambda rank: sum(rank.traffic_bytes.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "world_size": self.sizes.world,
            "layout": self.layout,
            "parameters_total": self.parameters_total,
            "components": _components_json(self.components),
            "learning_rates": {str(step): rate for step, rate in self.learning_rates.items()},
            "largest_batch": None if self.largest_batch is None else dataclasses.asdict(self.largest_batch),
            "ranks": [_rank_json(rank) for rank in self.ranks],
            "activations": self.activations,
            "traffic_bytes": self.busiest.traffic_bytes,
            "flops_per_step": _whole(self.flops_per_step),
            "flops_per_token": self.flops_per_step / self.tokens_per_step,
            "tokens_per_step": self.tokens_per_step,
            "steps_total": self.steps_total,
            "tokens_total": self.tokens_total,
            "bubble_fraction": self.bubble_fraction,
            "tflops_per_gpu": self.tflops_per_gpu,
            "seconds_per_step": self.seconds_per_step,
            "days": self.days,
            "stages": [_stage_json(use) for use in self.stages],
            "batches": [dataclasses.asdict(figures) for figures in self.batches],
            "balance": [dataclasses.asdict(one) for one in self.balance],
            "groups": {axis: dataclasses.asdict(table) for axis, table in self.groups.items()},
            "clock": None if self.clock is None else dataclasses.asdict(self.clock),
            "notes": self.notes,
        }


def _stage_json(use: StageUse) -> dict[str, Any]:
    stage = use.stage
    return {
        "stage": stage.number,
        "batches": [stage.start, stage.stop],
        "steps": use.steps,
        "tokens": use.tokens,
        "values": stage.facts(),
        "folders": {name: dataclasses.asdict(folder) for name, folder in use.folders.items()},
    }


def _components_json(components: Components) -> dict[str, Any]:
    return {
        "lengths": list(components.lengths),
        "rows": [_component_json(row) for row in components.rows],
        "total": _component_json(components.total),
        "update_flops": components.update_flops,
        "groups": [dataclasses.asdict(group) for group in components.groups],
        "flops_6n": [components.flops_6n(index) for index in range(len(components.lengths))],
    }


def _component_json(row: Component) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "flops": list(row.flops)}


def _rank_json(rank: RankPlan) -> dict[str, Any]:
    values = dataclasses.asdict(rank)
    values["bytes"]["peak"] = rank.bytes.peak
    return values


def _whole(value: float) -> float | int:
    """An int if the value is whole, so that JSON has all its digits."""
    return int(value) if value == int(value) else value
