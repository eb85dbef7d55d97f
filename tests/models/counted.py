"""What torch counts of a computation: FLOPs of its matrix products, bytes of the tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def _addmm_flops(own: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def counted_flops(run: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """(forward without gradients, forward and backward) of what `run` computes.

    In-place products are unknown to torch's counter. Its formula for the fused backward pass of attention counts the
    recomputed scores, and that of the CPU is unknown to it; the plain kernel consists of products that it counts.
    """
    counts = []
    for grad in (False, True):
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad), counter:
            y = run()
            if grad:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def saved_bytes(run: Callable[[], torch.Tensor], module: nn.Module, known: Iterable[torch.Tensor] = ()) -> int:
    """Storages that a forward pass keeps for its backward pass, each once; not those of the module or of `known`."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # alive, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run()
    for tensor in (*module.parameters(), *module.buffers(), *known):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    # The fused loss keeps its gradients on its node, past the hooks of saved tensors.
    gradients = [made for made in getattr(y.grad_fn, "gradients", ()) if made is not None]
    kept.update((made.data_ptr(), made.untyped_storage()) for made in gradients)
    return sum(storage.nbytes() for storage in kept.values())
