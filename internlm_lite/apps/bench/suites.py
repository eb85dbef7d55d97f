"""The suites of benchmarks that `internlm-lite bench` runs, their shapes, and their results as tables."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from internlm_lite.apps.bench.averages import bench_averages
from internlm_lite.apps.bench.checkpoint import bench_saves, bench_writer
from internlm_lite.apps.bench.context_cost import bench_context
from internlm_lite.apps.bench.data_loading import bench_loader
from internlm_lite.apps.bench.gpu.step_speed import SHAPES as GPU_SHAPES
from internlm_lite.apps.bench.launches import count_launches
from internlm_lite.apps.bench.layouts import bench_layouts, worlds, zero_worlds
from internlm_lite.apps.bench.metrics_cost import bench_metrics
from internlm_lite.apps.bench.muon_cost import SHAPES as MUON_SHAPES
from internlm_lite.apps.bench.muon_cost import bench_muon, bench_training
from internlm_lite.apps.bench.ranks import bench_ranks
from internlm_lite.apps.bench.single import SHAPES, bench_single
from internlm_lite.apps.bench.step import bench_step
from internlm_lite.apps.bench.worlds import device_of
from internlm_lite.config.load import load_config
from internlm_lite.config.schema import Config
from internlm_lite.monitor.sinks import SinkFactory
from internlm_lite.runtime.device import device_name

CORPORA = ((100, 50_000_000), (800, 1_000_000_000))
"""(mean document length, tokens): the second writes 2 GB to the temporary folder."""
CPU_SHAPE = {"hidden": 384, "layers": 6, "heads": 6, "vocab": 8192, "seq_len": 512, "micro_bsz": 2, "micro_num": 2}
SAVED_SHAPE = {**CPU_SHAPE, "layers": 8, "vocab": 12032, "micro_num": 1, "dtype": "torch.float32"}
"""Weights and moments of 281 MB, trained on 1024 tokens per step and rank."""
GPU_SHAPE = {"hidden": 2048, "layers": 16, "heads": 16, "vocab": 32768, "seq_len": 2048, "micro_bsz": 4, "micro_num": 2}


def shape_for(gpus: int) -> dict[str, Any]:
    """Shape of model and batch for benchmarks that use `gpus` GPUs; a smaller one for the CPU if there are fewer."""
    on_gpus = device_of(0, gpus).type == "cuda"
    return {**GPU_SHAPE, "dtype": "torch.bfloat16"} if on_gpus else {**CPU_SHAPE, "dtype": "torch.float32"}


def machine() -> dict[str, Any]:
    """The machine and versions of a measurement; each result says itself whether it used GPUs."""
    return {
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run_basics(only: str | None, rounds: int) -> dict[str, Any]:
    """Results of step, ranks and loader, or of `only` one of them, as plain JSON values."""
    results: dict[str, Any] = {"machine": machine()}
    if only in (None, "loader"):
        with tempfile.TemporaryDirectory() as folder:
            results["loader"] = [
                asdict(bench_loader(Path(folder, str(length)), n_tokens, length)) for length, n_tokens in CORPORA
            ]
    if only in (None, "step"):
        results["step"] = asdict(bench_step(device_of(0, 1), rounds, **shape_for(1)))
    if only in (None, "ranks"):
        results["ranks"] = asdict(bench_ranks(2, rounds, **shape_for(2)))
    return results


def run_layouts(rounds: int) -> dict[str, Any]:
    """Results of the layouts, with 4 micro-batches per step, as plain JSON values."""
    shape = {**shape_for(2), "micro_num": 4}
    gpus = torch.cuda.device_count()
    most_ranks = gpus if gpus >= 2 else 4  # fewer GPUs: all on the CPU
    results: dict[str, Any] = {"machine": machine(), "shape": shape}
    chosen = [world for world in worlds() if world.ranks <= most_ranks]
    results["layouts"] = [asdict(row) for row in bench_layouts(chosen, rounds, **shape)]
    if gpus:
        results["single"] = [asdict(row) for row in bench_single(SHAPES, "torch.bfloat16", rounds)]
    return results


def run_zero(rounds: int) -> dict[str, Any]:
    """Results of the stages of ZeRO on 4 ranks, a model of 100M parameters on CPUs."""
    on_cpu = {**MUON_SHAPES["100M"], "seq_len": 256, "micro_bsz": 1, "dtype": "torch.float32"}
    shape = {**(shape_for(4) if device_of(0, 4).type == "cuda" else on_cpu), "micro_num": 4}
    rows = [asdict(row) for row in bench_layouts(zero_worlds(4), rounds, **shape)]
    return {"machine": machine(), "shape": shape, "layouts": rows}


def run_context(rounds: int) -> dict[str, Any]:
    """Results of context parallelism, four rows of one document each a step."""
    shape = {**shape_for(2), "micro_bsz": 1, "micro_num": 4}
    shape["seq_len"] *= 4
    return {"machine": machine(), "shape": shape, "context": [asdict(row) for row in bench_context(rounds, **shape)]}


def run_checkpoint(rounds: int) -> dict[str, Any]:
    """Results of checkpoints in the temporary folder (TMPDIR); those of the writer also in memory."""
    results: dict[str, Any] = {"machine": machine(), "shape": SAVED_SHAPE}
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, "writer")]
        if (memory := Path("/dev/shm")).is_dir():
            folders.append(memory / Path(folder).name)
        results["writer"] = [asdict(bench_writer(place, 280, rounds)) for place in folders]
        results["saves"] = [
            asdict(row) for size in (1, 2) for row in bench_saves(size, rounds, Path(folder), **SAVED_SHAPE)
        ]
    return results


def run_metrics(rounds: int, sinks: Mapping[str, SinkFactory]) -> dict[str, Any]:
    """Results of the cost of monitoring. `sinks`: in addition to those of the config."""
    with tempfile.TemporaryDirectory() as folder:
        result = bench_metrics(device_of(0, 1), rounds, Path(folder), sinks, **shape_for(1))
    return {"machine": machine(), "metrics": asdict(result)}


def run_averages(rounds: int) -> dict[str, Any]:
    """Results of the cost of an average of the weights."""
    return {"machine": machine(), "averages": asdict(bench_averages(device_of(0, 1), rounds, **shape_for(1)))}


def run_launches() -> dict[str, Any]:
    """Launches of a step of the GPU check's models."""
    shapes = {name: {**GPU_SHAPES[name], "layers": layers} for name, layers in (("1b", 24), ("7b", 32))}
    rows = [asdict(row) for name, shape in shapes.items() for row in count_launches(name, **shape)]
    return {"machine": machine(), "launches": rows}


