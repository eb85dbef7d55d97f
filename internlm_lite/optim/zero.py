"""Hybrid ZeRO-1: every rank holds all weights and gradients, but optimizes only its shard of each bucket.

    gradients --reduce-scatter in zero, all-reduce in replica--> shard --AdamW on fp32 master--> all-gather--> weights

The loss was scaled by loss_scale / tokens, so the true gradient is shard * tokens / (labels * loss_scale); this factor,
clipping, and the decision to skip on overflow are device scalars: the host never waits.
(ZeRO: arXiv:1910.02054, stage 1. Hybrid: shards are replicated over `replica` when zero1 < dp.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from internlm_lite.config.schema import Config
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter, Piece
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.curves import beta2, learning_rate
from internlm_lite.optim.norm import Requests, clip_factor, reduce_totals
from internlm_lite.optim.reduce import GradReducer
from internlm_lite.optim.scaler import LossScaler
from internlm_lite.optim.spikes import SpikeGuard
from internlm_lite.runtime.device import torch_dtype


@dataclass(frozen=True)
class StepOutcome:
    """What happened in one optimizer step. Device scalars, fp64 unless said otherwise."""

    norm_model_dtype: torch.Tensor
    """Gradient norm before clipping, unscaled, of parameters in the model's dtype."""
    norm_fp32: torch.Tensor
    """The same for parameters kept in fp32 in a half-precision model."""
    spikes: torch.Tensor
    """[2], z-scores of the loss and the gradient norm where they stand out, else 0 (see spikes.py)."""
    loss_scale: torch.Tensor
    """fp32, the scale this step's loss was multiplied with."""
    skipped_steps: torch.Tensor
    """int64, steps skipped since the run began: a gradient was not finite, or a step stood out; nothing was updated."""
    skips_in_a_row: torch.Tensor
    """int64, steps skipped since the last update."""
    overflows_in_a_row: torch.Tensor
    """int64, steps up to this one, one after another, whose gradient was not finite."""
    next_lr: torch.Tensor
    """Learning rate of the next step (the step line of InternLM prints this one)."""
    beta2: float
    signalled: torch.Tensor
    """Ranks that received a signal."""
    stop_file: torch.Tensor
    """The number in the stop file."""


