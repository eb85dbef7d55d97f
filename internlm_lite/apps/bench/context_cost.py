"""Context parallelism beside data parallelism: the same tokens on the same ranks, and what a rank sends for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import our_side
from internlm_lite.apps.bench.timing import alternate_ranks
from internlm_lite.apps.bench.worlds import device_of, mesh_of, on_ranks
from internlm_lite.runtime.device import device_name

RANKS = 2
SIDES: Mapping[str, Mapping[str, Any]] = {
    "dp2": {},
    **{f"cp2 {kind}": {"context": {"size": RANKS, "exchange": kind}} for kind in ("gather", "ring", "ulysses")},
}
"""Section `parallel` of each."""


@dataclass(frozen=True)
class ContextStep:
    """One step of a layout. `ratio`: its time by that of data parallelism."""

    layout: str
    device: str
    tokens_per_second: float
    ratio: float
    sent_bytes: int
    """By the rank that sends most, gradients and weights included."""


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends in collectives and messages of torch.distributed; a reduction as a ring sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if name != func._schema.name:
            self.n_bytes += _sent(name, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Sequence[Any]) -> int:
    """Of one operation between the two ranks; a new kind of operation must be named here."""
    first = sum(x.nbytes for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor))
    if name in ("recv_", "barrier", "monitored_barrier_"):
        return 0
    if name == "alltoall_base_":  # received, sent, group, counts received, counts sent
        sent, counts = args[1], args[4]
        kept = counts[dist.get_rank()] * (sent.nbytes // max(len(sent), 1)) if counts else sent.nbytes // RANKS
        return int(sent.nbytes - kept)
    shares = {"send": 1.0, "allreduce_": 1.0, "_allgather_base_": 1 / RANKS, "_reduce_scatter_base_": 1.0}
    return int(first * shares[name])


def bench_context(rounds: int, **shape: Any) -> list[ContextStep]:
    """All sides in one world of two ranks, by turns. `shape`: as `bench_config`; its micro_num micro-batches, an even
    number, are those of the whole step: two ranks share either the rows or the tokens of each row."""
    tokens = shape["micro_num"] * shape["micro_bsz"] * shape["seq_len"]
    seconds, sent = on_ranks(RANKS, _measure, shape, rounds)
    device = device_name(device_of(0, RANKS))
    return [
        ContextStep(side, device, tokens / seconds[side], seconds[side] / seconds["dp2"], sent[side]) for side in SIDES
    ]


def _measure(
    rank: int, device: torch.device, shape: dict[str, Any], rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """(median seconds of one step, bytes that a step sends) of every side. Collective."""
    sides, sent = {}, {}
    for name, parallel in SIDES.items():
        micro_num = shape["micro_num"] // (1 if parallel else RANKS)
        config = bench_config(**{**shape, "micro_num": micro_num}, parallel=dict(parallel))
        side = our_side(config, mesh_of(config, rank, device), 1)
        side.step()
        side.finish()
        with SentBytes() as counted:
            side.step()
            side.finish()
        most = torch.tensor(counted.n_bytes, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        sides[name], sent[name] = side, int(most)
    return alternate_ranks(sides, rounds, device), sent
