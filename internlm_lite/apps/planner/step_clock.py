"""The time of a training step on a device: units and optimizer (clock.py), pipeline (schedule.py), waits (overlap.py).

The step of the slowest pipeline position is told. A pipeline's last backward passes are taken as one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from internlm_lite.apps.planner.bucket_sizes import BucketSizes
from internlm_lite.apps.planner.clock import (
    DTYPES,
    DocumentLengths,
    Roofline,
    Seconds,
    UnitSeconds,
    Ways,
    document_lengths,
    stage_seconds,
)
from internlm_lite.apps.planner.device_file import DeviceFile
from internlm_lite.apps.planner.holdings import RankHoldings, holdings, rebucketed
from internlm_lite.apps.planner.memory import row_shape
from internlm_lite.apps.planner.overlap import Exposed, exposed, network
from internlm_lite.apps.planner.report import BucketClock, Change, ClockPlan, ExpensiveTerm
from internlm_lite.apps.planner.schedule import Action, actions_of, busy_time, last_end
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError
from internlm_lite.layers.context_parallel.exchange_costs import in_ring
from internlm_lite.layers.costs import FUSIONS, CostedLayer, Message, RowShape
from internlm_lite.layers.flash import AttentionBackend, expected_backend, unfit
from internlm_lite.mesh.mesh import Sizes, sizes_of
from internlm_lite.models.stages import model_flops_per_token
from internlm_lite.monitor.flops import internlm_flops_per_token, mfu, tflops_per_gpu

MILLION = 1024**2
KERNEL_OF = {"flash_attn": "varlen", "torch_varlen": "varlen", "sdpa": "cudnn"}
"""model.attention -> key of `attention_tflops`, where they differ."""
BUCKETS = (512 * MILLION, 128 * MILLION, 64 * MILLION, 32 * MILLION)
"""Values of reduce_bucket_size that are compared, in elements."""


@dataclass(frozen=True)
class StepClock:
    """Times steps of one layout."""

    device: DeviceFile
    config: Config
    sizes: Sizes
    held: Sequence[RankHoldings]
    orders: Sequence[Sequence[Action]]

    def seconds(self, ways: Ways, bucket_size: int | None = None) -> Seconds:
        """Of one step, by row of the plan and kind of kernel; `bucket_size`: instead of the config's."""
        axes, roofline = network(self.device, self.sizes), self._roofline(ways)
        timed = [{number: roofline.units(stage.units()) for number, stage in own.stages.items()} for own in self.held]
        stages = {number: stage_seconds(units) for own in timed for number, units in own.items()}
        costs = [stages[number] for number in sorted(stages)]
        hidden = next(iter(self.held[0].stages.values())).hidden_bytes(ways.row)
        end = last_end(self.orders, costs, axes["pp"].seconds(Message("pp", "send", hidden)))
        found = []
        for own, order, by_stage in zip(self.held, self.orders, timed, strict=True):
            buckets, units = self._buckets(own, bucket_size), [unit for many in by_stage.values() for unit in many]
            times = self._busy(units)
            times.add("bubble", "messages", end - busy_time(order, costs))
            waits = self._exposed(units, buckets)
            times.add("reduce-scatter", "messages", waits.scatter)
            times.add("all-reduce of replicas", "messages", waits.replicas)
            times.add("gather of weights", "messages", waits.gather)
            times.add("optimizer", "messages", axes["world"].seconds(Message("world", "all_reduce", 48)))
            times.add_all(roofline.optimizer(buckets))
            found.append(times)
        return max(found, key=Seconds.total)

    def buckets(self, ways: Ways) -> Iterator[BucketClock]:
        """What each size of buckets leaves exposed, on the rank that waits most."""
        roofline = self._roofline(ways)
        timed = [roofline.units(_units(own)) for own in self.held]
        configured = self.config.hybrid_zero_optimizer.reduce_bucket_size
        for size in sorted({configured, *BUCKETS}, reverse=True):
            waits = [
                self._exposed(units, self._buckets(own, size)) for own, units in zip(self.held, timed, strict=True)
            ]
            worst = max(waits, key=lambda one: one.scatter + one.gather)
            count = max(len(self._buckets(own, size)) for own in self.held)
            yield BucketClock(size, count, worst.scatter, worst.gather, worst.fraction)

    def _roofline(self, ways: Ways) -> Roofline:
        axes = network(self.device, self.sizes)
        return Roofline(self.device, ways, self.sizes.tp, lambda message: axes[message.axis].seconds(message))

    def _buckets(self, own: RankHoldings, size: int | None) -> tuple[BucketSizes, ...]:
        if size is None:
            return own.buckets
        zero = self.config.hybrid_zero_optimizer.model_copy(update={"reduce_bucket_size": size})
        return rebucketed(own, self.config.model_copy(update={"hybrid_zero_optimizer": zero}), self.sizes)

    def _busy(self, units: Sequence[UnitSeconds]) -> Seconds:
        times = Seconds()
        for one in units:
            for direction in (one.forward, one.backward):
                times.add_all(direction, self.config.data.micro_num)
        return times

    def _exposed(self, units: Sequence[UnitSeconds], buckets: Sequence[BucketSizes]) -> Exposed:
        zero = self.config.hybrid_zero_optimizer
        return exposed(
            buckets,
            network(self.device, self.sizes),
            [unit.backward.total() for unit in units],
            [unit.forward.total() for unit in units],
            hidden=(zero.overlap_sync_grad, zero.overlap_sync_param),
            micro_num=self.config.data.micro_num,
        )


