"""What a GPU and its links can do, as a JSON file: `--device NAME` takes one of devices/, `--device FILE` a user's.

The figures of one H100 were measured (docs/benchmarks); for other devices its fractions are applied to data sheets.
`sources` says where each figure comes from.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from internlm_lite.errors import ConfigError

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Directions(_Strict):
    """TFLOP/s, causal: half of the pairs of tokens."""

    forward: Rate
    backward: Rate


class Link(_Strict):
    """Of one GPU: what a collective over many of them reaches."""

    gb_per_s: Rate
    latency_us: Rate


class KernelFractions(_Strict):
    """Bandwidth of kernels as a fraction of that of a copy, by how they go through memory."""

    elementwise: Share
    """Whole tensors, element by element."""
    broadcast: Share
    """One operand is a row, a column, a scalar, or of another dtype."""
    strided: Share
    """Operands that are not contiguous."""
    contiguous_copy: Share
    """Copies, concatenations, zeros, and casts to a narrower dtype."""
    strided_copy: Share
    cast: Share
    """To a wider dtype."""
    roll: Share
    norm: Share
    """Layer norms by torch's own kernels, both ways."""
    reduce: Share
    """Sums and maxima."""
    update: Share
    """The fused optimizer."""
    accumulate: Share
    """The fp32 gradient that a matrix product reads and writes."""
    fused: Share
    """Kernels made by torch.compile."""


class DeviceFile(_Strict):
    """The keys of a device file."""

    name: str
    peak_tflops: dict[str, Rate]
    """Data sheet, dense, by dtype: bf16 (also for fp16), tf32, fp32, fp8."""
    product_fraction: Share
    """Of the peak, by large matrix products inside a training step."""
    attention_tflops: dict[str, Directions]
    """By kernel: varlen (flash-attn 2, torch), cudnn (also the reference), flash_attn_3, flash_attn_4."""
    copy_tb_per_s: Rate
    kernel_fraction: KernelFractions
    launch_us: Rate
    """Gap between two kernels."""
    gpus_per_node: Annotated[int, Field(gt=0)]
    memory_gib: Rate | None = None
    """What a process can use of the device's memory; None: not said."""
    intra_node: Link
    inter_node: Link
    host_link: Link = Link(gb_per_s=25, latency_us=10)
    """Between a GPU and pinned memory of its host, one way."""
    sources: dict[str, str] = {}
    """Key -> where its figure comes from."""

    def passes_seconds(self, kind: str, n_bytes: float) -> float:
        """Of kernels of a kind of `KernelFractions`."""
        if not n_bytes:
            return 0.0
        fraction: float = getattr(self.kernel_fraction, kind)
        return n_bytes / (self.copy_tb_per_s * 1e12 * fraction)


_BUILT_IN = files("internlm_lite.apps.planner").joinpath("devices")


def device_names() -> list[str]:
    return sorted(entry.name.removesuffix(".json") for entry in _BUILT_IN.iterdir() if entry.name.endswith(".json"))


def device_of(gpu: str) -> DeviceFile | None:
    """The built-in device of a GPU's name, such as "NVIDIA H100 80GB HBM3"."""
    return next((load_device(name) for name in device_names() if name in gpu.lower()), None)


def load_device(name: str) -> DeviceFile:
    """The built-in device of that name, or the file. Raises ConfigError."""
    known = device_names()
    if name.lower() in known:
        return _parse(name, _BUILT_IN.joinpath(f"{name.lower()}.json").read_text("utf-8"))
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--device {name}: expected auto, cpu or cuda, one of {', '.join(known)}, or a JSON file of a device; "
            "found no such file"
        )
    try:
        return _parse(name, path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--device {name}: cannot be read: {error}") from None


def _parse(name: str, text: str) -> DeviceFile:
    try:
        return DeviceFile.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"--device {name}, line {error.lineno}: expected JSON: {error.msg}") from None
    except ValidationError as error:
        problems = [_problem(dict(one)) for one in error.errors(include_url=False)]
        text = f"keys and units: {DeviceFile.__module__.replace('.', '/')}.py; examples: {', '.join(device_names())}"
        raise ConfigError("\n".join([f"--device {name}: {problem}" for problem in problems] + [text])) from None


_OTHERS = {
    "name": "a text",
    "peak_tflops": "an object of numbers by dtype",
    "attention_tflops": "an object of {forward, backward} by kernel",
    "kernel_fraction": f"an object of {', '.join(KernelFractions.model_fields)}",
    "gpus_per_node": "a whole number above 0",
    **dict.fromkeys(("intra_node", "inter_node", "host_link"), "an object of gb_per_s and latency_us"),
    "sources": "an object of texts",
}
"""What a key of a file holds that is no number."""


def _problem(error: dict[str, Any]) -> str:
    if not error["loc"]:
        return "expected a JSON object"
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{key} is missing, expected {_expected(error['loc'])}"
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key"
    return f"{key}: found {error['input']!r}, expected {_expected(error['loc'])}"


def _expected(loc: tuple[int | str, ...]) -> str:
    """What a key holds, in words."""
    if loc[0:1] == ("product_fraction",) or (len(loc) == 2 and loc[0] == "kernel_fraction"):
        return "a number above 0, up to 1"
    if len(loc) == 2 and loc[0] == "attention_tflops":
        return "an object of forward and backward"
    return _OTHERS.get(str(loc[0]), "a number above 0") if len(loc) == 1 else "a number above 0"