class HybridZeroOptimizer:
    """AdamW with sharded state over the mesh's data-parallel ranks.

    One step: `begin()`, forward with `loss_scale` and backward per micro-batch, then `step()`.
    """

    def __init__(self, units: list[nn.Module], config: Config, mesh: Mesh, model_dtype: torch.dtype) -> None:
        """`units`: the modules in forward order, each called once per forward; they partition the parameters."""
        self._mesh = mesh
        self._config = config
        self._model_dtype = model_dtype
        zero = config.hybrid_zero_optimizer
        params = [cast(Parameter, param) for unit in units for param in unit.parameters()]
        self.buckets = build_buckets(
            params,
            mesh.zero,
            zero.reduce_bucket_size,
            config.adam.weight_decay_on == "all",
            grad_dtype(config, model_dtype),
        )
        self._spikes = SpikeGuard(config.guard, mesh.device)
        self._reducer = GradReducer(self.buckets, mesh, zero.overlap_sync_grad)
        self._masters = [_master(bucket) for bucket in self.buckets]
        self._gathers: list[comm.Work | None] = [None] * len(self.buckets)
        self.scaler = LossScaler(config.grad_scaler if model_dtype == torch.float16 else None, mesh.device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=mesh.device)
        self._skipped_steps = torch.zeros((), dtype=torch.int64, device=mesh.device)
        self._skips_in_a_row = torch.zeros((), dtype=torch.int64, device=mesh.device)
        self._overflows_in_a_row = torch.zeros((), dtype=torch.int64, device=mesh.device)
        rates = [
            learning_rate(i, config.adam.lr, config.lr_scheduler) for i in range(config.lr_scheduler.total_steps + 2)
        ]
        self._rates = torch.tensor(rates, dtype=torch.float64, device=mesh.device)
        self._adam = self._build_adam()
        self._hook_units(units)

    def _build_adam(self) -> torch.optim.AdamW:
        adam = self._config.adam
        # The fused CUDA kernel reads lr and found_inf as fp32; the CPU kernel reads lr in double precision.
        lr_dtype = torch.float32 if self._mesh.device.type == "cuda" else torch.float64
        self._lr = torch.zeros((), dtype=lr_dtype, device=self._mesh.device)  # set before every update
        groups: list[dict[str, Any]] = [
            {
                "params": [m for m, b in zip(self._masters, self.buckets, strict=True) if b.kind.decay is decay],
                "weight_decay": adam.weight_decay if decay else 0.0,
                "lr": self._lr,
            }
            for decay in (True, False)
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(adam.adam_beta1, adam.adam_beta2),
            eps=adam.adam_eps,
            fused=True,
        )
        for master in self._masters:  # made now, so that memory is known and a checkpoint can be loaded before step 0
            optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        return optimizer

    def _hook_units(self, units: list[nn.Module]) -> None:
        """Each unit waits for the gather of its own weights right before it runs."""
        home = {id(slot.param): index for index, bucket in enumerate(self.buckets) for slot in bucket.slots}
        for unit in units:
            indices = sorted({home[id(param)] for param in unit.parameters()})
            unit.register_forward_pre_hook(lambda _module, _args, needed=indices: self._wait_gathered(needed))

    def _wait_gathered(self, indices: list[int]) -> None:
        for index in indices:
            work = self._gathers[index]
            if work is not None:
                work.wait()
                self._gathers[index] = None

    @property
    def loss_scale(self) -> torch.Tensor:
        """fp32 device scalar to multiply the loss with."""
        return self.scaler.scale

    def begin(self, micro_num: int) -> None:
        """Call before the forward pass of the first of `micro_num` micro-batches."""
        self._reducer.expect(micro_num)

    @torch.no_grad()
    def step(
        self,
        index: int,
        num_labels: int,
        global_tokens: int,
        requests: Requests = Requests(),
        loss_sum: torch.Tensor | float = 0.0,
    ) -> StepOutcome:
        """Update the weights from the accumulated gradients, and clear those.

        `index`: training steps before this one; `num_labels`: labels of this rank's batch; `global_tokens`:
        the constant that the loss was divided by; `requests`: of this rank, summed over all ranks on the way;
        `loss_sum`: training loss of this rank's batch, a device scalar. Collective over the mesh.
        """
        self._reducer.finish()
        totals = reduce_totals(self.buckets, self._model_dtype, num_labels, requests, loss_sum, self._mesh)
        unscale = global_tokens / (totals.num_labels.clamp(min=1) * self.scaler.scale)
        norm = (totals.square_model_dtype + totals.square_fp32).sqrt() * unscale
        overflow = ~norm.isfinite()
        spikes, stands_out = self._spikes.judge(totals.loss / totals.num_labels.clamp(min=1), norm)
        skipped = overflow | stands_out
        factor = unscale * clip_factor(norm, self._config.hybrid_zero_optimizer.clip_grad_norm)
        second_beta = beta2(index, self._config.beta2_scheduler)
        self._update(factor, skipped, second_beta)
        used_scale = self.scaler.scale.clone()
        self.scaler.update(overflow)
        self._good_steps += ~skipped
        self._skipped_steps += skipped
        self._skips_in_a_row.add_(1).mul_(skipped)
        self._overflows_in_a_row.add_(1).mul_(overflow)
        for bucket in self.buckets:
            bucket.grads.zero_()
        self._gather_weights()
        return StepOutcome(
            norm_model_dtype=totals.square_model_dtype.sqrt() * unscale,
            norm_fp32=totals.square_fp32.sqrt() * unscale,
            spikes=spikes,
            skipped_steps=self._skipped_steps.clone(),
            skips_in_a_row=self._skips_in_a_row.clone(),
            overflows_in_a_row=self._overflows_in_a_row.clone(),
            loss_scale=used_scale,
            next_lr=self._rate_now(),
            beta2=second_beta,
            signalled=totals.signalled,
            stop_file=totals.stop_file,
        )

    def _rate_now(self) -> torch.Tensor:
        # Not self._rates[...]: indexing with a scalar tensor would read it on the host.
        step = self._good_steps.clamp(max=len(self._rates) - 1)
        return self._rates.index_select(0, step.unsqueeze(0)).squeeze(0)

    def _update(self, factor: torch.Tensor, skipped: torch.Tensor, second_beta: float) -> None:
        self._lr.copy_(self._rate_now())
        for group in self._adam.param_groups:
            group["betas"] = (group["betas"][0], second_beta)
        for master, bucket in zip(self._masters, self.buckets, strict=True):
            grad = bucket.grad_shard.to(master.dtype)
            master.grad = grad.mul_(factor)
        # Read by the fused kernel: 1 leaves weights, moments and step count alone.
        setattr(self._adam, "found_inf", skipped.to(torch.float32))  # noqa: B010 (not declared by torch's stubs)
        self._adam.step()
        for master in self._masters:
            master.grad = None

    def _gather_weights(self) -> None:
        """Copy masters into the weights and gather the other ranks' shards, first-needed bucket first."""
        for index in reversed(range(len(self.buckets))):
            bucket, master = self.buckets[index], self._masters[index]
            if master.dtype != bucket.kind.dtype:  # else it is a view of the weights
                bucket.weight_shard.copy_(master)
            self._gathers[index] = comm.all_gather(bucket.weights, self._mesh.zero)
        if not self._config.hybrid_zero_optimizer.overlap_sync_param:
            self.wait_weights()

    def wait_weights(self) -> None:
        """Make all weights current. Needed before anything reads them other than by calling the model's units."""
        self._wait_gathered(list(range(len(self.buckets))))

    def shards(self) -> Iterator[tuple[Bucket, dict[str, torch.Tensor]]]:
        """(bucket, {role: [shard_size]}): masters and moments of this rank."""
        for master, bucket in zip(self._masters, self.buckets, strict=True):
            state = self._adam.state[master]
            yield bucket, {"master": master.detach(), **{role: state[role] for role in ("exp_avg", "exp_avg_sq")}}

    def pieces(self) -> Iterator[Piece]:
        """Masters and moments of this rank by parameter name, for a checkpoint to save or to load into."""
        for bucket, shards in self.shards():
            for slot, start, stop in bucket.owned():
                part, here = slot.param.part, slice(start - bucket.shard_start, stop - bucket.shard_start)
                for role, flat in shards.items():
                    span = (start - slot.start, stop - slot.start)
                    yield Piece(part.name, role, part.shape, part.box, span, flat[here])

    def is_finite(self) -> bool:
        """Whether all masters of all ranks are. Collective; waits for the device."""
        bad = torch.zeros((), dtype=torch.int64, device=self._mesh.device)
        for master in self._masters:
            bad += (~master.detach().isfinite()).sum()
        comm.all_reduce(bad, self._mesh.world).wait()
        return bad.item() == 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able counters; the tensors are in `pieces()`. Reads the device."""
        return {
            "good_steps": int(self._good_steps.item()),
            "skipped_steps": int(self._skipped_steps.item()),
            "skips_in_a_row": int(self._skips_in_a_row.item()),
            "overflows_in_a_row": int(self._overflows_in_a_row.item()),
            "adam_steps": int(self._adam.state[self._masters[0]]["step"].item()),
            "scaler": self.scaler.state_dict(),
            "spikes": self._spikes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, moments: bool) -> None:
        """Restore the counters. `moments` False: AdamW starts anew, as its moments were not loaded."""
        self._good_steps.fill_(state["good_steps"])
        self._skipped_steps.fill_(state["skipped_steps"])
        for name, count in (("skips", self._skips_in_a_row), ("overflows", self._overflows_in_a_row)):
            count.fill_(state.get(f"{name}_in_a_row", 0))  # older checkpoints do not have them
        self.scaler.load_state_dict(state["scaler"])
        self._spikes.load_state_dict(state["spikes"])
        for master in self._masters:
            adam = self._adam.state[master]
            adam["step"].fill_(state["adam_steps"] if moments else 0)
            if not moments:  # a run that goes back has some of its own
                adam["exp_avg"].zero_()
                adam["exp_avg_sq"].zero_()

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Make the model's weights those of the masters, on every rank: after masters were loaded. Collective."""
        self._gather_weights()
        self.wait_weights()

    def elements_on_zero_ranks(self) -> list[int]:
        """Elements of real parameters that each rank of `zero` optimizes."""
        return [sum(bucket.elements_on(rank) for bucket in self.buckets) for rank in range(self._mesh.zero.size)]


def _master(bucket: Bucket) -> nn.Parameter:
    """fp32 master weights of the shard. A parameter already in fp32 or fp64 is its own master: a view, no copy."""
    shard = bucket.weight_shard
    return nn.Parameter(shard.float() if shard.dtype.itemsize < 4 else shard)


def grad_dtype(config: Config, model_dtype: torch.dtype) -> torch.dtype | None:
    wanted = config.hybrid_zero_optimizer.grad_dtype
    if wanted is not None:
        return torch_dtype(wanted)
    return torch.float32 if model_dtype == torch.bfloat16 else None
