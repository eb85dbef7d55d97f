"""Named process groups: which ranks form a group along each axis of the mesh.

Rank numbering, tensor parallel fastest, then context parallel, then data parallel, then pipeline:

    rank = ((pp * dp_size + dp) * cp_size + cp) * tp_size + tp          dp * cp_size + cp = replica * zero_size + zero

The ranks of `cp` share the tokens of each row, those of `dp` load different rows. Both hold the same weights, so the
optimizer sees dp * cp ranks that are alike: those of a `zero` group are neighbours among them. (torchtitan calls these
axes dp_shard and dp_replicate.)
`ends` joins the first and the last pipeline rank, which hold copies of a tied weight (Megatron's embedding group).
Every axis has a group, also of size one; see comm.py for collectives on it.

All groups of an axis are made by one call. With NCCL it splits the communicator of the world, which all ranks must do
together; else only the members of a group make it, axis by axis in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import DebugLevel, get_debug_level  # type: ignore[attr-defined]

from internlm_lite.errors import MeshError, PeerLostError, first_line


@dataclass(frozen=True)
class Group:
    """The group of one axis that contains this process."""

    name: str
    ranks: tuple[int, ...]
    """Global ranks, in group order."""
    rank: int
    """This process's index in `ranks`."""
    process_group: dist.ProcessGroup | None
    """None for a group of size one, and in a mesh of `plan_mesh`."""
    object_group: dist.ProcessGroup | None = None
    """Of the same ranks, on the CPU: objects exchanged over it do not wait for the GPU. None: `process_group`."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Sizes:
    """Number of ranks along each axis: dp * cp * tp * pp is the world size, and `zero` divides `alike`."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 1
    cp: int = 1

    @property
    def world(self) -> int:
        return self.alike * self.tp * self.pp

    @property
    def alike(self) -> int:
        """Ranks that hold the same weights, over which gradients are summed: dp * cp."""
        return self.dp * self.cp

    @property
    def replica(self) -> int:
        return self.alike // self.zero

    @property
    def axes(self) -> str:
        """Such as "dp 2 x tp 4 x pp 1", with "cp" where rows are cut."""
        return f"dp {self.dp} x {f'cp {self.cp} x ' * (self.cp > 1)}tp {self.tp} x pp {self.pp}"


def sizes_of(world_size: int, tensor: int, pipeline: int, zero1: int, context: int = 1) -> Sizes:
    """Sizes from `parallel.tensor`, `parallel.pipeline.size`, `parallel.zero1` (<= 0: all ranks that hold the same
    weights) and `parallel.context.size`.

    Raises MeshError when world_size is not a multiple of tensor * pipeline * context, or zero1 does not divide the
    ranks that hold the same weights.
    """
    ranks, of_context = tensor * pipeline * context, f" * parallel.context.size={context}" * (context > 1)
    if world_size % ranks:
        raise MeshError(
            f"world size {world_size} does not fit parallel.tensor={tensor} * parallel.pipeline.size={pipeline}"
            f"{of_context}: expected a multiple of {ranks}; start another number of processes or change the layout"
        )
    alike = world_size // (tensor * pipeline)
    zero = alike if zero1 <= 0 else zero1
    if alike % zero:
        what = "data parallel size" if context == 1 else "data times context parallel size"
        raise MeshError(
            f"parallel.zero1={zero1} does not divide the {what} {alike} "
            f"(world {world_size} / tensor {tensor} / pipeline {pipeline}): use -1, 1 or a divisor of {alike}"
        )
    return Sizes(dp=world_size // ranks, tp=tensor, pp=pipeline, zero=zero, cp=context)


@dataclass(frozen=True)
class Mesh:
    """All groups of this process. Passed as an argument; there is no global mesh."""

    sizes: Sizes
    rank: int
    device: torch.device
    world: Group
    dp: Group
    cp: Group
    tp: Group
    pp: Group
    zero: Group
    replica: Group
    ends: Group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def alike_rank(self) -> int:
        """This process's number among the `sizes.alike` ranks that hold the same weights."""
        return self.dp.rank * self.cp.size + self.cp.rank

    def axis(self, name: str) -> Group:
        """The group of an axis ("dp", "cp", "tp", "pp", "zero", "replica", "ends"). Raises KeyError for other names."""
        groups = (self.dp, self.cp, self.tp, self.pp, self.zero, self.replica, self.ends)
        return {group.name: group for group in groups}[name]


def rank_of(sizes: Sizes, *, dp: int, tp: int, pp: int, cp: int = 0) -> int:
    """Global rank at a coordinate of the mesh; the numbering is in the module's docstring."""
    return ((pp * sizes.dp + dp) * sizes.cp + cp) * sizes.tp + tp


def axis_groups(sizes: Sizes) -> dict[str, list[tuple[int, ...]]]:
    """Axis name -> its groups, as tuples of global ranks that partition the world. Pure; the same on every rank."""
    tps, pps, cps = range(sizes.tp), range(sizes.pp), range(sizes.cp)
    alike = range(sizes.alike)

    def at(place: int, tp: int, pp: int) -> int:
        """`place`: among the ranks that hold the same weights."""
        return (pp * sizes.alike + place) * sizes.tp + tp

    columns = [(tp, pp) for pp in pps for tp in tps]
    rows = [range(dp * sizes.cp, (dp + 1) * sizes.cp) for dp in range(sizes.dp)]
    return {
        "world": [tuple(range(sizes.world))],
        "tp": [tuple(at(place, tp, pp) for tp in tps) for pp in pps for place in alike],
        "cp": [tuple(at(place, tp, pp) for place in row) for tp, pp in columns for row in rows],
        "pp": [tuple(at(place, tp, pp) for pp in pps) for place in alike for tp in tps],
        "dp": [tuple(at(row[cp], tp, pp) for row in rows) for tp, pp in columns for cp in cps],
        "zero": [
            tuple(at(replica * sizes.zero + zero, tp, pp) for zero in range(sizes.zero))
            for tp, pp in columns
            for replica in range(sizes.replica)
        ],
        "replica": [
            tuple(at(replica * sizes.zero + zero, tp, pp) for replica in range(sizes.replica))
            for tp, pp in columns
            for zero in range(sizes.zero)
        ],
        "ends": [tuple(at(place, tp, pp) for pp in ends) for ends in _ends(sizes.pp) for place in alike for tp in tps],
    }


def _ends(pp_size: int) -> list[tuple[int, ...]]:
    """Pipeline ranks of each `ends` group: the first and the last rank form one, every other rank its own."""
    middle = [(pp,) for pp in range(1, pp_size - 1)]
    return [(0, pp_size - 1) if pp_size > 1 else (0,), *middle]


def build_mesh(sizes: Sizes, rank: int, device: torch.device, timeout: timedelta) -> Mesh:
    """Create the process groups of all axes. Collective: every rank calls it with the same sizes.

    `torch.distributed` must be initialised unless the world size is one. No axis shares its process group, not even
    with the default group, which other libraries use: collectives of different axes may overlap in any order. Where
    groups take only tensors of a GPU, the world has another one for objects. Raises PeerLostError when a rank is lost.
    """
    mesh = _mesh(sizes, rank, device, lambda axis, partition: _new_group(axis, partition, rank, timeout))
    if sizes.world == 1 or "cpu:" in dist.get_backend_config():
        return mesh
    with _peer_lost("for objects"):
        object_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="objects")
    return replace(mesh, world=replace(mesh.world, object_group=object_group))


