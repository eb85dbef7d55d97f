"""Weight gradients of linear layers: computed in the backward pass, or deferred for a zero-bubble pipeline schedule.

Such a schedule splits the backward pass: dx = dy W runs first, because the previous stage waits for it; dW = dy^T x,
which no rank waits for, fills idle time (arXiv:2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from internlm_lite.mesh.layout import Parameter


class WeightGrads:
    """Shared by all linear layers of this rank's pipeline stages."""

    def __init__(self, *, deferred: bool = False) -> None:
        self.deferred = deferred
        self._waiting: list[tuple[Parameter, torch.Tensor, torch.Tensor]] = []

    def compute_or_defer(self, weight: Parameter, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """dW [out, in] = dy^T x for dy [T, out] and x [T, in]; if deferred, keeps dy and x and returns None."""
        if not self.deferred:
            return dy.t() @ x
        self._waiting.append((weight, dy, x))
        return None

    def pop_deferred(self) -> Callable[[], None]:
        """A function that computes the gradients deferred since the last call and adds them to `weight.grad`."""
        taken, self._waiting = self._waiting, []

        @torch.no_grad()
        def run() -> None:
            while taken:
                weight, dy, x = taken.pop()
                assert weight.grad is not None, "the optimizer gives every parameter its gradient buffer"
                weight.grad.add_(dy.t() @ x)
                if weight.on_manual_grad is not None:
                    weight.on_manual_grad(weight)

        return run
