"""The first minutes on a GPU: is it right, does it hang, how fast is it. `make gpu` runs it with the machine's Python.

internlm-lite gpu-check [--budget SECONDS] [--only NAME,...] [--out FOLDER]
internlm-lite gpu-check --smoke                                             every section on the CPU, with tiny shapes
internlm-lite gpu-check --predict h100                                      what each change should give, without a GPU
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from internlm_lite.apps.bench.gpu.run_sections import PLAN, Runner
from internlm_lite.apps.bench.gpu.step_speed import SHAPES, shape_config
from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.planner.device_file import DeviceFile, device_of, load_device
from internlm_lite.apps.planner.step_clock import clock_plan, full_rows
from internlm_lite.cli.options import new_parser
from internlm_lite.runtime.tool import run_tool

MEMORY_BOUND = ("elementwise", "copies", "norms")
KINDS_OF_PROFILE = {
    "products": ("gemm",),
    "attention": ("attention",),
    "memory-bound work": ("elementwise", "copy, cat, fill", "reduce, norm", "other"),
    "optimizer": ("optimizer",),
}
"""Term of the comparison -> kinds of kernels in the section `profile`."""
PREDICTED = {
    "1.3B, one GPU, 2 micro-batches of 4 x 2,048": (1, SHAPES["1b"]),
    "1.3B, 8 GPUs, 2 micro-batches of 4 x 2,048 each": (8, SHAPES["1b"]),
    "7B, 8 GPUs, 4 micro-batches of 4,096 each": (8, SHAPES["7b"] | {"layers": 32, "micro_bsz": 1, "micro_num": 4}),
}
"""Title -> GPUs and shape of `--predict`."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("gpu-check", __doc__)
    add = parser.add_argument
    add("--budget", type=float, default=470, metavar="SECONDS", help="for all sections together (470)")
    add("--only", default="", metavar="NAME,...", help="sections whose name begins so")
    add("--out", type=Path, default=Path("gpu_check_out"), help="for gpu_check.json and gpu_check.txt")
    add("--smoke", action="store_true", help="on the CPU, to see that every section runs")
    add("--predict", metavar="DEVICE", help="run nothing; as --device of train.py --dry-run")
    arguments = parser.parse_args(argv)
    arguments.wanted = [p for p in PLAN if any(p.name.startswith(name) for name in arguments.only.split(","))]
    if not arguments.wanted:
        parser.error(f"--only {arguments.only}: expected beginnings of {', '.join(part.name for part in PLAN)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(partial(work, parse_arguments(argv)))


def work(arguments: argparse.Namespace) -> int:
    """Exit code: 0 every section that ran is right, 1 otherwise."""
    if arguments.predict:
        print(*waterfall(load_device(arguments.predict)), sep="\n")
        return 0
    repository = Path(__file__).resolve().parents[2]
    runner = Runner(repository, arguments.out.resolve(), arguments.budget, arguments.smoke)
    runner.run(arguments.wanted)
    if compared := list(predicted_and_measured(runner.results, smoke=arguments.smoke)):
        runner.add("predicted", compared)
    print(runner.summary())
    return 0 if runner.good else 1


def waterfall(device: DeviceFile) -> Iterator[str]:
    """A table in Markdown of a step after each change, by shape."""
    plans = []
    for world, shape in PREDICTED.values():
        config = bench_config(**shape, dtype="torch.bfloat16", bucket_size=512 * 1024**2)
        clock, ways = full_rows(config, world, device)
        plans.append(clock_plan(clock, ways, "of seq_len tokens"))
    yield f"| predicted, {device.name} | {' | '.join(PREDICTED)} |"
    yield "|---" * (1 + len(plans)) + "|"
    columns = [{change.change: change for change in plan.changes} for plan in plans]
    for name in max(columns, key=len):
        found = [column.get(name) for column in columns]
        cells = ["" if one is None else f"{one.seconds_per_step * 1e3:,.0f} ms, {one.mfu:.1%}" for one in found]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for title, plan in zip(PREDICTED, plans, strict=True):
        for size in plan.buckets:
            waits = f"reduce-scatter {size.scatter * 1e3:.2f} ms, gather {size.gather * 1e3:.2f} ms"
            yield f"{title}: {size.count} buckets of {size.elements / 2**20:g} M: {size.fraction:.1%} exposed, {waits}"


def predicted_and_measured(results: Mapping[str, dict[str, Any]], *, smoke: bool) -> Iterator[str]:
    """One line for each step, and for each kind of kernel, that the sections `perf` and `profile` measured."""
    for name, result in results.items():
        section, *arguments = name.split(":")
        known = section in ("perf", "profile") and arguments[1] in ("eager", "compile", "recompute")
        if not known or result["status"] != "ok":
            continue
        value = result["value"]
        device = load_device("h100") if smoke else device_of(value["gpu"])
        if device is None:
            yield f"{name}: no device file of {value['gpu']}"
            continue
        clock, ways = full_rows(shape_config(*arguments, smoke=smoke), 1, device)
        times = clock.seconds(ways)
        if section == "perf":
            yield _ratio(name, times.total(), statistics.median(value["seconds"][1:]))
            continue
        kinds, measured = times.by_kind(), value["kinds"]
        kinds["memory-bound work"] = sum(kinds.get(kind, 0.0) for kind in MEMORY_BOUND)
        for term, names in KINDS_OF_PROFILE.items():
            taken = sum(measured.get(kind, 0.0) for kind in names) / 1e3
            yield _ratio(f"{name} {term}", kinds.get(term, 0.0), taken)
        yield _ratio(f"{name} gaps", kinds["gaps"], value["gaps"] / 1e3)


def _ratio(what: str, predicted: float, measured: float) -> str:
    ratio = f"{measured / predicted:.2f}" if predicted else "-"
    return f"{what}: predicted {predicted * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms, ratio {ratio}"