def _units(own: RankHoldings) -> list[CostedLayer]:
    return [unit for stage in own.stages.values() for unit in stage.units()]


def full_rows(config: Config, world_size: int, device: DeviceFile) -> tuple[StepClock, Ways]:
    """A clock of `config`, and how its step computes over documents of seq_len tokens, as benchmarks have them."""
    parallel, data = config.parallel, config.data
    sizes = sizes_of(world_size, parallel.tensor, parallel.pipeline.size, parallel.zero1, parallel.context.size)
    backend = expected_backend(config.model, deterministic=config.deterministic)
    held, _ = holdings(config, sizes, backend)
    orders = actions_of(config.schedule, sizes.pp, config.model.num_chunks, data.micro_num)
    row = row_shape(config, backend, "cuda")
    return StepClock(device, config, sizes, held, orders), present_ways(
        config, row, document_lengths([(0, data.seq_len)]), device
    )


def _compiled(config: Config) -> frozenset[str]:
    """What model.compile fuses."""
    if config.model.compile is False:
        return FUSIONS["off"]
    if config.parallel.tensor > 1:
        return FUSIONS["parts"]
    return FUSIONS["parts" if config.schedule == "zbv" else "blocks"] | {"loss"}


def present_ways(config: Config, row: RowShape, documents: DocumentLengths, device: DeviceFile) -> Ways:
    """How a step of `config` computes on a GPU with the tools of model.compile. Raises ConfigError."""
    model = config.model
    row = replace(row, fused=_compiled(config) | {"gradients"}, fp8=model.fp8)
    dtype, kernel = DTYPES.get(model.dtype, "fp32"), KERNEL_OF.get(model.attention, model.attention)
    expected = expected_backend(model, deterministic=config.deterministic)
    if expected is AttentionBackend.SDPA:
        kernel, documents = "cudnn", replace(documents, long=1.0)
    elif kernel == "auto":
        kernel = "cudnn" if "cudnn" in device.attention_tflops and expected is AttentionBackend.CUDNN else "varlen"
    if in_ring(row) or (row.context > 1 and row.exchange == "gather" and kernel == "cudnn"):
        kernel = "varlen"  # parts of documents are computed by torch's own flash kernel, or as packed sequences
    update = "fp32" if config.optimizer.name == "muon" and config.optimizer.ns_dtype == "torch.float32" else "bf16"
    needed_dtypes = (dtype, update, "bf16", *["fp8"][: row.fp8])
    needed = {f"peak_tflops.{name}": name in device.peak_tflops for name in needed_dtypes}
    kernels = (kernel, "varlen") if kernel == "cudnn" and documents.long < 1 else (kernel,)
    needed |= {f"attention_tflops.{name}": name in device.attention_tflops for name in kernels}
    if absent := [key for key, there in needed.items() if not there]:
        raise ConfigError(
            f"--device: {device.name} says nothing about {' and '.join(absent)}, which this config needs (model.dtype, "
            "model.fp8, model.attention); add it to a device file"
        )
    return Ways(row, dtype, kernel, documents, update)


def clock_plan(clock: StepClock, ways: Ways, documents: str) -> ClockPlan:
    """The times of the configured step, and what each change gives."""
    config, sizes, data = clock.config, clock.sizes, clock.config.data
    times = clock.seconds(ways)
    seconds = times.total()
    tokens = data.micro_num * data.micro_bsz * data.seq_len * sizes.dp
    model, share = config.model, config.source_share
    whole, without = (model_flops_per_token(model, length, share) for length in (data.seq_len, 0))
    peak = clock.device.peak_tflops[ways.dtype] * 1e12
    reached = mfu(whole, tokens, seconds, sizes.world, peak)
    causal = mfu((whole + without) / 2, tokens, seconds, sizes.world, peak)
    assert reached is not None and causal is not None
    internlm = internlm_flops_per_token(model, data.seq_len, share)
    return ClockPlan(
        device=clock.device.name,
        attention=ways.attention,
        documents=documents,
        keys_per_query=ways.documents.keys,
        seconds_per_step=seconds,
        tokens_per_gpu_second=tokens / seconds / sizes.world,
        mfu=reached,
        mfu_causal=causal,
        tflops=tflops_per_gpu(internlm, tokens, seconds, sizes.world),
        terms=times.by_part(),
        kinds=times.by_kind(),
        expensive=_expensive(times.by_part(), clock, ways),
        buckets=list(clock.buckets(ways)) if sizes.zero > 1 else [],
        changes=[Change(name, taken, reached * seconds / taken) for name, taken in _changes(clock, ways)],
    )


