"""Which part of a whole tensor this rank holds: stored once on each parameter, as `param.shard_spec`.

Initialisation, gradient norm, ZeRO, checkpoints and planner read it; no code matches substrings of parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from internlm_lite.errors import ConfigError
from internlm_lite.mesh import comm

if TYPE_CHECKING:
    from internlm_lite.mesh.mesh import Group

Box = tuple[tuple[int, int], ...]
"""A region of a tensor in whole-tensor coordinates: one (start, stop) per dimension, stop exclusive."""


@dataclass(frozen=True)
class ShardSpec:
    """This rank's part of one parameter. `name` and `shape`: of the whole tensor, the same for every mesh."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tp_sharded: bool
    """True: tensor-parallel ranks hold different boxes. False: each of them holds the same box."""
    init_std: float | None
    """Standard deviation of the normal distribution that initial values are drawn from; None: see `fill`."""
    fill: float = 0.0
    """Initial constant when `init_std` is None."""
    partial_over: tuple[str, ...] = ()
    """Axes besides dp ("tp", "ends") over which this rank's gradient is a partial sum, to be all-reduced."""

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
    """The spec of a tensor that every rank holds whole; arguments as the fields of `ShardSpec`."""
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
    """The spec of a tensor split evenly along `dim` over `group`. Raises ConfigError if shape[dim] is not divisible."""
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
    """The part of one named whole tensor that this rank saves from, or loads into, `tensor`.

    `box` is the rank's region (tensor and pipeline parallelism); `flat_range` = (a, b) restricts it to elements
    a..b-1 of that box in row-major order (ZeRO). `tensor` has the box's shape, or is 1-D of length b - a.
    """

    name: str
    role: str
    """"master" (the master weights), one of the update rule's `roles` (its state), or "ema" (their average)."""
    shape: tuple[int, ...]
    box: Box
    flat_range: tuple[int, int] | None
    tensor: torch.Tensor
    non_negative: bool = False
    """Whether a negative number in `tensor` is an error."""
    largest: float = math.inf
    """A finite number of larger magnitude is an error, too: the model's weights would be infinite."""
    optional: bool = False
    """A load from a checkpoint that has nothing of this role leaves `tensor` as it is."""


def is_sound(tensor: torch.Tensor, *, non_negative: bool, largest: float = math.inf) -> torch.Tensor:
    """Whether all elements (at least one) are finite, of no larger magnitude than `largest` and, if asked, none is
    negative: bool device scalar. One pass."""
    low, high = tensor.detach().aminmax()  # both are NaN if an element is
    least = 0 if non_negative else -largest
    return low.isfinite() & high.isfinite() & (low >= least) & (high <= largest)


def first_problem(shards: Sequence[LocalShard]) -> str | None:
    """Names the first of `shards` that is not sound; None: all are. Waits for the device once."""
    shards = [shard for shard in shards if shard.tensor.numel()]
    flags = [is_sound(shard.tensor, non_negative=shard.non_negative, largest=shard.largest) for shard in shards]
    sound: list[bool] = comm.read(torch.stack(flags)) if flags else []
    if all(sound):
        return None
    bad = shards[sound.index(False)]
    what = "negative numbers" if bad.non_negative else f"numbers beyond {bad.largest:g}, too large for the weights"
    return f"{bad.role} of {bad.name} holds {what if comm.read(bad.tensor.isfinite().all()) else 'NaN or infinity'}"


class Parameter(nn.Parameter):
    """An nn.Parameter with its `shard_spec`."""

    shard_spec: ShardSpec  # not named `layout`: torch.Tensor has an attribute of that name
    grads_per_microbatch: int = 1
    """Gradient accumulations per micro-batch: one for each embedding and head that share it."""
    looked_up: bool = False
    """Whether rows of it are looked up, as of an embedding; also for the copy of one that a tied head multiplies by."""
    matrix_rows: tuple[int, ...] | None = None
    """Of the weight of a linear layer: rows of the matrices that lie one below the other in it, a pattern that repeats
    until all of its rows are used. None: it is no map from features to features, and no rule may treat it as one."""
    manual_grad: bool = False
    """True: its layer adds the gradient to `main_grad`, if there is one. False: autograd adds it to `grad`."""
    deferred_grad: bool = False
    """True: what adds its gradient calls `on_grad` then, because that is not when the backward pass leaves its unit."""
    main_grad: torch.Tensor | None = None
    """The buffer of a `manual_grad` parameter, in the dtype of accumulation; None: there is no optimizer."""
    before_grad: Callable[[], object] | None = None
    """Called before a gradient is added that may come at any time (`deferred_grad`): gives `main_grad` its memory."""
    on_grad: Callable[[Parameter], object] | None = None
    """Called with the parameter after each accumulation; set by the optimizer (`optim.reduce`)."""


def parameter(
    layout: ShardSpec, dtype: torch.dtype, device: torch.device | str, *, allocated: bool = True
) -> Parameter:
    """An uninitialised parameter of shape `layout.local_shape`; `models/initialise.py` fills it. `allocated` False: it
    has the memory of one element, until an optimizer gives it its place."""
    size = layout.local_shape if allocated else ()
    made = Parameter(torch.empty(size, dtype=dtype, device=device).expand(layout.local_shape))
    made.shard_spec = layout
    return made
