"""Where a unit's forward and backward passes begin and end: what is given memory there, and what is freed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn


def parameters_read(unit: nn.Module) -> list[nn.Parameter]:
    """What a forward pass of `unit` reads: its own parameters, and those that it shares with the unit that has them."""
    return [*unit.parameters(), *getattr(unit, "borrowed", ())]


class UnitListener(Protocol):
    """Called with the number of a unit, in forward order. A backward pass that recomputes a unit's forward pass does so
    between `before_backward` and `after_backward`, without further calls."""

    def before_forward(self, unit: int) -> None: ...

    def after_forward(self, unit: int) -> None: ...

    def before_backward(self, unit: int) -> None: ...

    def after_backward(self, unit: int) -> None:
        """The gradient of the unit's input is there, those that its layers add are, too. Not called of a unit whose
        input has none."""


class BackwardReached(torch.autograd.Function):
    """The identity; calls a function when the backward pass arrives."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.call()
        return grads[0], None


def follow(units: Sequence[nn.Module], listeners: Sequence[UnitListener]) -> None:
    """Call the listeners, in their order, in all passes of `units` from now on."""
    for number, unit in enumerate(units):
        unit.register_forward_pre_hook(functools.partial(_enter, number, listeners))
        unit.register_forward_hook(functools.partial(_leave, number, listeners))


def _enter(number: int, listeners: Sequence[UnitListener], _unit: nn.Module, inputs: tuple[Any, ...]) -> Any:
    for listener in listeners:
        listener.before_forward(number)
    if not torch.is_grad_enabled() or not inputs[0].requires_grad:
        return None

    def done() -> None:
        for listener in listeners:
            listener.after_backward(number)

    return BackwardReached.apply(inputs[0], done), *inputs[1:]


def _leave(number: int, listeners: Sequence[UnitListener], _unit: nn.Module, _inputs: Any, output: Any) -> Any:
    for listener in listeners:
        listener.after_forward(number)
    first = output if isinstance(output, torch.Tensor) else output[0]
    if not torch.is_grad_enabled() or not first.requires_grad:
        return None

    def begin() -> None:
        for listener in listeners:
            listener.before_backward(number)

    marked = BackwardReached.apply(first, begin)
    return marked if isinstance(output, torch.Tensor) else output._replace(**{output._fields[0]: marked})
