"""Bytes of tensors that are alive at a time, as torch's operators make them and Python lets them go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """While active, `most` is the largest sum of storages made since; `known` tensors are there already. `besides`:
    what else counts, asked after each operator, such as known storages that get memory and lose it."""

    def __init__(self, known: Iterable[torch.Tensor], besides: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._now, self._besides = 0, besides
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[key] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, key)
        self.most = max(self.most, self._now + self._besides())
        return made

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
