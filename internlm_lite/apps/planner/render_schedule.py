"""`train.py --print-config schedule`: learning rate, momenta and batch size over the run, as curves and a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from internlm_lite.config.batch_sizes import with_warmup_steps
from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.demand import with_total_steps
from internlm_lite.mesh.mesh import sizes_of
from internlm_lite.optim.planned_schedule import PlannedSchedule, borders, planned_schedule
from internlm_lite.units import human_count

_WIDTH, _HEIGHT = 64, 8
_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_MOST_ROWS = 40


def render_schedule(config: Config, world_size: int) -> RenderableType:
    """Raises MeshError if `world_size` ranks cannot be laid out, ConfigError as `with_warmup_steps`, DataError if the
    number of steps comes from the data, and these are missing."""
    parallel = config.parallel
    dp_size = sizes_of(world_size, parallel.tensor, parallel.pipeline.size, parallel.zero1, parallel.context.size).dp
    if config.data.epochs is not None or config.data.total_tokens is not None:
        data = open_training_data(config.data, config.model.vocab_sizes, 0, dp_size, config.seed, config.stages)
        config = with_total_steps(config, data)
    config = with_warmup_steps(config, dp_size)
    planned = planned_schedule(config, dp_size)
    momentum = "momentum" if config.optimizer.name in ("sgd", "muon") else "beta1"
    curves: dict[str, Sequence[float]] = {
        "lr": planned.lr,
        momentum: planned.momentum,
        "beta2": planned.beta2,
        "batch tokens": planned.batch_tokens,
    }
    parts: list[RenderableType] = []
    for name, values in curves.items():
        parts += _curve(name, planned.step, values)
    last = f"steps 0 to {planned.step[-1]:,} on {dp_size} data-parallel ranks; the step line shows the next step's lr"
    return Group(*parts, Text(last, style="dim"), _table(config, planned, momentum))


def _curve(name: str, steps: Sequence[int], values: Sequence[float]) -> Iterator[RenderableType]:
    """A plot if the values change, else one line."""
    least, most = min(values), max(values)
    if least == most:
        yield Text.assemble((f"{name} ", "bold"), f"{most:g} throughout")
        return
    yield Text.assemble((name, "bold"), f"  {least:g} to {most:g}")
    levels = [max(1, round((value - least) / (most - least) * _HEIGHT * 8)) for value in _columns(steps, values)]
    for row in reversed(range(_HEIGHT)):
        yield Text("  " + "".join(_BLOCKS[min(8, max(0, level - row * 8))] for level in levels).rstrip(), no_wrap=True)


def _columns(steps: Sequence[int], values: Sequence[float]) -> list[float]:
    """The value at the step of each column; between two shown steps on the line that joins them."""
    found, at = [], 0
    for column in range(_WIDTH):
        step = steps[-1] * column / (_WIDTH - 1)
        while at + 2 < len(steps) and steps[at + 1] <= step:
            at += 1
        left, right = at, min(at + 1, len(steps) - 1)
        share = (step - steps[left]) / max(1, steps[right] - steps[left])
        found.append(values[left] + (values[right] - values[left]) * share)
    return found


def _table(config: Config, planned: PlannedSchedule, momentum: str) -> Table:
    """Steps at which a part of the curve or another batch size begins, those halfway between them, and the last."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "lr", momentum, "beta2", "batch tokens", "tokens before", ""):
        table.add_column(name, justify="left" if not name else "right")
    names = {step: name for name, step in borders(config).items()}
    pairs = pairwise(zip(planned.step, planned.batch_tokens, strict=True))
    sizes = [step for (_, before), (step, size) in pairs if before != size]
    corners = sorted({0, planned.step[-1], *names, *sizes[:_MOST_ROWS]})
    wanted = sorted({*corners, *((a + b) // 2 for a, b in pairwise(corners))})
    for index, step in enumerate(planned.step):
        if index + 1 < len(planned.step) and not any(step <= one < planned.step[index + 1] for one in wanted):
            continue
        numbers = [f"{planned.lr[index]:.6g}", f"{planned.momentum[index]:g}", f"{planned.beta2[index]:.6g}"]
        tokens = [f"{planned.batch_tokens[index]:,}", human_count(planned.tokens[index])]
        table.add_row(f"{step:,}", *numbers, *tokens, names.get(step, ""))
    return table