def _changes(clock: StepClock, ways: Ways) -> Iterator[tuple[str, float]]:
    """(change, seconds of a step), each on top of those before it."""
    known, compiled = clock.device.attention_tflops, _compiled(clock.config) or FUSIONS["blocks"] | {"loss"}
    size, now = BUCKETS[0], replace(ways, row=replace(ways.row, fused=FUSIONS["off"], fp8=False), attention="varlen")

    def fused(names: Iterable[str]) -> Ways:
        return replace(now, row=replace(now.row, fused=now.row.fused | set(names)))

    yield "eager, with large buckets", clock.seconds(now, size).total()
    now = fused(compiled - {"loss"})
    yield f"model.compile, of {'blocks' if 'block' in compiled else 'parts'}", clock.seconds(now, size).total()
    now = fused({"gradients"})
    yield "gradients of weights added in the product", clock.seconds(now, size).total()
    if "loss" in compiled:
        now = fused({"loss"})
        yield "loss in one pass over the logits", clock.seconds(now, size).total()
    kernels = {
        "cudnn": "cuDNN's kernel, long documents",
        "flash_attn_3": "flash-attn 3",
        "flash_attn_4": "flash-attn 4",
    }
    for kernel, name in kernels.items():
        if kernel in known and not unfit(AttentionBackend[kernel.upper()], clock.config.model):
            now = replace(now, row=replace(now.row, reference=False), attention=kernel)
            yield f"attention by {name}", clock.seconds(now, size).total()
    now = replace(now, one_pass_update=True)
    yield "optimizer in one pass", clock.seconds(now, size).total()
    if clock.sizes.zero > 1:
        size = BUCKETS[2]
        yield f"buckets of {size // MILLION} M elements", clock.seconds(now, size).total()
    if "fp8" in clock.device.peak_tflops:
        now = replace(now, row=replace(now.row, fp8=True))
        yield "products in float8", clock.seconds(now, size).total()


def _expensive(terms: dict[str, float], clock: StepClock, ways: Ways) -> list[ExpensiveTerm]:
    """The two longest terms besides matrix products, which are the work itself, and what shortens each."""
    config = clock.config
    compiled = "block" in ways.row.fused
    advice = {
        "attention": "a faster kernel: flash-attn 3 or 4, where installed",
        "elementwise": "parallel.tensor=1, so that whole blocks are compiled"
        if not compiled
        else "model.fp8 does not change it; a wider model or fewer layers has less of it",
        "loss": "data.micro_bsz larger: the head's weights are read once for more tokens",
        "weight gradients": "data.micro_bsz larger and data.micro_num smaller: added once for more tokens",
        "embedding": "data.micro_bsz larger: its dense gradient is added once for more tokens",
        "optimizer": "data.micro_num larger, or parallel.zero1=-1 over more ranks",
        "gaps": "data.micro_bsz larger: kernels that take longer",
        "recomputation": "a smaller model.checkpoint, where memory allows",
        "offload": "a smaller model.offload_share, where memory allows, or rows of more tokens",
        "tensor parallel": "a smaller parallel.tensor, inside a node",
        "context parallel": "a smaller parallel.context, inside a node, or another parallel.context.exchange",
        "bubble": "data.micro_num larger, model.num_chunks > 1, or parallel.pipeline.schedule='zbv'",
        "reduce-scatter": "a smaller hybrid_zero_optimizer.reduce_bucket_size, or data.micro_num larger",
        "gather of weights": "a smaller hybrid_zero_optimizer.reduce_bucket_size, or data.micro_num larger",
        "all-reduce of replicas": "data.micro_num larger, or parallel.zero1=-1",
        "casts to float8": "data.micro_bsz larger: weights are cast once for more tokens",
    }
    if config.model.compile is False:
        advice |= dict.fromkeys(("elementwise", "loss", "gaps"), "model.compile=True")
    chosen = [name for name in terms if name != "products"][:2]
    return [ExpensiveTerm(name, terms[name], advice[name]) for name in chosen]