def run_muon(rounds: int) -> dict[str, Any]:
    """Results of steps of Muon and AdamW."""
    device = device_of(0, 1)
    dtype = "torch.bfloat16" if device.type == "cuda" else "torch.float32"
    return {"machine": machine(), "muon": [asdict(row) for row in bench_muon(device, rounds, dtype)]}


def run_muon_demo(config_file: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Results of runs of Muon and AdamW with rows of half the demo's length. `folder`: the demo's, with its tokens.

    Raises ConfigError or DataError."""
    always = [f"DEMO_FOLDER={folder}", "SEQ_LEN=128"]

    def load(overrides: Sequence[str]) -> Config:
        return load_config(config_file, [*always, *overrides]).config

    rows = [asdict(row) for row in bench_training(load, steps, folder / "bench")]
    return {"machine": machine(), "muon": rows}


def show(results: dict[str, Any]) -> None:
    """Print results as tables: lists as rows, single results as two columns."""
    console = Console()
    for name, found in results.items():
        if isinstance(found, list):
            table = Table(*found[0], title=name, title_justify="left")
            for row in found:
                table.add_row(*map(format_value, row.values()))
        else:
            table = Table("figure", "value", title=name, title_justify="left")
            for key, value in found.items():
                table.add_row(key, format_value(value))
        console.print(table)


def format_value(value: float | int | str | None) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
