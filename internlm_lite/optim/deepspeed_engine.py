"""DeepSpeed's ZeRO behind the interface of `optim.zero.HybridZeroOptimizer`.

    backward passes, reduction, gathers, where state lies      DeepSpeed
    update                                                     torch's fused AdamW, which it calls on its flat tensors
    norm, clip factor, skipped steps, learning rates, beta2    ours: the kernel is told the factor, and whether to skip
    checkpoints                                                ours: pieces of parameters, as of any other layout

So both engines decide the same after the same gradients, and one goes on from the checkpoint of the other. The loss was
multiplied by 1 / tokens and DeepSpeed takes the mean over data-parallel ranks: the true gradient is the mean * tokens *
ranks / labels. (ZeRO: arXiv:1910.02054. Offload: arXiv:2101.06840, arXiv:2104.07857.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in torch's stubs

from internlm_lite.config.schema import Config
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import LocalShard, Parameter, first_problem
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import BucketSpec
from internlm_lite.optim.deepspeed_settings import import_deepspeed, settings
from internlm_lite.optim.deepspeed_shards import ROLES, shards_of
from internlm_lite.optim.grad_norm import Requests, sum_totals
from internlm_lite.optim.groups import ParamGroup, ParamGroups
from internlm_lite.optim.rates import Rates
from internlm_lite.optim.scaler import LossScaler
from internlm_lite.optim.skips import SkipDecider
from internlm_lite.optim.step_decision import StepOutcome, decide_step
from internlm_lite.optim.update_rule import UpdateStep


@dataclass(frozen=True)
class ModelParts:
    """The model as DeepSpeed has to know it."""

    units: Sequence[nn.Module]
    """In forward order; they partition the parameters."""
    blocks: Sequence[nn.Module]
    """Those whose weights stage 3 gathers together, for they call methods of their layers besides `forward`."""
    borrowed: Sequence[tuple[nn.Module, Parameter]] = ()
    """(unit, parameter of another unit that it reads): a tied head."""


@dataclass(frozen=True)
class Copies:
    """What `optim.replicas` compares: weights that all data-parallel ranks hold."""

    kind: BucketSpec
    weights: torch.Tensor
    has_weights: bool


class _Root(nn.Module):
    """The whole model as DeepSpeed calls it: `run` computes a loss with its units."""

    run: Callable[[], torch.Tensor]

    def __init__(self, units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self) -> torch.Tensor:
        return self.run()


class DeepSpeedOptimizer:
    """One step: `begin()`; per micro-batch `accumulate()`; then `step()`. Methods are collective unless said."""

    average = None
    before_exchange: Callable[[], object]

    def __init__(self, parts: ModelParts, config: Config, mesh: Mesh, model_dtype: torch.dtype) -> None:
        self._config, self._mesh, self._stage = config, mesh, config.engine.stage
        self._params = [cast(Parameter, param) for unit in parts.units for param in unit.parameters()]
        by_group: dict[ParamGroup, list[Parameter]] = {}
        groups = ParamGroups(config)
        for param in self._params:
            by_group.setdefault(groups.of(param), []).append(param)
        self._groups = list(by_group)
        self._numels = [param.numel() for param in self._params]
        if not dist.is_initialized():
            backend = "nccl" if mesh.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        self._deepspeed = import_deepspeed(mesh.device)
        self._root = _Root(parts.units)
        rule = torch.optim.AdamW([_torch_group(group, by_group[group]) for group in by_group], fused=True)
        self._engine = self._build(parts, rule)
        self._shards = shards_of(self._engine.optimizer, self._params, self._stage, mesh.zero.rank)
        self._shards.allocate()
        self._skips = SkipDecider(config, model_dtype, mesh.device)
        peaks = list(dict.fromkeys([config.adam.lr, *(group.lr for group in self._groups)]))
        self._rates, self._rows = Rates(peaks, config, mesh.device), [peaks.index(group.lr) for group in self._groups]
        self._copied: dict[int, dict[str, torch.Tensor]] = {}
        """Of flat tensors in files, what `pieces` handed out."""
        self.before_exchange = lambda: None

    def _build(self, parts: ModelParts, rule: torch.optim.Optimizer) -> Any:
        """DeepSpeed's engine over the model."""
        if self._stage == 3:
            for block in parts.blocks:
                self._deepspeed.utils.set_z3_leaf_module(block, True)
        wanted = settings(self._config, self._mesh.device, sum(self._numels))
        with redirect_stdout(StringIO()):  # it prints how much memory is in use
            engine, *_ = self._deepspeed.initialize(model=self._root, optimizer=rule, config=wanted)
        for unit, param in parts.borrowed if self._stage == 3 else ():
            self._deepspeed.zero.register_external_parameter(unit, param)
        return engine

    @property
    def scaler(self) -> LossScaler:
        return self._skips.scaler

    @property
    def loss_scale(self) -> torch.Tensor:
        """fp32 device scalar, 1."""
        return self.scaler.scale

    def begin(self, micro_num: int) -> None:
        """Call before the first forward pass of a step. Not collective."""
        self._copied = {}

    def accumulate(self, run: Callable[[], torch.Tensor], *, last: bool) -> None:
        """Forward and backward pass of one micro-batch, whose loss `run` computes; `last`: of the step's."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._root.run = run
        with comm.transport_errors(self._mesh.zero):
            self._engine.backward(self._engine(), scale_wrt_gas=False)

    def compute(self, run: Callable[[], torch.Tensor]) -> None:
        """`run`, without gradients. `release` afterwards."""
        self._root.run = run
        with comm.transport_errors(self._mesh.zero):
            self._root()

    def release(self) -> None:
        """Free weights that stage 3 has at hand after forward passes alone."""
        if self._stage == 3:
            self._engine.empty_partition_cache()

    @torch.no_grad()
    def step(
        self,
        index: int,
        num_labels: int,
        global_tokens: int,
        requests: Requests = Requests(),
        loss_sum: torch.Tensor | float = 0.0,
    ) -> StepOutcome:
        """As `HybridZeroOptimizer.step`; DeepSpeed reads the device."""
        sums = torch.zeros(6, dtype=torch.float64, device=self._mesh.device)
        sums[0] = self._shards.square_sum(self._mesh.device)
        totals = sum_totals(sums, num_labels, requests, loss_sum, self._mesh)
        divisor = global_tokens * self._mesh.zero.size
        step, outcome = decide_step(totals, index, divisor, self._skips, self._rates, self._config)
        self._update(step)
        return outcome

    def _update(self, step: UpdateStep) -> None:
        """DeepSpeed's step; in it torch's kernel divides gradients by `step.divisor`, or does nothing."""
        rule, device = self._shards.rule, self._shards.flats()[0].device
        for group, row, torch_group in zip(self._groups, self._rows, rule.param_groups, strict=True):
            rate = step.rates[row].to(device)
            torch_group["lr"] = rate.float() if rate.is_cuda else rate
            torch_group["betas"] = (group.beta1, step.beta2 if group.beta2 is None else group.beta2)
        # As torch's GradScaler tells a fused optimizer.
        rule.grad_scale = step.divisor.to(device)  # type: ignore[attr-defined]
        rule.found_inf = step.found_inf.to(device)  # type: ignore[attr-defined]
        with comm.transport_errors(self._mesh.zero):
            self._engine.step()

    def wait_weights(self) -> None:
        """Weights are current after every step."""

    def to_draw(self) -> Iterator[Sequence[nn.Module]]:
        """As that of `HybridZeroOptimizer`; what rank 0 draws is that of all ranks."""
        for unit in self._root.units:
            with self._whole([unit]):
                yield [unit]
        with torch.no_grad():
            self._shards.adopt()

    @contextmanager
    def _whole(self, units: Iterable[nn.Module]) -> Iterator[None]:
        """Inside the block the weights of `units` are at hand; changes are kept."""
        if self._stage != 3:
            yield
            return
        params = [param for unit in units for param in unit.parameters()]
        with comm.transport_errors(self._mesh.zero), self._deepspeed.zero.GatheredParameters(params, modifier_rank=0):
            yield

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """While it lasts, every rank has all weights. Collective."""
        with self._whole(self._root.units):
            yield

    def restart_average(self) -> None:
        """There is none."""

    @contextmanager
    def averaged(self) -> Iterator[NoReturn]:
        raise RuntimeError("averaged() needs an average, which DeepSpeed's optimizer has not")
        yield

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Copy loaded master weights to the model's weights on every rank."""
        self._write_back()
        with comm.transport_errors(self._mesh.zero):
            self._shards.publish()

    def _write_back(self) -> None:
        """Into files, what a load has written to the tensors of `pieces`."""
        for flat, loaded in self._copied.items():
            with self._shards.present(flat) as tensors:
                for role, tensor in tensors.items():
                    tensor.copy_(loaded[role])
        self._copied = {}

    def _flats(self) -> list[dict[str, torch.Tensor]]:
        """{role: tensor} of each flat tensor, to read or load into; of those in files copies, until the next step."""
        found = []
        for flat in range(len(self._shards.flats())):
            with self._shards.present(flat) as tensors:
                if self._shards.in_file(flat):
                    tensors = {role: tensor.clone() for role, tensor in tensors.items()}
                    self._copied[flat] = tensors
                found.append(tensors)
        return found

    def shards(self) -> Iterator[tuple[Copies, dict[str, torch.Tensor]]]:
        """(weights that all ranks hold, this rank's master weights and state by role), for each flat tensor."""
        for group, flat in zip(self._shards.groups, self._flats(), strict=True):
            kind = BucketSpec(self._params[0].dtype, self._groups[group], tp_sharded=False, partial_over=())
            yield Copies(kind, self._shards.weights(group), self._stage != 3), flat

    def pieces(self) -> Iterator[LocalShard]:
        """The tensors of `shards` as views per parameter, for a checkpoint to save or to load into. Not collective."""
        flats = self._flats()
        for part in self._shards.parts:
            spec, here = part.param.shard_spec, slice(part.start, part.start + part.numel)
            for role, tensor in flats[part.flat].items():
                yield LocalShard(
                    *(spec.name, role, spec.shape, spec.box, (part.first, part.first + part.numel), tensor[here]),
                    non_negative=role == ROLES[1],
                    largest=torch.finfo(part.param.dtype).max if role == "master" else math.inf,
                )

    def problem(self) -> str | None:
        """As that of `HybridZeroOptimizer`. Not collective."""
        return first_problem(list(self.pieces()))

    def state_dict(self) -> dict[str, Any]:
        """Counters, JSON-able. Reads the device. Not collective."""
        return {**self._skips.state_dict(), "adam_steps": int(comm.read(self._shards.steps()[0]))}

    def load_state_dict(self, state: Mapping[str, Any], *, moments: bool, averages: bool = True) -> None:
        """As that of `HybridZeroOptimizer`. Not collective."""
        self._skips.load_state_dict(state)
        for step in self._shards.steps():
            step.fill_(state.get("adam_steps", 0) if moments else 0)
        if not moments:
            for flat in self._flats():
                for role in ROLES:
                    flat[role].zero_()

    def elements_on_zero_ranks(self) -> list[int]:
        """Number of elements, without padding, that each rank updates."""
        return comm.gather_objects(sum(part.numel for part in self._shards.parts), self._mesh.zero)


def _torch_group(group: ParamGroup, params: Sequence[Parameter]) -> dict[str, Any]:
    betas = (group.beta1, 0.999 if group.beta2 is None else group.beta2)  # set again before each update
    shared = {"betas": betas, "eps": group.eps, "weight_decay": group.weight_decay}
    return {"params": list(params), "lr": group.lr, **shared}
