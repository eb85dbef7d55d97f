"""loss.png: one panel for the loss of all data and one per folder, with all runs overlaid."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.errors import MissingPackageError, StorageError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Colours of runs; distinguishable with colour blindness."""
SMOOTHING = 0.9
_CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
_RAW_BELOW = 30
"""Curves with fewer points are drawn without smoothing."""


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_figure(payload: Mapping[str, Any], path: Path) -> None:
    """Write the figure to `path` atomically. Raises MissingPackageError without matplotlib, StorageError."""
    try:
        from matplotlib import font_manager, rc_context
    except ImportError as error:
        raise MissingPackageError("loss.png needs matplotlib: pip install internlm_lite[report]") from error
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _CHINESE if name in installed)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with rc_context({"font.family": fonts}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a missing glyph is drawn as a box
            _figure(payload["runs"]).savefig(temporary, dpi=110, format="png")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {printable(path)}: {error.strerror}; make room, or write elsewhere"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _figure(runs: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    folders = [pair for run in runs for pair in run["series"]["folders"].items()]
    names = list(dict.fromkeys(name for name, values in folders if any(loss is not None for loss in values["loss"])))
    columns = min(6, math.ceil(math.sqrt(len(names) + 1)))
    rows = math.ceil((len(names) + 1) / columns)
    figure = Figure(figsize=(max(6.0, 3.2 * columns), max(4.0, 2.3 * rows)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, name in zip(axes, [None, *names], strict=False):
        _draw(axis, name, runs)
    for axis in axes[len(names) + 1 :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(names) + 1 - columns) : len(names) + 1]:  # the lowest panel of each column
        axis.tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize="small")
    if len(runs) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw(axis: Any, name: str | None, runs: Sequence[Mapping[str, Any]]) -> None:
    """Draw one panel: the loss of a folder, or the training loss of all data if `name` is None."""
    for at, run in enumerate(runs):
        series, colour = run["series"], COLOURS[at % len(COLOURS)]
        loss = series.get("loss", []) if name is None else series["folders"].get(name, {}).get("loss", [])
        points = [(x, y) for x, y in zip(series["step"], loss, strict=False) if y is not None]
        steps, losses = [x for x, _ in points], [y for _, y in points]
        if len(points) < _RAW_BELOW:
            axis.plot(steps, losses, color=colour, linewidth=1.4, marker="o", markersize=2.5, label=run["name"])
            continue
        axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.7)
        axis.plot(steps, smoothed(losses), color=colour, linewidth=1.4, label=run["name"])
    axis.set_title("loss" if name is None else name, fontsize="small", loc="left", parse_math=False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize="x-small")


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average with bias correction of the first values."""
    average, missing, result = 0.0, 1.0, []
    for value in values:
        average, missing = weight * average + (1 - weight) * value, missing * weight
        result.append(average / (1 - missing))
    return result
