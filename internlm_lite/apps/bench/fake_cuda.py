"""Fake CUDA tensors: shapes, dtypes and devices as on a GPU, without numbers, memory or a GPU.

The code that CUDA would take runs on them, backward pass included. An operation that mixes devices raises, and so does
one whose shape depends on numbers; `HostWaits` records copies for which the host would wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before its functions are patched
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm_lite.batch import Batch
from internlm_lite.layers import weight_grads
from internlm_lite.mesh.layout import Parameter

DEVICE = torch.device("cuda", 0)
Operation = Any
"""torch._ops.OpOverload"""


class _FakeCuda(FakeTensorMode):
    """Tensors are on `DEVICE` for Python and on meta for C++: a build for CPUs has no autograd engine of CUDA."""

    def __torch_dispatch__(
        self, func: Operation, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if (device := named.get("device")) is not None and torch.device(device).type == "meta":
            named["device"] = DEVICE  # C++ asked for a tensor like one of ours
        if func._schema.name == "aten::_fused_adamw_":
            return None
        if func is torch.ops.aten.addmm.dtype_out:
            return named["out"]  # of torch 2.11 cannot be faked
        return super().__torch_dispatch__(func, types, args, named)


class _Stream:
    """Of torch.cuda.Stream and Event what does not make the host wait."""

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    record_event = wait = wait_event = wait_stream = record


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """While it lasts, tensors made on the device it yields are fake ones."""
    subclass = torch.Tensor._make_subclass
    like_parameters = {name: getattr(Parameter, name) for name in Parameter.__annotations__ if hasattr(Parameter, name)}
    cuda: dict[str, Any] = {
        "Event": _Stream,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: stream,
        "get_device_capability": lambda device=None: (9, 0),
    }
    with ExitStack() as patches:
        enter = patches.enter_context
        enter(mock.patch.object(torch.Tensor, "_make_subclass", _without("dispatch_device", subclass)))
        enter(mock.patch.object(F, "rms_norm", _fused_norm))
        for name, value in {**like_parameters, "is_cuda": property(lambda x: x.device.type == "cuda")}.items():
            enter(mock.patch.object(FakeTensor, name, value, create=True))
        for name, value in cuda.items():
            enter(mock.patch.object(torch.cuda, name, value))
        enter(mock.patch.object(weight_grads, "adds_in_fp32", lambda dtype, device: True))
        enter(_FakeCuda())
        yield DEVICE


def _fused_norm(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed: torch.Tensor = torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]
    return normed


def _without(option: str, function: Any) -> Any:
    return staticmethod(lambda *args, **kwargs: function(*args, **{k: v for k, v in kwargs.items() if k != option}))


def fake_batch(batch: Batch, device: torch.device) -> Batch:
    """`batch` with tensors on the fake `device`; call it inside `fake_cuda`."""
    tensors = {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), torch.Tensor)}
    made: dict[str, Any] = {n: torch.empty(x.shape, dtype=x.dtype, device=device) for n, x in tensors.items()}
    return replace(batch, **made)


class HostWaits(TorchDispatchMode):
    """`found`: operations between host and device, for which the host waits. Reading a number raises."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Operation, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten.copy_.default and args[2:] == (True,):
            return out  # non_blocking, which the project uses with pinned memory
        copies = func._schema.name in ("aten::copy_", "aten::_to_copy")
        # A number in a tensor of the host is an argument of the kernel, unless it is copied.
        if len({x.device.type for x in tensors if copies or x.dim()}) > 1:
            self.found.append(str(func))
        return out
