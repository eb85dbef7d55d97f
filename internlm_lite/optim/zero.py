"""Hybrid ZeRO: every rank updates only its shard of each bucket. Stage 1: it holds all weights and gradients.

    gradients --reduce-scatter in zero, all-reduce in replica--> shard --update rule on fp32 master weights-->
    shard --all-gather in zero--> weights

Stage 2: gradients are reduced micro-batch by micro-batch (`shard_reduce`), and whole only until then. Stage 3: weights
are gathered for the passes of a unit (`unit_gather`), besides.

The loss was multiplied by loss_scale / tokens, so the true gradient is shard * tokens / (labels * loss_scale). This
factor, the clip factor and the decision to skip are device scalars: the host never waits.
(ZeRO: arXiv:1910.02054. Hybrid: shards are replicated over `replica` when zero1 < dp.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import LocalShard, Parameter, first_problem, is_sound
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.average import ROLE, WeightAverage
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.gather import WeightGatherer
from internlm_lite.optim.grad_norm import Requests, reduce_totals
from internlm_lite.optim.reduce import GradReducer
from internlm_lite.optim.rules import RULES
from internlm_lite.optim.scaler import LossScaler
from internlm_lite.optim.shard_reduce import ShardReducer
from internlm_lite.optim.skips import SkipDecider
from internlm_lite.optim.step_decision import StepOutcome, decide_step
from internlm_lite.optim.unit_gather import UnitGatherer
from internlm_lite.optim.unit_passes import follow
from internlm_lite.optim.updates import GroupUpdates


class HybridZeroOptimizer:
    """Applies an update rule to parameters that are sharded over the mesh's data-parallel ranks.

    One step: `begin()`; per micro-batch, forward with `loss_scale` and backward; then `step()`.
    """

    def __init__(
        self,
        units: list[nn.Module],
        config: Config,
        mesh: Mesh,
        model_dtype: torch.dtype,
        first_units: Sequence[int] = (0,),
    ) -> None:
        """`units`: modules in forward order, each called once per forward pass; they partition the parameters.
        `first_units`: the first one's number of each pipeline stage."""
        self._mesh = mesh
        self._units = units
        self._config = config
        self._model_dtype = model_dtype
        self._begun = False
        params = {cast(Parameter, param): number for number, unit in enumerate(units) for param in unit.parameters()}
        if frozen := [param.shard_spec.name for param in params if not param.requires_grad]:
            raise ConfigError(
                f"{frozen[0]} has requires_grad=False, expected that every parameter is trained: "
                "make a constant a buffer (register_buffer)"
            )
        self.buckets = build_buckets(list(params), mesh.zero, config, params)
        self._reducer, self._gatherer = self._exchanges(first_units)
        self._skips = SkipDecider(config, model_dtype, mesh.device)
        self._updates = GroupUpdates(self.buckets, config, mesh)
        masters = [shard.weights for shard in self._updates.shards]
        self.average = None if config.ema is None else WeightAverage(config.ema, masters)
        self._holds_averages = False
        self.before_exchange: Callable[[], object] = lambda: None
        """Called before `averaged` changes master weights: a save beside this work may still be reading them."""

    def _exchanges(
        self, first_units: Sequence[int]
    ) -> tuple[GradReducer | ShardReducer, WeightGatherer | UnitGatherer]:
        """What moves gradients and weights in this stage of ZeRO."""
        zero, parallel, mesh, units = self._config.hybrid_zero_optimizer, self._config.parallel, self._mesh, self._units
        of_grads, of_weights = zero.overlap_sync_grad, zero.overlap_sync_param
        if parallel.zero_stage == 1:
            reducer = GradReducer(self.buckets, units, mesh, overlap=of_grads)
            return reducer, WeightGatherer(self.buckets, units, mesh.zero, overlap=of_weights)
        by_shards = ShardReducer(self.buckets, units, mesh, first_units, overlap=of_grads)
        if parallel.zero_stage == 2:
            follow(units, [by_shards])
            return by_shards, WeightGatherer(self.buckets, units, mesh.zero, overlap=of_weights)
        keep = mesh.pp.size > 1 or not parallel.reshard_after_forward  # in a pipeline passes of micro-batches alternate
        gatherer = UnitGatherer(self.buckets, units, mesh.zero, overlap=of_weights, keep=keep)
        follow(units, [gatherer, by_shards])
        return by_shards, gatherer

    @property
    def scaler(self) -> LossScaler:
        return self._skips.scaler

    @property
    def loss_scale(self) -> torch.Tensor:
        """fp32 device scalar by which to multiply the loss."""
        return self.scaler.scale

    def begin(self, micro_num: int) -> None:
        """Call before the first forward pass of a step of `micro_num` micro-batches."""
        if self._begun:  # an exception ended that step: what it added so far must not count in this one
            self._reducer.clear()
        self._begun = True
        self._reducer.expect(micro_num)
        self._gatherer.begin(micro_num)

    @torch.no_grad()
    def step(
        self,
        index: int,
        num_labels: int,
        global_tokens: int,
        requests: Requests = Requests(),
        loss_sum: torch.Tensor | float = 0.0,
    ) -> StepOutcome:
        """Update the weights from the accumulated gradients, then zero the gradients.

        `index`: number of training steps before this one; `num_labels`, `requests`, `loss_sum`: this rank's labels,
        requests and training loss (device scalar), summed over all ranks here; `global_tokens`: the divisor of the
        loss. Collective over the mesh; does not read the device.
        """
        self._require_masters()
        self._reducer.finish()
        totals = reduce_totals(self.buckets, self._model_dtype, num_labels, requests, loss_sum, self._mesh)
        step, outcome = decide_step(totals, index, global_tokens, self._skips, self._updates.rates, self._config)
        if self.average is not None:
            self.average.wait()  # until it has read the weights that change now
        self._updates.update(self._exact_grads(), step, self._skips.good_steps)
        self._reducer.clear()
        self._begun = False
        self._gather_weights()
        if self.average is not None:
            self.average.after_step(index + 1, self._skips.good_steps)
        return outcome

    def _exact_grads(self) -> list[torch.Tensor]:
        """Gradient shards in their master weights' dtype; copies only if the gradients have another."""
        return [
            bucket.grad_shard.to(shard.weights.dtype)
            for shard, bucket in zip(self._updates.shards, self.buckets, strict=True)
        ]

    def _gather_weights(self) -> None:
        self._gatherer.start([shard.weights for shard in self._updates.shards])

    def wait_weights(self) -> None:
        """Wait until all weights are current. Call it before reading weights in any way except calling the units."""
        self._gatherer.wait()

    @torch.no_grad()
    def _adopt(self, buckets: Sequence[Bucket]) -> None:
        """Copy the model's weights, as drawn, to the master weights."""
        for bucket in buckets:
            if bucket.copies_master:
                bucket.master.copy_(bucket.weight_shard)

    def to_draw(self) -> Iterator[list[nn.Module]]:
        """Units whose weights the caller has to draw before it goes on: in stage 3 one after the other, else all."""
        if isinstance(self._gatherer, UnitGatherer):
            for unit in self._units:
                with self._gatherer.allocated(unit) as buckets:
                    yield [unit]
                    self._adopt(buckets)
        else:
            yield self._units
            self._adopt(self.buckets)
        self.restart_average()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """While it lasts, every rank has all weights of its stages, also in ZeRO stage 3. Collective."""
        self.wait_weights()
        with self._gatherer.whole():
            yield

    def restart_average(self) -> None:
        """If there is an average: begin it at the present master weights."""
        if self.average is not None:
            self.average.restart(self._skips.good_steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model computes with the averaged weights, on every rank; afterwards with those of
        before, to the bit. Collective; needs `ema` in the config.

        No step and no save inside, nor a second block: they raise RuntimeError. After an exception, for which other
        ranks must not wait, the masters are back and the model's weights are not: `publish_weights` makes them so.
        """
        average = self.average
        if average is None:
            raise RuntimeError("averaged() needs an average: set ema in the config")
        self._require_masters()
        self.wait_weights()
        average.wait()
        self.before_exchange()
        shards = self._updates.shards
        views = [n for n, bucket in enumerate(self.buckets) if not bucket.copies_master]
        with average.exchanged(views):
            self._holds_averages = True
            try:
                now = [s.weights if n in views else average.values[n] for n, s in enumerate(shards)]
                self._publish(now)
                yield
            finally:
                self._holds_averages = False
        self.publish_weights()

    def _require_masters(self) -> None:
        if self._holds_averages:
            raise RuntimeError("the weights are the averaged ones: no step and no save inside averaged()")

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Copy loaded master weights to the model's weights on every rank, and wait. Collective."""
        self._publish([shard.weights for shard in self._updates.shards])

    @torch.no_grad()
    def _publish(self, weights: Sequence[torch.Tensor]) -> None:
        self._gatherer.start(weights)
        self.wait_weights()

    def shards(self) -> Iterator[tuple[Bucket, dict[str, torch.Tensor]]]:
        """(bucket, {role: [shard_size]}) for each bucket: this rank's master weights, state of the rule, average."""
        self._require_masters()
        if self.average is not None:
            self.average.wait()
        for index, (shard, bucket) in enumerate(zip(self._updates.shards, self.buckets, strict=True)):
            averages = {} if self.average is None else {ROLE: self.average.values[index]}
            yield bucket, {"master": shard.weights, **shard.state, **averages}

    def pieces(self) -> Iterator[LocalShard]:
        """The tensors of `shards` as views per parameter, for a checkpoint to save or to load into."""
        for bucket, tensors in self.shards():
            for slot, start, stop in bucket.owned():
                part, here = slot.param.shard_spec, slice(start - bucket.shard_start, stop - bucket.shard_start)
                for role, flat in tensors.items():
                    span = (start - slot.start, stop - slot.start)
                    yield LocalShard(
                        *(part.name, role, part.shape, part.box, span, flat[here]),
                        **self._bounds(bucket, role),
                        optional=role == ROLE,
                    )

    def _bounds(self, bucket: Bucket, role: str) -> dict[str, Any]:
        """What `is_sound` expects of a tensor of `shards`."""
        largest = torch.finfo(bucket.kind.dtype).max if role in ("master", ROLE) else math.inf
        return {"non_negative": role in RULES[bucket.kind.group.rule].non_negative, "largest": largest}

    def problem(self) -> str | None:
        """The first tensor of this rank's shards with a number that no healthy run has; None: all are sound.

        One pass over the shards; waits for the device once. Not collective."""
        flags = [
            is_sound(flat, **self._bounds(bucket, role))
            for bucket, tensors in self.shards()
            for role, flat in tensors.items()
        ]
        return None if comm.read(torch.stack(flags).all()) else first_problem(list(self.pieces()))

    def state_dict(self) -> dict[str, Any]:
        """Counters, JSON-able; `pieces()` has the tensors. Reads the device."""
        averages = {} if self.average is None else {ROLE: self.average.state_dict()}
        return {**self._skips.state_dict(), **self._updates.state_dict(), **averages}

    def load_state_dict(self, state: Mapping[str, Any], *, moments: bool, averages: bool = True) -> None:
        """Restore the counters. `moments` False: the rule's state was not loaded, so it and its counters are reset.
        `averages` False: nor was the average, which begins at the master weights."""
        self._skips.load_state_dict(state)
        if self.average is not None and averages and ROLE in state:
            self.average.load_state_dict(state[ROLE])
        else:
            self.restart_average()
        self._updates.load_state_dict(state, moments=moments)

    def elements_on_zero_ranks(self) -> list[int]:
        """Number of elements, without padding, that each rank of `zero` updates."""
        return [sum(bucket.elements_on(rank) for bucket in self.buckets) for rank in range(self._mesh.zero.size)]
