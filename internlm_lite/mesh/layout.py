"""Which part of a whole tensor this rank holds, written on the parameter once, as `param.shard_spec`.

Initialisation, gradient norm, ZeRO, checkpoints and planner read it; nothing matches substrings of names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from internlm_lite.errors import ConfigError

if TYPE_CHECKING:
    from internlm_lite.mesh.mesh import Group

Box = tuple[tuple[int, int], ...]
"""A region of a tensor in whole-tensor coordinates: one (start, stop) per dimension."""


@dataclass(frozen=True)
class ShardSpec:
    """`name` and `shape` are those of the whole tensor, the same in every layout of the run."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tp_sharded: bool
    """True: the tensor-parallel ranks hold different boxes. False: each of them holds the whole tensor."""
    init_std: float | None
    """Standard deviation of the initial normal draw; None: see `fill`."""
    fill: float = 0.0
    """Initial constant when `init_std` is None."""
    partial_over: tuple[str, ...] = ()
    """Axes of the mesh, besides dp, over which its gradient on each rank is a partial sum: "tp", "ends"."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)


def whole(
    name: str,
    shape: tuple[int, ...],
    *,
    init_std: float | None = None,
    fill: float = 0.0,
    partial_over: tuple[str, ...] = (),
) -> ShardSpec:
    """Every rank holds the whole tensor."""
    box = tuple((0, n) for n in shape)
    return ShardSpec(name, shape, box, tp_sharded=False, init_std=init_std, fill=fill, partial_over=partial_over)


def split(
    name: str,
    shape: tuple[int, ...],
    dim: int,
    group: Group,
    *,
    init_std: float | None = None,
    partial_over: tuple[str, ...] = (),
) -> ShardSpec:
    """Each rank of `group` holds an equal range of dimension `dim`. Raises ConfigError if it does not divide."""
    if shape[dim] % group.size:
        raise ConfigError(
            f"{name}: dimension {dim} of size {shape[dim]} cannot be split over {group.size} {group.name} ranks: "
            f"expected a multiple of {group.size}; change the model's shape or parallel.tensor"
        )
    part = shape[dim] // group.size
    box = [(0, n) for n in shape]
    box[dim] = (part * group.rank, part * (group.rank + 1))
    return ShardSpec(name, shape, tuple(box), tp_sharded=group.size > 1, init_std=init_std, partial_over=partial_over)


@dataclass(frozen=True)
class LocalShard:
    """Something a checkpoint stores: the part of one named whole tensor that this rank holds in `tensor`.

    `box` is the rank's region (tensor and pipeline parallel); `flat_range` = (a, b) narrows it to elements a..b of
    that box in row-major order (ZeRO). `tensor` has the box's shape, or is 1-D of length b - a. Loading writes to it.
    """

    name: str
    role: str
    """"master", or one of the update rule's `roles`."""
    shape: tuple[int, ...]
    box: Box
    flat_range: tuple[int, int] | None
    tensor: torch.Tensor


class Parameter(nn.Parameter):
    """A parameter that knows which part of its whole tensor it is."""

    shard_spec: ShardSpec  # not `layout`: torch.Tensor has an attribute of that name
    grads_per_microbatch: int = 1
    """Gradients added per micro-batch: 2 for a tied weight whose two stages are on one rank."""
    manual_grad: bool = False
    """True: a layer adds to `grad` itself, then calls `on_manual_grad`; autograd runs hooks without a gradient."""
    on_manual_grad: Callable[[Parameter], object] | None = None
    """Set by the optimizer, which counts gradients."""


def parameter(layout: ShardSpec, dtype: torch.dtype, device: torch.device | str) -> Parameter:
    """An uninitialised parameter of the local shape; `models/initialise.py` draws its value."""
    made = Parameter(torch.empty(layout.local_shape, dtype=dtype, device=device))
    made.shard_spec = layout
    return made
