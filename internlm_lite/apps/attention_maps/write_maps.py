"""Attention maps as a file: a self-contained HTML page, or a picture drawn by matplotlib."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_lite.errors import ConfigError, MissingPackageError
from internlm_lite.units import escaped, human_bytes

TEMPLATE = Path(__file__).with_name("maps.html")
LARGEST_PAGE = 128 * 1024 * 1024
"""Bytes of weights; more is slow in a browser."""
LARGEST_PICTURE = 100_000_000
"""Pixels; viewers refuse much larger ones."""
_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
_IN_SCRIPT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
_DPI, _CELL, _MARGIN = 100, 0.14, 1.3  # inches of a token, and of the labels at one side


@dataclass(frozen=True)
class Maps:
    """`weights` [layers, heads, rows, columns] of tokens with these labels."""

    labels: Sequence[str]
    """Of rows, the tokens that look."""
    layers: Sequence[int]
    heads: Sequence[int]
    weights: torch.Tensor
    columns: Sequence[str] | None = None
    """Of the tokens that are looked at. None: those of the rows, each row up to its own."""
    title: str = ""
    """Stands before the number of the layer."""

    @property
    def looked_at(self) -> Sequence[str]:
        return self.labels if self.columns is None else self.columns

    @property
    def names(self) -> list[str]:
        return [f"{self.title} layer {layer}, head {head}".strip() for layer in self.layers for head in self.heads]

    @property
    def stored(self) -> torch.Tensor:
        """Which weights [rows, columns] the page holds: without the keys after a query."""
        shape = len(self.labels), len(self.looked_at)
        return torch.ones(shape, dtype=torch.bool).tril() if self.columns is None else torch.ones(shape).bool()


def check_target(path: Path) -> None:
    """Raises ConfigError unless the file is .html or .png, MissingPackageError for .png without matplotlib."""
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"--attention {path}: expected a file that ends in .html or .png")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            "--attention with .png needs matplotlib: pip install internlm_lite[report]; or give an .html file"
        )


def check_size(suffix: str, groups: Sequence[Maps]) -> None:
    """Raises ConfigError for more than a page or a picture can show; does not read the weights."""
    n_maps, n_tokens = sum(len(maps.names) for maps in groups), _most_tokens(groups)
    n_bytes = sum(2 * len(maps.names) * int(maps.stored.sum()) for maps in groups)
    pixels = math.prod(_grid(n_maps)) * (_side(n_tokens) * _DPI) ** 2
    found = ""
    if suffix == ".html" and n_bytes > LARGEST_PAGE:
        found = f"{human_bytes(n_bytes)}, more than {human_bytes(LARGEST_PAGE)}"
    if suffix == ".png" and pixels > LARGEST_PICTURE:
        found = f"{pixels / 1e6:.0f} megapixels, more than {LARGEST_PICTURE / 1e6:.0f}"
    if found:
        raise ConfigError(f"{n_maps} maps of {n_tokens} tokens: {found}; choose some with --layers and --heads")


def write_maps(groups: Sequence[Maps], path: Path) -> None:
    """Write the file atomically. Raises as `check_target`, ConfigError for more than a page or picture can show."""
    check_target(path)
    content = page(groups).encode() if path.suffix == ".html" else picture(groups)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def page(groups: Sequence[Maps]) -> str:
    """HTML that asks nothing of any network; a content security policy allows its own script and style alone."""
    check_size(".html", groups)
    data = json.dumps([_payload(maps) for maps in groups], separators=(",", ":")).translate(_IN_SCRIPT)
    template = TEMPLATE.read_text("utf-8")
    script, style = (template.split(f"<{name}>")[1].split(f"</{name}>")[0] for name in ("script", "style"))
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    return template.replace("POLICY", html.escape(policy), 1).replace("PAYLOAD", data, 1)


def _payload(maps: Maps) -> dict[str, object]:
    """The object of one group in the page."""
    numbers = (maps.weights.double() * 65535).round().to(torch.int32)
    return {
        "names": maps.names,
        "rows": [escaped(label) for label in maps.labels],
        "columns": [escaped(label) for label in maps.looked_at],
        "backward": maps.columns is None,
        "weights": base64.b64encode(numbers[:, :, maps.stored].numpy().astype("<u2").tobytes()).decode(),
    }


def picture(groups: Sequence[Maps]) -> bytes:
    """The PNG file: a grid of maps, each with the tokens at its sides."""
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    check_size(".png", groups)
    count = sum(len(maps.names) for maps in groups)
    rows, columns = _grid(count)
    side = _side(_most_tokens(groups))
    fonts = ["DejaVu Sans", *(name for name in _FONTS if name in set(font_manager.get_font_names()))]
    file = io.BytesIO()
    with rc_context({"font.family": fonts, "font.size": 6}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a missing glyph is drawn as a box
        figure = Figure(figsize=(columns * side, rows * side), layout="constrained")
        axes = iter(figure.subplots(rows, columns, squeeze=False).ravel())
        for maps in groups:
            for name, weights in zip(maps.names, maps.weights.flatten(0, 1), strict=True):
                _draw(next(axes), name, maps, weights)
        for axis in axes:
            axis.set_axis_off()
        figure.savefig(file, dpi=_DPI, format="png")
    return file.getvalue()


def _draw(axis: Any, name: str, maps: Maps, weights: torch.Tensor) -> None:
    axis.imshow(weights.double().numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axis.set_title(name, fontsize=8)
    across, down = ([escaped(label)[:12] for label in labels] for labels in (maps.looked_at, maps.labels))
    axis.set_xticks(range(len(across)), across, rotation=90)
    axis.set_yticks(range(len(down)), down)
    axis.tick_params(length=0)
    for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]:
        label.set_parse_math(False)


def _grid(count: int) -> tuple[int, int]:
    """(rows, columns)"""
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def _most_tokens(groups: Sequence[Maps]) -> int:
    """At a side of a map."""
    return max(max(len(maps.labels), len(maps.looked_at)) for maps in groups)


def _side(n_tokens: int) -> float:
    """Inches of a map in a picture."""
    return max(n_tokens * _CELL + _MARGIN, 2.5)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
