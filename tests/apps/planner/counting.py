"""Counts the collectives of a real training step, as torch.distributed's backends get them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_lite.layers.costs import Message
from internlm_lite.mesh.mesh import Mesh

Key = tuple[str, str, int]
"""(axis, call, bytes of the tensor passed)"""


class Calls(TorchDispatchMode):
    """While active, `counted` grows by every collective of this rank. Receiving costs nothing."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        groups = (mesh.world, mesh.dp, mesh.cp, mesh.tp, mesh.pp, mesh.zero, mesh.replica, mesh.ends)
        self._axes = {group.process_group.group_name: group.name for group in groups if group.process_group is not None}
        self.counted: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname != "recv_":
            tensors = [
                x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, torch.Tensor)
            ]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            counts = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], int)]
            call = "swap" if func._opname == "alltoall_base_" and counts else func._opname  # between two ranks
            self.counted[self._axes[group.group_name], call, tensors[-1].nbytes] += 1
        return func(*args, **(kwargs or {}))


def expected(planned: Sequence[Message], sizes: dict[str, int]) -> Counter[Key]:
    """The same for the planner's messages, in the calls that mesh/comm.py makes of them where there is no NCCL."""
    calls: Counter[Key] = Counter()
    for message in planned:
        size = sizes[message.axis]
        if message.kind == "all_gather" and size == 2:
            calls[message.axis, "swap", message.n_bytes // 2] += message.times
        elif message.kind == "all_gather":  # every rank sends its part to every other
            calls[message.axis, "send", message.n_bytes // size] += message.times * (size - 1)
        else:
            name = {"all_reduce": "allreduce_", "send": "send"}.get(message.kind, "alltoall_base_")
            calls[message.axis, name, message.n_bytes] += message.times
    return calls


def sent(calls: Counter[Key], sizes: dict[str, int]) -> dict[str, Fraction]:
    """Bytes by axis that this rank sent: what a ring all-reduce and a pairwise exchange need."""
    totals: dict[str, Fraction] = {}
    for (axis, call, n_bytes), times in calls.items():
        share = Fraction(sizes[axis] - 1, sizes[axis])
        factor = {"allreduce_": 2 * share, "alltoall_base_": share, "send": Fraction(1), "swap": Fraction(1)}[call]
        totals[axis] = totals.get(axis, Fraction(0)) + times * n_bytes * factor
    return totals
