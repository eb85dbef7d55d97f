"""loss.png: panels for loss and perplexity of all data and for the loss of each folder, with all runs overlaid.

Training is a line, an evaluation a point: of validation data joined by dashes and dots, of training data by dots.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.errors import ConfigError, MissingPackageError, StorageError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Colours of runs; distinguishable with colour blindness."""
SMOOTHING = 0.9
_CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
_RAW_BELOW = 30
"""Curves with fewer points are drawn without smoothing."""

AXES = {"step": "step", "epoch": "epochs", "tokens": "tokens"}
"""What a figure may be drawn over, and the label of the axis."""


@dataclass(frozen=True)
class _Panel:
    """One part of the figure. The functions may return None: no value."""

    title: str
    curve: Callable[[Mapping[str, Any]], Sequence[float | None]]
    """Of the `series` of a run."""
    checks: Mapping[str, Callable[[Mapping[str, Any]], float | None]]
    """Line style -> value of an evaluation."""


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_figure(payload: Mapping[str, Any], path: Path, over: str = "step") -> None:
    """Write the figure to `path` atomically, over one of AXES. Raises MissingPackageError without matplotlib,
    ConfigError if a run does not say how large its data are, StorageError."""
    if over == "epoch" and (unknown := [run for run in payload["runs"] if not run["epoch_tokens"]]):
        name = printable(unknown[0]["folder"])
        raise ConfigError(f"--over epoch: {name} does not say how many tokens its data have; take --over tokens")
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
            _figure(payload["runs"], over).savefig(temporary, dpi=110, format="png")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {printable(path)}: {error.strerror}; make room, or write elsewhere"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _figure(runs: Sequence[Mapping[str, Any]], over: str) -> Any:
    from matplotlib.figure import Figure

    folders = [pair for run in runs for pair in run["series"]["folders"].items()]
    names = list(dict.fromkeys(name for name, values in folders if any(loss is not None for loss in values["loss"])))
    panels = [_LOSS, _PERPLEXITY, *map(_folder_panel, names)]
    columns = min(6, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.0, 3.2 * columns), max(4.0, 2.3 * rows)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, runs, over)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:  # the lowest panel of each column
        axis.tick_params(labelbottom=True)
    if over == "epoch" and len({run["epoch_tokens"] for run in runs}) == 1:
        for axis in axes[:columns]:
            _add_tokens(axis, runs[0]["epoch_tokens"])
    figure.supxlabel(AXES[over], fontsize="small")
    handles, labels = axes[0].get_legend_handles_labels()
    if len(handles) > 1:
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _perplexity(check: Mapping[str, Any], key: str) -> float | None:
    loss = check[key]
    return None if loss is None or loss > 700 else math.exp(loss)


_LOSS = _Panel(
    "loss",
    lambda series: series.get("loss", []),
    {"-.": lambda check: check["loss"], ":": lambda check: check["train_loss"]},
)
_PERPLEXITY = _Panel(
    "perplexity",
    lambda series: series.get("perplexity", []),
    {"-.": lambda check: _perplexity(check, "loss"), ":": lambda check: _perplexity(check, "train_loss")},
)
_CHECKED = {"-.": "validation", ":": "training, evaluated"}


def _folder_panel(name: str) -> _Panel:
    return _Panel(
        name,
        lambda series: series["folders"].get(name, {}).get("loss", []),
        {"-.": lambda check: (check["folders"].get(name) or [None, None])[1]},
    )


def _draw(axis: Any, panel: _Panel, runs: Sequence[Mapping[str, Any]], over: str) -> None:
    for at, run in enumerate(runs):
        series, colour = run["series"], COLOURS[at % len(COLOURS)]
        place = _places(run, over)
        points = [(place(x), y) for x, y in zip(series["step"], panel.curve(series), strict=False) if y is not None]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if len(points) < _RAW_BELOW:
            axis.plot(xs, ys, color=colour, linewidth=1.4, marker="o", markersize=2.5, label=run["name"])
        else:
            axis.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.7)
            axis.plot(xs, smoothed(ys), color=colour, linewidth=1.4, label=run["name"])
        for style, read in panel.checks.items():
            checked = [(place(check["step"]), y) for check in run["validation"] if (y := read(check)) is not None]
            if checked:
                label = _CHECKED[style] if len(runs) == 1 else f"{run['name']}, {_CHECKED[style]}"
                axis.plot(*zip(*checked, strict=True), style, color=colour, linewidth=1.0, marker=".", label=label)
    axis.set_title(panel.title, fontsize="small", loc="left", parse_math=False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize="x-small")


def _places(run: Mapping[str, Any], over: str) -> Callable[[float], float]:
    """Step -> where it is on the axis."""
    if over == "step":
        return lambda step: max(step, 0)  # an evaluation before the first step is one after step -1
    series = run["series"]
    known = [(s, t) for s, t in zip(series["step"], series.get("num_consumed_tokens", []), strict=False) if t]
    steps, tokens = [-1, *(s for s, _ in known)], [0, *(t for _, t in known)]
    unit = run["epoch_tokens"] if over == "epoch" else 1
    return lambda step: float(np.interp(step, steps, tokens)) / unit


def _add_tokens(axis: Any, epoch_tokens: float) -> None:
    """A second axis above: the tokens trained on."""
    from matplotlib.ticker import EngFormatter

    above = axis.secondary_xaxis("top", functions=(lambda x: x * epoch_tokens, lambda x: x / epoch_tokens))
    above.xaxis.set_major_formatter(EngFormatter(sep=""))
    above.tick_params(labelsize="x-small")
    above.set_xlabel("tokens", fontsize="x-small")


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average with bias correction of the first values."""
    average, missing, result = 0.0, 1.0, []
    for value in values:
        average, missing = weight * average + (1 - weight) * value, missing * weight
        result.append(average / (1 - missing))
    return result
