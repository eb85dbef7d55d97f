"""Compiling parts of a training pass, one graph for all layers and steps.

A compiled function within a compiled function becomes a part of its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
COMPILER = "inductor"
"""torch.compile's backend."""


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled at its first call for each shape. Raises then, rather than run it in parts or uncompiled.

    A parameter whose `.grad` has another dtype is refused: see `layers.weight_grads`."""
    return torch.compile(function, backend=COMPILER, fullgraph=True, dynamic=False)


def compiled_in_training(function: Callable[P, R], *, wanted: bool) -> Callable[P, R]:
    """`function`, compiled where gradients are enabled: evaluation and generation have many shapes. As it is unless
    `wanted`."""
    if not wanted:
        return function
    fast = compiled(function)

    @wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        return fast(*arguments, **named) if torch.is_grad_enabled() else function(*arguments, **named)

    return call
