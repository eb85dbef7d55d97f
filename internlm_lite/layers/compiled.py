"""Compiling parts of a training pass, one graph for all layers and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
COMPILER = "inductor"
"""torch.compile's backend."""


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled at its first call for each shape. Raises then, rather than run it in parts or uncompiled."""
    return torch.compile(function, backend=COMPILER, fullgraph=True, dynamic=False)
