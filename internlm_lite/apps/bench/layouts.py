"""(e) Layouts of the same model over the same global batch, against those of torch.

Each world of ranks holds all sides of one kind of layout and alternates between them:

    data parallel      dp2 zero1=1, dp2 zero1=-1      DDP, DDP + ZeroRedundancyOptimizer, fully_shard
    tensor parallel    tp2, tp2 sp                    parallelize_module, the same with SequenceParallel
    pipeline parallel  pp2 1f1b, interleaved, zbv     Schedule1F1B; ours interleaved and zbv against ours 1f1b
    ZeRO-3             dp2 zero_stage=3               fully_shard, weights freed after each pass
    ZeRO-1, 2, 3       dp2 zero_stage=1, 2, 3         DeepSpeed's engine of these stages
    hybrid ZeRO        dp4 zero1=2                    fully_shard on a mesh of 2 x 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from internlm_lite.apps.bench import torch_layouts
from internlm_lite.apps.bench.deepspeed_layouts import deepspeed_zero
from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import our_side
from internlm_lite.apps.bench.timing import alternate_ranks
from internlm_lite.apps.bench.torch_layouts import Builder
from internlm_lite.apps.bench.worlds import device_of, mesh_of, on_ranks
from internlm_lite.runtime.device import device_name


@dataclass(frozen=True)
class Entry:
    """One side of a comparison: its builder and its layout."""

    build: Builder
    parallel: Mapping[str, Any] = field(default_factory=dict)
    """The section `parallel` of its config."""
    num_chunks: int = 1


@dataclass(frozen=True)
class World:
    """Sides that are measured in the same processes."""

    ranks: int
    dp: int
    sides: Mapping[str, Entry]
    pairs: tuple[tuple[str, str], ...]
    """(side, side to compare it with)."""


@dataclass(frozen=True)
class LayoutRow:
    """One side against another. Ratios are of times: below 1, ours is faster."""

    ours: str
    against: str
    device: str
    tokens_per_second: float
    against_tokens_per_second: float
    ratio: float


def _pipeline(schedule: str) -> dict[str, Any]:
    return {"pipeline": {"size": 2, "schedule": schedule}}


def worlds() -> list[World]:
    """All worlds: of 2 ranks and, for hybrid ZeRO, of 4."""
    data = World(
        2,
        2,
        {
            "dp2 zero1=1": Entry(our_side, {"zero1": 1}),
            "DDP": Entry(torch_layouts.ddp, {"zero1": 1}),
            "dp2 zero1=-1": Entry(our_side),
            "DDP + ZeroRedundancyOptimizer": Entry(torch_layouts.ddp_zero),
            "fully_shard": Entry(torch_layouts.fsdp),
        },
        (
            ("dp2 zero1=1", "DDP"),
            ("dp2 zero1=-1", "DDP + ZeroRedundancyOptimizer"),
            ("dp2 zero1=-1", "fully_shard"),
        ),
    )
    whole, split = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}
    tensor = World(
        2,
        1,
        {
            "tp2": Entry(our_side, whole),
            "torch tensor parallel": Entry(torch_layouts.tp, whole),
            "tp2 sp": Entry(our_side, split),
            "torch sequence parallel": Entry(torch_layouts.tp, split),
        },
        (("tp2", "torch tensor parallel"), ("tp2 sp", "torch sequence parallel")),
    )
    pipeline = World(
        2,
        1,
        {
            "pp2 1f1b": Entry(our_side, _pipeline("1f1b")),
            "torch Schedule1F1B": Entry(torch_layouts.pp, _pipeline("1f1b")),
            "pp2 interleaved": Entry(our_side, _pipeline("interleaved"), num_chunks=2),
            "pp2 zbv": Entry(our_side, _pipeline("zbv"), num_chunks=2),
        },
        (("pp2 1f1b", "torch Schedule1F1B"), ("pp2 interleaved", "pp2 1f1b"), ("pp2 zbv", "pp2 1f1b")),
    )
    hybrid = World(
        4,
        4,
        {
            "dp4 zero1=2": Entry(our_side, {"zero1": 2}),
            "fully_shard 2 x 2": Entry(torch_layouts.fsdp, {"zero1": 2}),
        },
        (("dp4 zero1=2", "fully_shard 2 x 2"),),
    )
    return [data, *zero_worlds(2), tensor, pipeline, hybrid]


def zero_worlds(ranks: int) -> list[World]:
    """Each stage beside a peer, two sides a world: a whole model and its moments are in every process."""

    def world(stage: int, peer: str, build: Builder) -> World:
        ours = f"dp{ranks} zero_stage={stage}"
        return World(ranks, ranks, {ours: Entry(our_side, {"zero_stage": stage}), peer: Entry(build)}, ((ours, peer),))

    stages = (1, 2, 3) if find_spec("deepspeed") else ()
    peers = [world(stage, f"DeepSpeed ZeRO-{stage}", partial(deepspeed_zero, stage)) for stage in stages]
    return [world(3, "fully_shard, weights freed", torch_layouts.fsdp3), *peers]


def bench_layouts(chosen: Sequence[World], rounds: int, **shape: Any) -> list[LayoutRow]:
    """Measure worlds, one after another.

    shape: as `bench_config`; its micro_num micro-batches, a multiple of 4, are those of the whole step.
    """
    rows = []
    tokens = shape["micro_num"] * shape["micro_bsz"] * shape["seq_len"]
    for world in chosen:
        seconds = on_ranks(world.ranks, _measure, world, shape, rounds)
        rows += [
            LayoutRow(
                ours=ours,
                against=against,
                device=device_name(device_of(0, world.ranks)),
                tokens_per_second=tokens / seconds[ours],
                against_tokens_per_second=tokens / seconds[against],
                ratio=seconds[ours] / seconds[against],
            )
            for ours, against in world.pairs
        ]
    return rows


def _measure(rank: int, device: torch.device, world: World, shape: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds of one step of every side of `world`. Collective."""
    micro_num = shape["micro_num"] // world.dp
    sides = {}
    for name, entry in world.sides.items():
        config = bench_config(
            **{**shape, "micro_num": micro_num}, parallel=dict(entry.parallel), num_chunks=entry.num_chunks
        )
        sides[name] = entry.build(config, mesh_of(config, rank, device), 1)
    return alternate_ranks(sides, rounds, device)
