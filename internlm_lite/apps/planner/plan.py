"""Puts a plan together: what `train.py --dry-run` runs. No GPU, no process group, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from internlm_lite.apps.planner.holdings import Holding, holdings
from internlm_lite.apps.planner.memory import (
    Shape,
    Terms,
    backward_workspace,
    loss_workspace,
    receive_buffers,
    scaled,
    shape_of,
    stage_terms,
    summed,
    waiting_terms,
)
from internlm_lite.apps.planner.report import GroupTable, Plan, RankBytes, RankPlan
from internlm_lite.apps.planner.schedule import Action, actions_of, bubble_fraction, moments, stage_cost
from internlm_lite.apps.planner.traffic import messages, traffic
from internlm_lite.config.ranges import parse_rampup, parse_skip_batches
from internlm_lite.config.schema import Config
from internlm_lite.data.loader import TrainingData, open_training_data, open_validation_data
from internlm_lite.data.render_batches import StepFigures, walk_steps
from internlm_lite.layers.flash import AttentionBackend, varlen_fits
from internlm_lite.mesh.mesh import Sizes, axis_groups, rank_of, sizes_of
from internlm_lite.monitor.flops import step_flops
from internlm_lite.runtime.device import torch_dtype

LISTED_RANKS = 64
"""Worlds up to this size are listed rank by rank."""
SHOWN_STEPS = 3
MOST_ROWS = 16_384
"""Packed rows that are read to describe the first steps; a larger batch shows fewer steps, at least one."""


def make_plan(config: Config, world_size: int, tflops: float | None, device: str = "cuda") -> Plan:
    """The plan of `config`, which has passed `check_config`, for ranks that run on `device` ("cuda" or "cpu").

    `tflops`: TFLOP/s of one GPU, as the step line counts them. Raises what the trainer would: MeshError, ConfigError,
    DataError.
    """
    parallel, data = config.parallel, config.data
    sizes = sizes_of(world_size, parallel.tensor, parallel.pipeline.size, parallel.zero1)
    batches = _first_batches(config, sizes)
    backend = _backend(config, device)
    held, parameters_total = holdings(config, sizes, backend)
    x = shape_of(config, backend, device)
    orders = actions_of(config.schedule, sizes.pp, config.model.num_chunks, data.micro_num)
    n_again, n_layers = config.model.recomputed_layers, config.model.num_layers
    kept = [
        {n: _kept(x, own, order, n) for n in (0, n_again, n_layers)} for own, order in zip(held, orders, strict=True)
    ]
    fullest = max(range(sizes.pp), key=lambda pp: sum(kept[pp][n_again].values()))
    costs = {stage.number: stage_cost(config, stage, n_again) for own in held for stage in own.stages}
    tokens_per_step = data.micro_num * data.micro_bsz * data.seq_len * sizes.dp
    return Plan(
        job=config.JOB_NAME,
        sizes=sizes,
        layout=_layout(config, sizes, backend),
        parameters_total=parameters_total,
        ranks=tuple(_ranks(config, x, sizes, held, [kept[pp][n_again] for pp in range(sizes.pp)])),
        activations=dict(
            zip(("off", "configured", "all"), (kept[fullest][n] for n in (0, n_again, n_layers)), strict=True)
        ),
        flops_per_step=step_flops(config.model, data.seq_len, tokens_per_step // data.seq_len),
        tokens_per_step=tokens_per_step,
        steps_total=data.total_steps,
        tokens_total=tokens_per_step // data.micro_num * _micro_batches(config),
        bubble_fraction=bubble_fraction(orders, [costs[number] for number in sorted(costs)]),
        tflops_per_gpu=tflops,
        batches=batches,
        groups=_groups(sizes),
        notes=tuple(_notes(config, sizes)),
    )


def _backend(config: Config, device: str) -> AttentionBackend:
    """What the trainer chooses on a GPU of today; both varlen kernels keep the same tensors."""
    model = config.model
    varlen = device == "cuda" and varlen_fits(model.use_flash_attn, torch_dtype(model.dtype), model.head_dim)
    return AttentionBackend.FLASH_ATTN if varlen else AttentionBackend.SDPA


def _first_batches(config: Config, sizes: Sizes) -> tuple[StepFigures, ...]:
    data, vocab_size = config.data, config.model.vocab_size
    opened = open_training_data(data, vocab_size, 0, sizes.dp, config.seed)
    if data.valid_every:
        open_validation_data(data, vocab_size, 0, sizes.dp, config.seed)  # for what it refuses
    return tuple(_figures(opened, min(data.total_steps, SHOWN_STEPS, max(1, MOST_ROWS // (data.micro_num * sizes.dp)))))


def _figures(data: TrainingData, steps: int) -> Iterator[StepFigures]:
    for step in walk_steps(data, steps):
        yield step.figures


def _micro_batches(config: Config) -> int:
    """Of one data-parallel rank in the whole run."""
    data = config.data
    rampup, skipped = parse_rampup(data.rampup_batch_size), parse_skip_batches(data.skip_batches)
    if rampup is None:
        return data.total_steps * data.micro_num
    count, batch, done = 0, 0, 0
    while done < data.total_steps:
        if not any(batch in ids for ids in skipped):
            count, done = count + rampup.micro_num(batch, data.micro_num), done + 1
        batch += 1
    return count


def _kept(x: Shape, held: Holding, order: Sequence[Action], recomputed: int) -> Terms:
    """Activations at the fullest moment of a step, by component."""
    pipeline = len(order) > 0 and not (held.stages[0].first and held.stages[0].last)
    each = {stage.number: stage_terms(x, stage, recomputed, pipeline) for stage in held.stages}
    waits = {stage.number: waiting_terms(x, stage) for stage in held.stages}

    def at(kept: dict[int, int], waiting: dict[int, int]) -> Terms:
        parts = [scaled(each[number], count) for number, count in kept.items()]
        parts += [scaled(waits[number], count) for number, count in waiting.items()]
        return {name: size for name, size in summed(*parts).items() if size}

    return max((at(*moment) for moment in moments(order)), key=lambda terms: sum(terms.values()))


def _ranks(
    config: Config, x: Shape, sizes: Sizes, held: Sequence[Holding], kept: Sequence[Terms]
) -> Iterator[RankPlan]:
    listed = sizes.world <= LISTED_RANKS
    for own, activations in zip(held, kept, strict=True):
        n_bytes = _rank_bytes(config, x, own, sum(activations.values()))
        sent = traffic(messages(config, x, sizes, own, config.data.micro_num), sizes)
        seen: dict[int, int] = {}
        for elements in own.zero_elements:
            seen[elements] = seen.get(elements, 0) + 1
        for dp in range(sizes.dp):
            zero, replica = dp % sizes.zero, dp // sizes.zero
            elements = own.zero_elements[zero]
            like_it = sizes.tp * sizes.replica * seen.get(elements, 0)
            if not listed and seen.pop(elements, None) is None:
                continue  # a rank of this kind is there already
            for tp in range(sizes.tp if listed else 1):
                yield RankPlan(
                    rank=rank_of(sizes, dp=dp, tp=tp, pp=own.pp),
                    count=1 if listed else like_it,
                    tp=tp,
                    pp=own.pp,
                    dp=dp,
                    zero=zero,
                    replica=replica,
                    layers=tuple((stage.layers.start, stage.layers.stop) for stage in own.stages),
                    parameters=own.parameters,
                    zero_elements=elements,
                    bytes=n_bytes,
                    traffic=sent,
                )


def _rank_bytes(config: Config, x: Shape, own: Holding, activations: int) -> RankBytes:
    data, again = config.data, config.model.recomputed_layers
    top = own.stages[-1]
    workspace = backward_workspace(x, top.last, recomputes=top.layers.stop <= again)
    if top.last:
        workspace = max(workspace, loss_workspace(x))
    return RankBytes(
        weights=own.weights,
        gradients=own.gradients,
        optimizer=own.optimizer,
        activations=activations,
        buffers=receive_buffers(x, own.stages, data.micro_num),
        workspace=workspace,
        update=own.update,
    )


def _layout(config: Config, sizes: Sizes, backend: AttentionBackend) -> dict[str, object]:
    return {
        "tp": sizes.tp,
        "pp": sizes.pp,
        "dp": sizes.dp,
        "zero": sizes.zero,
        "replica": sizes.replica,
        "schedule": config.schedule if sizes.pp > 1 else None,
        "stages": sizes.pp * config.model.num_chunks,
        "sequence_parallel": config.parallel.sequence_parallel,
        "recomputed_layers": config.model.recomputed_layers,
        "micro_num": config.data.micro_num,
        "micro_bsz": config.data.micro_bsz,
        "seq_len": config.data.seq_len,
        "dtype": config.model.dtype,
        "attention": "varlen kernel" if backend is AttentionBackend.FLASH_ATTN else backend.value,
    }


def _groups(sizes: Sizes) -> dict[str, GroupTable]:
    tables = {}
    for axis, groups in axis_groups(sizes).items():
        size = max(map(len, groups))
        joined = [group for group in groups if len(group) == size]  # middle stages have no partner in `ends`
        step = joined[0][1] - joined[0][0] if size > 1 else 1
        tables[axis] = GroupTable(size, len(joined), step, tuple(group[0] for group in joined[:LISTED_RANKS]))
    return tables


def _notes(config: Config, sizes: Sizes) -> Iterator[str]:
    data = config.data
    if sizes.pp > 1 and data.rampup_batch_size:
        yield "the bubble, activations and traffic are those of the full batch, after the ramp-up"
    if sizes.pp > 1 and data.micro_num < sizes.pp:
        yield f"data.micro_num {data.micro_num} is less than the {sizes.pp} pipeline ranks: most of them wait"
    if data.valid_every:
        yield f"evaluation every {data.valid_every} steps and checkpoints are not in the times"
