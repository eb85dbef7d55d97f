"""A plan for a terminal: what the run is, what a rank holds, keeps and sends, who works with whom, the first batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from internlm_lite.planner.report import GroupTable, Plan, RankPlan
from internlm_lite.units import human_bytes, human_count, human_seconds

_LEAST_SHARE = 0.005
"""Components of activations below this share are shown together."""
_MOST_POSITIONS = 8
"""Pipeline positions with a line of their own; the middle of longer pipelines is left out."""


def render(plan: Plan) -> RenderableType:
    """About two screens."""
    parts: list[RenderableType] = [_title(plan), _run(plan), _memory(plan), _activations(plan), _groups(plan)]
    parts += [_batches(plan), *(Text(f"note: {note}", style="dim") for note in plan.notes)]
    return Group(*parts)


def _table(title: str, *columns: str, note: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, caption=note, caption_justify="left"
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _title(plan: Plan) -> Text:
    sizes, layout = plan.sizes, plan.layout
    text = Text(f"{plan.job}", style="bold green")
    text.append(f"  {sizes.world} ranks = dp {sizes.dp} x tp {sizes.tp} x pp {sizes.pp}", "bold")
    rest = [
        f"zero {sizes.zero} x {sizes.replica}",
        str(layout["dtype"]).removeprefix("torch."),
        str(layout["attention"]),
    ]
    if layout["schedule"]:
        rest.insert(1, f"{layout['schedule']}, {layout['stages']} stages")
    if layout["sequence_parallel"]:
        rest.insert(1, "sequence parallel")
    return text.append(f"   {' · '.join(rest)}", "not bold default")


def _run(plan: Plan) -> Table:
    grid = Table.grid(padding=(0, 2))
    seconds, days = plan.seconds_per_step, plan.days
    speed = "give --tflops X for times"
    if seconds is not None and days is not None:
        speed = f"{human_seconds(seconds)} a step, {days:.2f} days at {plan.tflops_per_gpu:g} TFLOP/s per GPU"
    for name, value in (
        ("parameters", f"{plan.parameters_total:,}"),
        ("tokens", f"{plan.tokens_per_step:,} a step, {human_count(plan.tokens_total)} in {plan.steps_total:,} steps"),
        ("FLOPs", f"{plan.flops_per_step:.4e} a step, {plan.flops_per_step / plan.tokens_per_step:.4e} a token"),
        ("time", speed),
        ("bubble", f"{plan.bubble_fraction:.1%} of the step (backward twice as long as forward, sending free)"),
    ):
        grid.add_row(Text(name, style="dim"), value)
    return grid


def _memory(plan: Plan) -> Table:
    unit, name = _unit(max(rank.bytes.peak for rank in plan.ranks))
    shares = sorted({rank.zero_elements for rank in plan.ranks})
    table = _table(
        f"memory of a rank, {name}",
        *("pp", "ranks", "layers", "elements", "weights", "grads", "optimizer", "activations", "other", "peak"),
        note="optimizer: of "
        + " to ".join(f"{share:,}" for share in dict.fromkeys((shares[0], shares[-1])))
        + " elements; other: receive buffers, and an estimate of what one computation takes",
    )
    positions = list(_positions(plan))
    for index, (rank, places, count) in enumerate(positions):
        if _MOST_POSITIONS // 2 < index < len(positions) - _MOST_POSITIONS // 2:
            if index == _MOST_POSITIONS // 2 + 1:
                table.add_row(*["..."] * len(table.columns))
            continue
        sizes = rank.bytes
        parts = (sizes.weights, sizes.gradients, sizes.optimizer, sizes.activations, sizes.buffers + sizes.workspace)
        table.add_row(
            places,
            str(count),
            " ".join(f"{start}-{stop - 1}" for start, stop in rank.layers),
            f"{rank.parameters:,}",
            *(f"{part / unit:.2f}" for part in parts),
            f"[bold]{sizes.peak / unit:.2f}",
        )
    return table


def _unit(most: int) -> tuple[int, str]:
    """In which to write sizes of up to `most` bytes."""
    return (2**30, "GiB") if most >= 2**29 else (2**20, "MiB")


def _positions(plan: Plan) -> Iterator[tuple[RankPlan, str, int]]:
    """(a rank, pipeline positions like it, how many ranks they are); neighbours that hold and keep the same are joined."""
    firsts = [next(group) for _, group in groupby(plan.ranks, key=lambda rank: rank.pp)]
    for _, group in groupby(firsts, key=lambda rank: (rank.parameters, rank.bytes)):
        ranks = list(group)
        places = str(ranks[0].pp) if len(ranks) == 1 else f"{ranks[0].pp}-{ranks[-1].pp}"
        yield ranks[0], places, plan.sizes.world // plan.sizes.pp * len(ranks)


def _activations(plan: Plan) -> Table:
    cases = [plan.activations[name] for name in ("off", "configured", "all")]
    most = max(sum(case.values()) for case in cases)
    unit, name = _unit(most)
    configured = int(plan.layout["recomputed_layers"])
    columns = ("component", "none", f"{configured}, this run", "all")
    table = _table(f"activations of the fullest rank, {name}, by how many layers are recomputed", *columns)

    def row(name: str, sizes: Sequence[int]) -> None:
        table.add_row(name, *(f"{size / unit:.2f}" for size in sizes))

    names = [name for name in cases[0] if max(case.get(name, 0) for case in cases) >= _LEAST_SHARE * most]
    for component in names:
        row(component, [case.get(component, 0) for case in cases])
    rest = [sum(size for component, size in case.items() if component not in names) for case in cases]
    if any(rest):
        row("the rest", rest)
    row("[bold]sum", [sum(case.values()) for case in cases])
    return table


def _groups(plan: Plan) -> Table:
    table = _table("who works with whom, and what a rank sends in a step", "axis", "groups", "of", "sent", "ranks")
    table.columns[-1].justify = "left"
    for axis, groups in plan.groups.items():
        sent = max(rank.traffic.get(axis, 0) for rank in plan.ranks)
        if axis not in ("world", "dp") and groups.size > 1:
            table.add_row(axis, str(groups.count), str(groups.size), human_bytes(sent), _first_groups(groups))
    return table


def _first_groups(groups: GroupTable) -> str:
    shown = [_ranks(groups.group(index)) for index in range(min(3, groups.count))]
    return "   ".join(shown) + ("   ..." if groups.count > len(shown) else "")


def _ranks(ranks: range) -> str:
    """0 1 2 3, or 0 8 .. 504."""
    return " ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} {ranks[1]} .. {ranks[-1]}"


def _batches(plan: Plan) -> Table:
    table = _table("first batches", "step", "labels learnt", "samples", "longest", "most in a row", "fewest in a row")
    for figures in plan.batches:
        step, tokens, *others = dataclasses.astuple(figures)
        table.add_row(str(step), f"{tokens:,}", *map(str, others))
    return table