def plan_mesh(sizes: Sizes, rank: int, device: torch.device) -> Mesh:
    """The mesh as seen by `rank`, without process groups: to build and measure models, not for collectives."""
    return _mesh(sizes, rank, device, lambda _axis, _partition: None)


Partition = Sequence[tuple[int, ...]]
"""All groups of an axis, as global ranks."""


def _mesh(
    sizes: Sizes, rank: int, device: torch.device, create: Callable[[str, Partition], dist.ProcessGroup | None]
) -> Mesh:
    """Calls `create` for every axis with a group of size > 1, in the same order on every rank."""

    def group(axis: str, partition: Partition) -> Group:
        mine = next(ranks for ranks in partition if rank in ranks)
        made = create(axis, partition) if any(len(ranks) > 1 for ranks in partition) else None
        return Group(axis, mine, mine.index(rank), made if len(mine) > 1 else None)

    groups = {axis: group(axis, partition) for axis, partition in axis_groups(sizes).items()}
    return Mesh(sizes=sizes, rank=rank, device=device, **groups)


def _new_group(axis: str, partition: Partition, rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """The group of `partition` with this rank. A rank alone makes one, too: torch names a group by its ranks and by how
    many groups the rank that makes it is in, a number that must be equal on all ranks."""
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is initialised"
    mine = next(ranks for ranks in partition if rank in ranks)
    with _peer_lost(f"of the {axis} axis"):
        if world.bound_device_id is None:
            return dist.new_group(mine, timeout=timeout, use_local_synchronization=True, group_desc=axis)
        if get_debug_level() == DebugLevel.DETAIL:  # torch wraps NCCL in what has no split of its own
            made = [dist.new_group(ranks, timeout=timeout, group_desc=axis) for ranks in partition]
            return made[partition.index(mine)]
        return dist.split_group(split_ranks=[list(ranks) for ranks in partition], timeout=timeout, group_desc=axis)


@contextmanager
def _peer_lost(which: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
        raise PeerLostError(
            f"a rank was lost while the process groups {which} were made: {first_line(error)}; "
            "the log of the rank that failed first says why"
        ) from error


def single_process_mesh(device: torch.device = torch.device("cpu")) -> Mesh:
    """The mesh of one process: every group has size one."""
    return build_mesh(Sizes(), rank=0, device=device, timeout=timedelta(seconds=1))
