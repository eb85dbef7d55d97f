"""A plan as text for a terminal: the run, memory and traffic of ranks, groups, the first batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from internlm_lite.apps.planner.components import Component, Components
from internlm_lite.apps.planner.largest_batch import LargestBatch
from internlm_lite.apps.planner.report import ClockPlan, GroupTable, RankPlan, RunPlan
from internlm_lite.data.demand import StageUse
from internlm_lite.units import human_bytes, human_count, human_seconds

_LEAST_FRACTION = 0.005
"""Components of activations below this fraction are shown in one row."""
_MOST_POSITIONS = 8
"""Pipeline positions with their own line; the middle of longer pipelines is not shown."""


def render(plan: RunPlan, *, components: bool = False) -> RenderableType:
    """The whole plan, about two screens; and what every component of the model holds and computes."""
    parts: list[RenderableType] = [_title(plan), _run(plan)]
    parts += [*_param_groups(plan.components), *_memory(plan), *_activations(plan)]
    if components:
        parts += [*_component_bytes(plan.components), *_component_flops(plan.components)]
    if plan.sizes.world > 1:
        parts += _groups(plan)
    if plan.clock is not None:
        parts += _clock(plan.clock)
    return Group(*parts, *_stages(plan.stages), *_batches(plan), *(_note(note) for note in plan.notes))


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _note(text: str) -> Text:
    return Text(f"  {text}", style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _title(plan: RunPlan) -> Text:
    sizes, layout = plan.sizes, plan.layout
    details = [f"zero {sizes.zero} x replica {sizes.replica}"]
    if layout["sequence_parallel"]:
        details.append("sequence parallel")
    if layout["schedule"]:
        details.append(f"{layout['schedule']}, {layout['stages']} stages")
    details += [str(layout["dtype"]).removeprefix("torch."), str(layout["attention"])]
    ranks = f"{sizes.world:,} ranks" if sizes.world > 1 else "1 rank"
    text = Text(plan.job, style="bold green")
    text.append(f"  {ranks} = {sizes.axes}", "bold default")
    return text.append(f"  ({'; '.join(details)})\n", "not bold default")


def _run(plan: RunPlan) -> Table:
    grid = Table.grid(padding=(0, 2))
    seconds, days = plan.seconds_per_step, plan.days
    time = "give --device NAME or --tflops X for times"
    if plan.clock is not None:
        seconds = plan.clock.seconds_per_step
        days = seconds * plan.tokens_total / plan.tokens_per_step / 86_400
        time = f"{human_seconds(seconds)} a step, {_days(days)} days, as predicted below"
    elif seconds is not None and days is not None:
        time = f"{human_seconds(seconds)} a step, {_days(days)} days at {plan.tflops_per_gpu:g} TFLOP/s per GPU"
    total, decayed = plan.parameters_total, plan.components.total.decayed
    (first, start), *later = plan.learning_rates.items()
    rates = [f"{start:.7g} in step {first:,}", *(f"{rate:.7g} in {step:,}" for step, rate in later)]
    rows = {
        "parameters": f"{total:,}: {decayed:,} with weight decay, {total - decayed:,} without",
        "tokens": f"{plan.tokens_per_step:,} a step; {human_count(plan.tokens_total)} in {plan.steps_total:,} steps",
        "FLOPs": f"{plan.flops_per_step:.4e} a step; {plan.flops_per_step / plan.tokens_per_step:.4e} a token",
        "time": time,
        "lr": ", ".join(rates),
    }
    if plan.sizes.pp > 1:
        rows["bubble"] = f"{plan.bubble_fraction:.1%} of a step, with backward twice as long as forward, sending free"
    if plan.largest_batch is not None:
        rows["micro_bsz"] = _largest(plan.largest_batch)
    for name, value in rows.items():
        grid.add_row(Text(f"  {name}", style="dim"), value)
    return grid


def _stages(uses: Sequence[StageUse]) -> Iterator[RenderableType]:
    """What each stage reads of each folder."""
    yield _heading("Data, by stage and folder" if len(uses) > 1 else "Data, by folder")
    table = _table("stage", "steps", "row", "rope base", "lr", "folder", "tokens", "epochs by its end")
    for use in uses:
        stage = use.stage
        base, lr = ("as configured" if value is None else f"{value:g}" for value in (stage.rope_base, stage.lr))
        row = f"{stage.micro_bsz} * {stage.seq_len:,}"
        first = [str(stage.number), f"{use.steps:,}", row, base, lr]
        for name, folder in use.folders.items():
            table.add_row(*first, name, human_count(folder.tokens), f"{folder.epochs:.3g}")
            first = [""] * len(first)
    yield table


def _days(days: float) -> str:
    return f"{days:,.0f}" if days >= 1000 else f"{days:.3g}"


def _largest(batch: LargestBatch) -> str:
    unit, name = _unit(batch.memory)
    peak, row, memory = (size / unit for size in (batch.peak, batch.per_row, batch.memory))
    if not batch.micro_bsz:
        return f"not even 1 fits {memory:.2f} {name}: it takes {peak:.2f}"
    fixed = peak - row * batch.micro_bsz
    return f"{batch.micro_bsz} fits {memory:.2f} {name}: {peak:.2f} = {fixed:.2f} + {row:.4g} * micro_bsz"


def _param_groups(components: Components) -> Iterator[RenderableType]:
    unit, name = _unit(max(group.traffic for group in components.groups))
    yield _heading(f"Parameter groups, whole and once; state, and what an update reads and writes, {name}")
    table = _table("group", "rule", "lr", "decay", "averages", "parameters", "state", "update")
    for group in components.groups:
        facts = (group.rule, f"{group.lr:g}", f"{group.weight_decay:g}", group.averages)
        sizes = (f"{size / unit:.2f}" for size in (group.state, group.traffic))
        table.add_row(group.name, *facts, f"{group.parameters:,}", *sizes)
    yield table


def _memory(plan: RunPlan) -> Iterator[RenderableType]:
    unit, name = _unit(max(rank.bytes.peak for rank in plan.ranks))
    yield _heading(f"Memory of a rank, {name}")
    columns = ("ranks", "layers", "elements", "weights", "gradients", "optimizer", "activations", "other", "peak")
    table = _table("pp", *columns)
    positions = list(_positions(plan))
    shown = _MOST_POSITIONS // 2
    for index, (rank, names, count) in enumerate(positions):
        if len(positions) <= _MOST_POSITIONS or not shown <= index < len(positions) - shown:
            table.add_row(names, f"{count:,}", *_memory_cells(rank, unit))
        elif index == shown:
            table.add_row(*["..."] * len(table.columns))
    yield table
    shares = sorted({rank.zero_elements for rank in plan.ranks})
    span = " to ".join(f"{share:,}" for share in dict.fromkeys((shares[0], shares[-1])))
    yield _note(f"optimizer: masters and moments of {span} elements")
    yield _note("other: receive buffers of the pipeline, and an estimate of what a single computation takes")


def _memory_cells(rank: RankPlan, unit: int) -> Iterator[str]:
    sizes = rank.bytes
    yield " ".join(f"{start}-{stop - 1}" for start, stop in rank.layers)
    yield f"{rank.parameters:,}"
    for size in (sizes.weights, sizes.gradients, sizes.optimizer, sizes.activations, sizes.buffers + sizes.workspace):
        yield f"{size / unit:.2f}"
    yield f"[bold]{sizes.peak / unit:.2f}[/]"


def _unit(most: int) -> tuple[int, str]:
    """(bytes, name) of the unit for sizes up to `most` bytes."""
    return (2**30, "GiB") if most >= 2**29 else (2**20, "MiB")


def _positions(plan: RunPlan) -> Iterator[tuple[RankPlan, str, int]]:
    """(a rank, its pipeline positions as text, number of ranks); adjacent positions with equal figures are merged."""
    firsts = [next(group) for _, group in groupby(plan.ranks, key=lambda rank: rank.pp)]
    for _, group in groupby(firsts, key=lambda rank: (rank.parameters, rank.bytes)):
        ranks = list(group)
        names = str(ranks[0].pp) if len(ranks) == 1 else f"{ranks[0].pp}-{ranks[-1].pp}"
        yield ranks[0], names, plan.sizes.world // plan.sizes.pp * len(ranks)


def _activations(plan: RunPlan) -> Iterator[RenderableType]:
    layout = plan.layout
    this_run = "selective" if layout["selective_recomputation"] else f"{layout['recomputed_layers']} layers"
    shown = {"off": "nothing", "selective": "selective", "configured": f"{this_run}, this run", "all": "all layers"}
    cases = [plan.activations[name] for name in shown]
    most = max(sum(case.values()) for case in cases)
    unit, name = _unit(most)
    yield _heading(f"Activations of the rank that keeps most, {name}, by what is recomputed")
    table = _table("component", *shown.values())

    def row(name: str, sizes: Sequence[int]) -> None:
        table.add_row(name, *(f"{size / unit:.2f}" if size else "-" for size in sizes))

    names = [name for name in cases[0] if max(case.get(name, 0) for case in cases) >= _LEAST_FRACTION * most]
    for component in names:
        row(component, [case.get(component, 0) for case in cases])
    rest = [sum(size for component, size in case.items() if component not in names) for case in cases]
    if any(rest):
        row("the rest", rest)
    row("[bold]sum[/]", [sum(case.values()) for case in cases])
    yield table


def _component_bytes(components: Components) -> Iterator[RenderableType]:
    total = components.total
    unit, name = _unit(total.optimizer)
    yield _heading(f"Components of the model, whole and once, {name}")
    table = _table("component", "parameters", "share", "weights", "gradients", "optimizer")
    for row in (*components.rows, total):
        if row.parameters:
            sizes = (f"{size / unit:.2f}" for size in (row.weights, row.gradients, row.optimizer))
            share = f"{row.parameters / total.parameters:.1%}"
            table.add_row(_row_name(row, total), f"{row.parameters:,}", share, *sizes)
    yield table
    if components.update_flops is not None:
        yield _note(
            f"the update: {components.update_flops:,} FLOPs, {components.update_flops / total.parameters:.4g} each"
        )


def _component_flops(components: Components) -> Iterator[RenderableType]:
    total = components.total
    yield _heading("FLOPs of a forward pass over one document; backward: twice as many")
    table = _table("component", *(text for n in components.lengths for text in (f"{n:,} tokens", "share")))
    for row in (*components.rows, total):
        if row.flops:
            pairs = zip(components.lengths, row.flops, total.flops, strict=True)
            cells = [(f"{n * flops:.4e}", f"{flops / most:.1%}") for n, flops, most in pairs]
            table.add_row(_row_name(row, total), *(text for cell in cells for text in cell))
    yield table
    yield _note("attention: queries times keys, and their weights times values, of all pairs of tokens, masked or not;")
    yield _note("in a sliding layer, of those less than sliding_window apart")
    for index, n in enumerate(components.lengths):
        both_ways, estimate = 3 * total.flops[index], components.flops_6n(index)
        yield _note(f"a token of {n:,}, both ways: {both_ways:,}, as mfu counts; {estimate:,} as 6 N + attention")


def _row_name(row: Component, total: Component) -> str:
    return "[bold]sum[/]" if row is total else row.name


def _groups(plan: RunPlan) -> Iterator[RenderableType]:
    yield _heading("Who works with whom, and what a rank sends in a step")
    table = _table("axis", "groups", "of", "sent", "ranks of the first groups")
    table.columns[-1].justify = "left"
    for axis, groups in plan.groups.items():
        sent = max(rank.traffic_bytes.get(axis, 0) for rank in plan.ranks)
        if sent and axis != "world":
            table.add_row(axis, f"{groups.count:,}", str(groups.size), human_bytes(sent), _first_groups(groups))
    yield table


def _first_groups(groups: GroupTable) -> str:
    shown = [_ranks(groups.group(index)) for index in range(min(3, groups.count))]
    return "   ".join(shown) + ("   ..." if groups.count > len(shown) else "")


def _ranks(ranks: range) -> str:
    """0 1 2 3, or 0 8 .. 504."""
    return " ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} {ranks[1]} .. {ranks[-1]}"


def _clock(clock: ClockPlan) -> Iterator[RenderableType]:
    yield _heading(f"A step on {clock.device}, predicted")
    yield _note(
        f"{clock.seconds_per_step * 1e3:,.0f} ms; {clock.tokens_per_gpu_second:,.0f} tokens/s a GPU; MFU "
        f"{clock.mfu:.1%}, {clock.mfu_causal:.1%} with half of attention; tflops {clock.tflops:.0f}"
    )
    yield _note(f"attention: {clock.attention}, over {clock.keys_per_query:,.0f} keys a query, {clock.documents}")
    table = _table("what takes time", "ms", "share")
    for name, seconds in clock.terms.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / clock.seconds_per_step:.1%}")
    yield table
    for term in clock.expensive:
        yield _note(f"{term.term}, {term.seconds / clock.seconds_per_step:.1%}: {term.change}")
    if clock.buckets:
        yield _heading("Buckets: what is left of reduce-scatter and gather where nothing hides it")
        table = _table("reduce_bucket_size", "buckets", "reduce-scatter, ms", "gather, ms", "exposed")
        for size in clock.buckets:
            waits = (f"{seconds * 1e3:.2f}" for seconds in (size.scatter, size.gather))
            table.add_row(f"{size.elements / 2**20:,.4g} M", str(size.count), *waits, f"{size.fraction:.1%}")
        yield table
    yield _heading("What each change gives, on top of those above it")
    yield changes_table(clock)


def changes_table(clock: ClockPlan) -> Table:
    table = _table("change", "step, ms", "MFU")
    for change in clock.changes:
        table.add_row(change.change, f"{change.seconds_per_step * 1e3:,.1f}", f"{change.mfu:.1%}")
    return table


def _batches(plan: RunPlan) -> Iterator[RenderableType]:
    yield _heading("First batches, as the step lines will print them")
    table = _table("step", "tokens", "num_samples_in_batch", "largest_length", "largest_batch", "smallest_batch")
    for figures in plan.batches:
        step, tokens, *others = dataclasses.astuple(figures)
        table.add_row(str(step), f"{tokens:,}", *map(str, others))
    yield table
