"""What `--fit` found: a table, the keys of the best layout as overrides, and as a config file above the given one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from internlm_lite.apps.planner.clock import DTYPES
from internlm_lite.apps.planner.fit import USABLE, FittingLayout, Room
from internlm_lite.config.overrides import parse_overrides
from internlm_lite.errors import ConfigError
from internlm_lite.models.stages import model_flops_per_token
from internlm_lite.monitor.flops import mfu

_LEAST_SHARE = 0.01
"""Limits below this share of a step are not told."""
_TEXTS = ("pp", "cp", "recomputed", "what takes the time")
"""Columns that begin at the left."""
_RECOMPUTATION = {False: "nothing", True: "all layers", "selective": "selective", "offload": "offload"}


def fit_json(found: Sequence[FittingLayout], room: Room) -> dict[str, Any]:
    """{gpus, memory, usable, device, layouts}; of each layout, fastest first, {keys, seconds_per_step, tokens_per_step,
    tokens_per_gpu_second, mfu, limits, memory, bytes}. `memory`: share of it that the fullest rank fills; `bytes`: see
    `RankBytes`; `outside`: bytes that no tensor has (outside.py)."""
    layouts = [
        {
            "keys": one.layout.keys(),
            "seconds_per_step": one.step,
            "tokens_per_step": one.tokens,
            "tokens_per_gpu_second": one.tokens / one.step / room.gpus,
            "mfu": _mfu(one, room),
            "limits": one.shares(),
            "memory": (one.bytes.peak + one.outside) / room.memory,
            "bytes": {**vars(one.bytes), "peak": one.bytes.peak, "outside": one.outside},
        }
        for one in found
    ]
    return {
        "gpus": room.gpus,
        "memory": room.memory,
        "usable": room.usable,
        "device": room.device.name,
        "layouts": layouts,
    }


def render_fit(found: Sequence[FittingLayout], room: Room) -> RenderableType:
    """What comes before the overrides of the first layout."""
    title = Text(f"{len(found)} layouts that fit {room.gpus} GPUs, fastest first", style="bold green")
    title.append(f"  ({room.device.name}; {found[0].tokens:,} tokens a step, each sample one document)\n", "default")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
    for name in ("tp", "pp", "cp", "zero", "recomputed", "micro_bsz", "ms", "MFU", "GB", "what takes the time"):
        table.add_column(name, justify="left" if name in _TEXTS else "right")
    for one in found:
        table.add_row(*_cells(one, room))
    best = found[0]
    notes = [
        f"GB: of {room.memory / 1e9:.4g} on the fullest rank, of which {USABLE:.0%} may be filled; of the first one "
        f"{best.outside / 1e9:.1f} are CUDA's, NCCL's and cuBLAS' own",
        *_notes(best, room),
        "the first one as overrides:",
    ]
    return Group(title, table, *(Text(f"  {note}", style="dim") for note in notes))


def _cells(one: FittingLayout, room: Room) -> Iterator[str]:
    layout = one.layout
    schedule = "" if layout.pipeline == 1 else f" {one.config.schedule}"
    exchange = "" if layout.context == 1 else f" {layout.exchange}"
    limits = [f"{name} {share:.0%}" for name, share in one.shares().items() if share >= _LEAST_SHARE]
    yield from (str(layout.tensor), f"{layout.pipeline}{schedule}", f"{layout.context}{exchange}")
    yield str(layout.zero_stage)
    yield from (_RECOMPUTATION[layout.checkpoint], f"{layout.micro_bsz} x {layout.micro_num}")
    yield from (f"{one.step * 1e3:,.0f}", f"{_mfu(one, room):.1%}", f"{(one.bytes.peak + one.outside) / 1e9:.1f}")
    yield ", ".join(limits)


def _notes(best: FittingLayout, room: Room) -> Iterator[str]:
    if best.layout.checkpoint is not False or best.layout.zero_stage > 1:
        yield "memory limits the first one: with more it would recompute, send or gather less"
    if best.bytes.host:
        yield f"pinned memory of the host: {best.bytes.host / 1e9:.1f} GB a GPU"


def _mfu(one: FittingLayout, room: Room) -> float:
    config = one.config
    peak = room.device.peak_tflops[DTYPES.get(config.model.dtype, "fp32")] * 1e12
    flops = model_flops_per_token(config.model, config.data.seq_len, config.source_share)
    reached = mfu(flops, one.tokens, one.step, room.gpus, peak)
    assert reached is not None, "the peak is known"
    return reached


def overrides(found: FittingLayout) -> str:
    """As trailing arguments of train.py."""
    return " ".join(f"{key}={value}" for key, value in found.layout.keys().items())


def overlay(found: FittingLayout, base: Path, given: Sequence[str]) -> str:
    """The text of a config file above `base`, with the overrides `given`, and above them the keys of the layout."""
    asked = parse_overrides(given)
    for key, value in found.layout.keys().items():
        asked.layer.put(key, value, "")
    lines = [f"# The fastest layout that fits, by train.py --dry-run --fit: {found.step * 1e3:,.0f} ms a step.", ""]
    lines.append(f"_base_ = {json.dumps(str(base.resolve()))}")
    lines += [f"{name} = {_literal(value)}" for name, value in {**asked.variables, **asked.layer.values}.items()]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "dict(" + ", ".join(f"{key}={_literal(inner)}" for key, inner in value.items()) + ")"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def write_overlay(found: FittingLayout, base: Path, given: Sequence[str], path: Path) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(overlay(found, base, given), "utf-8")
    except OSError as error:
        raise ConfigError(f"--fit-out {path}: cannot be written: {error.strerror}; name another file") from None
