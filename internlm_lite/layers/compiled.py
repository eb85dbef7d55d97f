"""Compiling parts of a training pass, one graph for all layers and steps.

A compiled function within a compiled function becomes a part of its graph.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._triton import has_triton

from internlm_lite.errors import ConfigError

logger = logging.getLogger("internlm_lite")
P = ParamSpec("P")
R = TypeVar("R")
COMPILER = "inductor"
"""torch.compile's backend."""


def is_wanted(key: bool | None, device: torch.device) -> bool:
    """Whether model.compile = `key` compiles for `device`. Raises ConfigError where True cannot be met."""
    on_gpu = device.type == "cuda"
    missing = _missing_tools() if on_gpu and key is not False else ""
    if missing and key:
        raise ConfigError(f"model.compile=True: {missing}; install it, or set model.compile=False")
    if missing:
        logger.warning("training passes are not compiled, which makes them slower: %s", missing)
    return on_gpu and not missing if key is None else key


def _missing_tools() -> str:
    """What the compiler for GPUs lacks on this host; empty: nothing."""
    if not has_triton():
        return f"torch {torch.__version__} finds no Triton for this GPU"
    return "" if any(map(shutil.which, ("gcc", "clang"))) else "Triton needs a C compiler, gcc or clang"


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
