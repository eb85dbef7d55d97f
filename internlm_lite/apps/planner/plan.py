"""Computes the plan of `train.py --dry-run`. Needs no GPU, process group or weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from internlm_lite.apps.planner.clock import DocumentLengths, Ways, document_lengths
from internlm_lite.apps.planner.components import components_of
from internlm_lite.apps.planner.context_balance import ContextBalance, context_balance
from internlm_lite.apps.planner.device_file import DeviceFile
from internlm_lite.apps.planner.holdings import RankHoldings, holdings
from internlm_lite.apps.planner.largest_batch import largest_batch
from internlm_lite.apps.planner.memory import most_kept, rank_bytes, row_shape
from internlm_lite.apps.planner.outside import communicators, outside_bytes
from internlm_lite.apps.planner.report import GroupTable, RankBytes, RankPlan, RunPlan
from internlm_lite.apps.planner.schedule import Action, actions_of, bubble_fraction, stage_cost
from internlm_lite.apps.planner.step_clock import StepClock, clock_plan, present_ways
from internlm_lite.apps.planner.traffic import host_traffic, messages, traffic
from internlm_lite.config.batch_sizes import with_warmup_steps
from internlm_lite.config.run_stages import RunStage, in_stage, peak_rate
from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import TrainingData, open_training_data, open_validation_data
from internlm_lite.data.demand import StageUse, check_caps, stage_uses, with_total_steps
from internlm_lite.data.render_batches import StepFigures, walk_steps
from internlm_lite.evaluate.task_suite import require_tasks
from internlm_lite.layers.costs import Bytes, RowShape
from internlm_lite.layers.flash import AttentionBackend, expected_backend
from internlm_lite.mesh.mesh import Sizes, axis_groups, rank_of, sizes_of
from internlm_lite.monitor.flops import internlm_step_flops
from internlm_lite.optim.lr_schedule import learning_rate

LISTED_RANKS = 64
"""Worlds up to this size are listed rank by rank."""
SHOWN_STEPS = 3
MOST_ROWS = 16_384
"""Packed rows that are read to describe the first steps; a larger batch shows fewer steps, at least one."""


@dataclass(frozen=True)
class Questions:
    """What a plan answers besides."""

    timed: DeviceFile | None = None
    """How long does a step take on this GPU?"""
    lengths: tuple[int, ...] = ()
    """Which FLOPs do documents of so many tokens take, besides those of seq_len?"""
    memory: int | None = None
    """Which data.micro_bsz fits this many bytes of a rank?"""


def make_plan(
    config: Config,
    world_size: int,
    tflops: float | None,
    device: str = "cuda",
    questions: Questions = Questions(),
) -> RunPlan:
    """The plan of `config`, which has passed `check_config`, for ranks that run on `device` ("cuda" or "cpu").

    `tflops`: TFLOP/s of one GPU, as in the step line. Raises the same errors as the trainer: MeshError, ConfigError,
    DataError.
    """
    parallel = config.parallel
    sizes = sizes_of(world_size, parallel.tensor, parallel.pipeline.size, parallel.zero1, parallel.context.size)
    whole, opened = _opened(config, sizes)
    batches, lengths, balance = _first_batches(whole, opened, sizes.cp)
    uses = tuple(stage_uses(whole.data, opened))
    largest = max((use.stage for use in uses), key=lambda stage: stage.row_tokens)
    config = in_stage(whole, uses[0].stage)
    data, backend = config.data, _backend(config, device)
    held, parameters_total = holdings(config, sizes, backend)
    row = row_shape(in_stage(whole, largest), backend, device)
    orders = actions_of(config.schedule, sizes.pp, config.model.num_chunks, data.micro_num)
    n_bytes = _rank_bytes(config, held, orders, row)
    sent = [_sent(row, sizes, own, data.micro_num) for own in held]

    def peak(micro_bsz: int) -> int:
        longer = _longer(config, row, micro_bsz)
        return max(one.peak for one in _rank_bytes(config, held, orders, longer))

    tokens_per_step = data.micro_num * data.micro_bsz * data.seq_len * sizes.dp
    return RunPlan(
        job=config.JOB_NAME,
        sizes=sizes,
        layout=_layout(config, sizes, backend),
        parameters_total=parameters_total,
        ranks=tuple(_ranks(sizes, held, n_bytes, sent)),
        activations=_activations(config, held, orders, row),
        flops_per_step=_step_flops(config, tokens_per_step),
        tokens_per_step=tokens_per_step,
        steps_total=data.total_steps,
        tokens_total=sum(use.tokens for use in uses),
        bubble_fraction=_bubble(held, orders, data.seq_len),
        tflops_per_gpu=tflops,
        stages=uses,
        batches=batches,
        balance=balance,
        groups=_groups(sizes),
        components=components_of(config, sorted({*(use.stage.seq_len for use in uses), *questions.lengths})),
        learning_rates=dict(_learning_rates(whole)),
        largest_batch=None if questions.memory is None else largest_batch(peak, questions.memory),
        clock=None
        if questions.timed is None
        else clock_plan(
            StepClock(questions.timed, config, sizes, held, orders),
            _ways(config, row, lengths, balance, questions.timed),
            f"of the first {len(batches)} batches",
        ),
        notes=[*_notes(config, sizes, device), *_stage_notes(uses, largest), *_length_notes(config, questions.lengths)],
    )


def _longer(config: Config, row: RowShape, micro_bsz: int) -> RowShape:
    """Rows of another data.micro_bsz."""
    tokens = micro_bsz * config.data.seq_len // config.parallel.context.size
    return replace(row, tokens=tokens, source_tokens=config.source_tokens // config.data.micro_bsz * micro_bsz)


def _step_flops(config: Config, tokens: int) -> float:
    """Of a step of so many (target) tokens, by InternLM's formula."""
    seq_len = config.data.seq_len
    return internlm_step_flops(config.model, seq_len, tokens // seq_len, config.source_share)


def _bubble(held: Sequence[RankHoldings], orders: Sequence[Sequence[Action]], seq_len: int) -> float:
    costs = {number: stage_cost(stage, seq_len) for own in held for number, stage in own.stages.items()}
    return bubble_fraction(orders, [costs[number] for number in sorted(costs)])


def _sent(row: RowShape, sizes: Sizes, own: RankHoldings, micro_num: int) -> dict[str, int]:
    """Bytes that a rank of a pipeline position sends in a step, by axis, and to its host and back."""
    return {**traffic(messages(row, sizes, own, micro_num), sizes), "host": host_traffic(own, row, micro_num)}


def _ways(
    config: Config, row: RowShape, lengths: DocumentLengths, balance: Sequence[ContextBalance], device: DeviceFile
) -> Ways:
    """How the slowest of the first steps computes."""
    ways = present_ways(config, row, lengths, device)
    return replace(ways, imbalance=max((one.imbalance for one in balance), default=1.0))


def _activations(
    config: Config, held: Sequence[RankHoldings], orders: Sequence[Sequence[Action]], row: RowShape
) -> dict[str, Bytes]:
    """Of the rank that keeps most, by what is recomputed."""
    whole = replace(row, selective=False, offloaded=0)
    cases = {
        "off": (whole, 0),
        "selective": (replace(whole, selective=True), 0),
        "configured": (row, config.model.recomputed_layers),
        "all": (whole, config.model.num_blocks),
    }
    kept = [
        {case: most_kept(own, shape, order, n) for case, (shape, n) in cases.items()}
        for own, order in zip(held, orders, strict=True)
    ]
    return max(kept, key=lambda found: sum(found["configured"].values()))


def _rank_bytes(
    config: Config, held: Sequence[RankHoldings], orders: Sequence[Sequence[Action]], row: RowShape
) -> list[RankBytes]:
    """Memory of a rank of each pipeline position."""
    recomputed, micro_num = config.model.recomputed_layers, config.data.micro_num
    return [rank_bytes(own, row, order, micro_num, recomputed) for own, order in zip(held, orders, strict=True)]


def _learning_rates(config: Config) -> Iterator[tuple[int, float]]:
    """(step, its learning rate) at the ends and in the middle of the warm-up, and at quarters of what follows."""
    curve = config.lr_scheduler
    start, warmup = curve.init_steps, curve.num_warmup_steps
    after = curve.total_steps - start - warmup
    steps = [start, start + warmup // 2, *(start + warmup + after * quarter // 4 for quarter in range(5))]
    ahead = {step - curve.last_epoch - 1 for step in steps if step > curve.last_epoch}
    for step in sorted(ahead or {0}):  # all of them may be behind
        yield step, learning_rate(step, peak_rate(config, step), curve)


def _backend(config: Config, device: str) -> AttentionBackend:
    on_gpu = device == "cuda"
    return expected_backend(config.model, deterministic=config.deterministic) if on_gpu else AttentionBackend.SDPA


def _opened(config: Config, sizes: Sizes) -> tuple[Config, TrainingData]:
    """The config with its numbers of steps, and the data that it trains on."""
    data, vocab_size = config.data, config.model.vocab_sizes
    opened = open_training_data(data, vocab_size, 0, sizes.dp, config.seed, config.stages)
    config = with_warmup_steps(with_total_steps(config, opened), sizes.dp)
    check_caps(config.data, opened)
    if data.valid_every:
        open_validation_data(data, vocab_size, 0, sizes.dp, config.seed)  # raises its errors
    require_tasks(config)
    return with_warmup_steps(config, sizes.dp), opened


def _first_batches(
    config: Config, opened: TrainingData, context: int
) -> tuple[tuple[StepFigures, ...], DocumentLengths, tuple[ContextBalance, ...]]:
    """(figures of the first steps, lengths of their documents, how `context` ranks share their attention)"""
    data = config.data
    steps = min(data.total_steps, SHOWN_STEPS, max(1, MOST_ROWS // (data.micro_num * opened.order.dp_size)))
    figures, rows, balance = [], [], []
    for step in walk_steps(opened, steps):
        figures.append(step.figures)
        own = [borders for batch in step.batches for borders in batch.cu_seqlens_host]
        rows += own
        if context > 1:
            balance.append(context_balance(step.figures.step, own, config.model, context))
    return tuple(figures), document_lengths(rows), tuple(balance)


def _ranks(
    sizes: Sizes, held: Sequence[RankHoldings], n_bytes: Sequence[RankBytes], sent: Sequence[dict[str, int]]
) -> Iterator[RankPlan]:
    """The listed ranks. `n_bytes` and `sent`: one entry per pipeline position."""
    listed = sizes.world <= LISTED_RANKS
    for own in held:
        specs = [stage.spec for stage in own.stages.values()]
        seen: dict[int, int] = {}
        for elements in own.zero_elements:
            seen[elements] = seen.get(elements, 0) + 1
        for place in range(sizes.alike):
            (dp, cp), zero, replica = divmod(place, sizes.cp), place % sizes.zero, place // sizes.zero
            elements = own.zero_elements[zero]
            like_it = sizes.tp * sizes.replica * seen.get(elements, 0)
            if not listed and seen.pop(elements, None) is None:
                continue  # an equal rank is listed already
            for tp in range(sizes.tp if listed else 1):
                yield RankPlan(
                    rank=rank_of(sizes, dp=dp, cp=cp, tp=tp, pp=own.pp),
                    count=1 if listed else like_it,
                    tp=tp,
                    pp=own.pp,
                    dp=dp,
                    cp=cp,
                    zero=zero,
                    replica=replica,
                    layers=[[spec.layers.start, spec.layers.stop] for spec in specs],
                    parameters=own.parameters,
                    zero_elements=elements,
                    bytes=n_bytes[own.pp],
                    traffic_bytes=sent[own.pp],
                )


def _layout(config: Config, sizes: Sizes, backend: AttentionBackend) -> dict[str, object]:
    return {
        "tp": sizes.tp,
        "pp": sizes.pp,
        "dp": sizes.dp,
        "cp": sizes.cp,
        "zero": sizes.zero,
        "replica": sizes.replica,
        "zero_stage": config.parallel.zero_stage,
        "schedule": config.schedule if sizes.pp > 1 else None,
        "stages": sizes.pp * config.model.num_chunks,
        "sequence_parallel": config.parallel.sequence_parallel,
        "recomputed_layers": config.model.recomputed_layers,
        "selective_recomputation": config.model.recomputes_cheap,
        "offloaded_layers": config.model.offloaded_layers,
        "micro_num": config.data.micro_num,
        "micro_bsz": config.data.micro_bsz,
        "seq_len": config.data.seq_len,
        "dtype": config.model.dtype,
        "attention": backend.value,
    }


def _groups(sizes: Sizes) -> dict[str, GroupTable]:
    tables = {}
    for axis, groups in axis_groups(sizes).items():
        size = max(map(len, groups))
        joined = [group for group in groups if len(group) == size]  # middle stages have no other member in `ends`
        step = joined[0][1] - joined[0][0] if size > 1 else 1
        tables[axis] = GroupTable(size, len(joined), step, [group[0] for group in joined[:LISTED_RANKS]])
    return tables


def _stage_notes(uses: Sequence[StageUse], largest: RunStage) -> Iterator[str]:
    if len(uses) > 1:
        yield (
            f"memory, activations and traffic are those of stage {largest.number}, whose rows are the longest "
            f"({largest.row_tokens} tokens); tokens a step, FLOPs and times those of stage 0"
        )


def _length_notes(config: Config, lengths: Sequence[int]) -> Iterator[str]:
    most = config.model.max_position_embeddings
    longer = [f"{length:,}" for length in sorted(lengths) if most is not None and length > most]
    if longer and config.model.position == "learned":
        yield (
            f"documents of {', '.join(longer)} tokens are longer than the {most:,} learned positions "
            "(model.max_position_embeddings): their FLOPs are counted, but this model cannot read them"
        )


def _notes(config: Config, sizes: Sizes, device: str) -> Iterator[str]:
    data, engine = config.data, config.engine
    if engine.name != "native":
        as_ours = f'engine.name="native" with parallel.zero_stage={config.parallel.zero_stage}'
        plan_of = f"; for a plan of our stage {engine.stage}: engine.name=native parallel.zero_stage={engine.stage}"
        yield f"memory, traffic and time are those of {as_ours}, without offload{plan_of}"
    if device == "cuda":
        yield (
            f"a GPU needs about {outside_bytes(config, sizes) / 1e9:.1f} GB besides: CUDA's context, "
            f"{communicators(sizes)} communicators of NCCL, cuBLAS' workspace (by the figures of others)"
        )
    if sizes.pp > 1 and data.rampup_batch_size:
        yield "the bubble, activations and traffic are those of the full batch, after the ramp-up"
    if sizes.pp > 1 and data.micro_num < sizes.pp:
        yield f"data.micro_num {data.micro_num} is less than the {sizes.pp} pipeline ranks: most of them wait"
    if data.valid_every:
        when = f"every {data.valid_every} steps" + " and before the first" * data.valid_at_start
        train = f", and on {data.valid_train_batches} batches of training data" * bool(data.valid_train_batches)
        yield f"evaluations ({when}, on {data.valid_batches} batches of a folder{train}) and saves are not in the times"
