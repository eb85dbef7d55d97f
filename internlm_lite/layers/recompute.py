"""Selective recomputation (model.checkpoint="selective"): outputs of matrix products and of attention are kept; what is
cheap to compute between them is computed again in the backward pass.

    x -> norm -> product         keeps x, not the norm's output
    gate, up -> silu(gate) * up -> product        keeps gate and up

A linear layer's input is therefore passed on with its `Recipe`. No product, attention or collective runs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

Recipe = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]
"""How a tensor was made: function(*inputs)."""


def with_recipe(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, Recipe | None]:
    """function(*inputs) and, if `wanted`, the recipe to keep in its place. In a graph of torch.compile the operations
    themselves are marked, because the compiler decides what a graph keeps."""
    if not wanted or not torch.is_grad_enabled():
        return function(*inputs), None
    if torch.compiler.is_compiling():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False), None
    return function(*inputs), (function, inputs)


def made_again(function: Callable[..., torch.Tensor] | None, kept: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor of a recipe in the backward pass; without a function, what was kept is the tensor."""
    if function is None:
        return kept[0]
    with torch.enable_grad():  # as it was in the forward pass: compiled functions run uncompiled without gradients
        return function(*(tensor.detach().requires_grad_() for tensor in kept)).detach()
