"""How fast is a whole training step: tokens per second, MFU, memory, and the kernels it consists of."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.bench import step as bench_step
from internlm_lite.apps.bench.gpu import variants
from internlm_lite.apps.bench.gpu.correctness import installed
from internlm_lite.apps.bench.gpu.measurement import Check
from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.timing import Side
from internlm_lite.config.schema import Config
from internlm_lite.layers.fp8 import has_float8
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.stages import model_flops_per_token
from internlm_lite.monitor.flops import mfu
from internlm_lite.runtime.device import device_name, peak_flops

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden": 2048, "layers": 24, "heads": 16, "vocab": 50304, "seq_len": 2048, "micro_bsz": 4, "micro_num": 2},
    "7b": {"hidden": 4096, "layers": 8, "heads": 32, "vocab": 103168, "seq_len": 4096, "micro_bsz": 2, "micro_num": 2},
}
SHAPES["7bhalf"] = {**SHAPES["7b"], "layers": 4}
"""The difference to "7b" is the time of four layers."""
_TINY = {"hidden": 64, "layers": 2, "heads": 2, "vocab": 256, "seq_len": 32, "micro_bsz": 2, "micro_num": 2}
_BUCKET = 64 * 1024**2
_KINDS = {
    "attention": ("flash", "fmha", "cudnn"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma"),
    "optimizer": ("adam", "multi_tensor"),
    "copy, cat, fill": ("copy", "cat", "fill", "memcpy", "memset", "roll"),
    "reduce, norm": ("reduce", "norm", "softmax"),
    "elementwise": ("elementwise", "silu", "vectorized", "triton"),
}
"""Words in the name of a kernel; the first kind that fits."""


def perf(check: Check, shape: str, variant: str) -> None:
    """Median step with a wait after each, and steps without: what the host needs to start one, and what one takes."""
    if "liger" in variant and not installed("liger_kernel"):
        check.tell("not measured: liger-kernel is not installed")
        return
    if "fp8" in variant and not has_float8(check.device):
        check.tell("not measured: this GPU has no products in float8")
        return
    config, side, built = _build(check, shape, variant)
    begin = time.perf_counter()
    outcome: Any = side.step()
    check.synchronize()
    first = time.perf_counter() - begin
    norm = float(getattr(outcome, "norm_model_dtype", outcome))
    rounds = 2 if check.smoke else 6
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        side.step()
        check.synchronize()
        seconds.append(time.perf_counter() - begin)
    median, begin = statistics.median(seconds[1:]), time.perf_counter()
    for _ in range(rounds):
        side.step()
    host = (time.perf_counter() - begin) / rounds
    check.synchronize()
    free = (time.perf_counter() - begin) / rounds
    data = config.data
    tokens = data.micro_num * data.micro_bsz * data.seq_len
    flops, peak = model_flops_per_token(config.model, data.seq_len), peak_flops(check.device, config.model.dtype)
    memory = None if check.smoke else torch.cuda.max_memory_allocated() / 2**30
    reached, reached_free = (mfu(flops, tokens, taken, 1, peak) for taken in (median, free))
    check.tell(
        f"{tokens / median:.0f} tokens/s, MFU {reached or 0:.4f}, without waits {reached_free or 0:.4f}, "
        f"step {median * 1e3:.1f} ms, host {host * 1e3:.1f} ms, peak {memory or 0:.1f} GiB, norm {norm:.4f}, "
        f"first step {first:.1f} s, built in {built:.1f} s",
        **{"seconds": seconds, "free": free, "host": host, "memory_gib": memory, "mfu": reached, "norm": norm},
        **{
            "gpu": device_name(check.device),
            "layers": config.model.num_layers,
            "tokens": tokens,
            "flops_per_token": flops,
        },
    )


def shape_config(shape: str, variant: str, *, smoke: bool = False) -> Config:
    """What `perf` and `profile` measure."""
    dtype = "torch.float32" if smoke and "fp8" not in variant else "torch.bfloat16"
    config = bench_config(**(_TINY if smoke else SHAPES[shape]), dtype=dtype, bucket_size=_BUCKET)
    return variants.configured(config, variant)


def _build(check: Check, shape: str, variant: str) -> tuple[Config, Side, float]:
    """(config, what is measured, seconds it took to build)."""
    config = shape_config(shape, variant, smoke=check.smoke)
    variants.apply(variant, check.smoke)
    begin, mesh = time.perf_counter(), single_process_mesh(check.device)
    make = bench_step.bare_side if variant.startswith("bare") else bench_step.our_side
    side = make(config, mesh, 1)
    check.synchronize()
    return config, side, time.perf_counter() - begin


def profile(check: Check, shape: str, variant: str) -> None:
    """One step's kernels by time and kind, and the gaps between them; the trace goes beside the results."""
    from torch.profiler import ProfilerActivity

    side = _build(check, shape, variant)[1]
    for _ in range(3):
        side.step()
    check.synchronize()
    activities = [ProfilerActivity.CPU] + ([] if check.smoke else [ProfilerActivity.CUDA])
    with torch.profiler.profile(activities=activities) as traced:
        begin = time.perf_counter()
        side.step()
        check.synchronize()
        wall = time.perf_counter() - begin
    trace = check.scratch / "trace.json"
    traced.export_chrome_trace(str(trace))
    categories = {"cpu_op"} if check.smoke else {"kernel", "gpu_memcpy", "gpu_memset"}
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") in categories]
    _describe(check, sorted(events, key=lambda event: event["ts"]), wall)
    if not check.smoke:
        _keep(trace, check.out / f"trace_{shape}.json.gz")


def _keep(trace: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(gzip.compress(trace.read_bytes()))


def _describe(check: Check, events: list[dict[str, Any]], wall: float) -> None:
    times: Counter[str] = Counter()
    calls = Counter(event["name"] for event in events)
    kinds: Counter[str] = Counter()
    for event in events:
        times[event["name"]] += event["dur"]
        lower = event["name"].lower()
        kinds[next((kind for kind, words in _KINDS.items() if any(w in lower for w in words)), "other")] += event["dur"]
    for name, microseconds in times.most_common(25):
        check.note(f"{microseconds / 1e3:9.2f} ms {calls[name]:5d} x  {name[:150]}")
    ends = list(accumulate((event["ts"] + event["dur"] for event in events), max))
    gaps = sum(max(0.0, event["ts"] - end) for end, event in zip(ends, events[1:], strict=False))
    by_kind = {kind: round(microseconds / 1e3, 1) for kind, microseconds in kinds.most_common()}
    busy = sum(times.values()) / 1e3
    check.tell(
        f"{len(events)} kernels, {busy:.1f} of {wall * 1e3:.1f} ms, gaps {gaps / 1e3:.1f} ms; {by_kind}",
        kinds=by_kind,
        gpu=device_name(check.device),
        gaps=gaps / 1e3,
        kernels={name: [calls[name], microseconds] for name, microseconds in times.most_common(80)},
    )
