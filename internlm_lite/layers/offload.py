"""Activations of blocks in host memory between their forward and their backward pass (model.checkpoint="offload").

    forward    | block 0 | block 1     | block 2     |
    copies               | 0 -> host   | 1 -> host   |        a block's tensors leave while the next one computes
    backward   | block 2     | block 1     | block 0 |
    copies     | 1 <- host   | 0 <- host   |                  and come back while the one behind it computes

So at most two blocks that are moved have their tensors on the device. The copies run on one stream of their own, always
the same: what it does first is done first, so a host buffer that it has read may be written by its next copy. Both ends
of a copy are held until the computing stream has waited for it, and what comes back lies in memory of the computing
stream: no memory is given away while a copy reads or writes it. The host never waits.

A storage is moved once, however many tensors share it, and comes back with the same strides: bits stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from internlm_lite.mesh.comm import SideStream


@dataclass(eq=False)
class _Storage:
    """A storage of the device, as a flat tensor; at least one of both is there."""

    device: torch.Tensor | None
    host: torch.Tensor | None = None


@dataclass(eq=False)
class _BlockTensors:
    """What one block keeps of one micro-batch."""

    layer: int
    before: _BlockTensors | None
    """Of the block whose backward pass comes next."""
    storages: dict[tuple[int, torch.dtype], _Storage] = field(default_factory=dict)
    """By address and type; once they are on their way back, only saved tensors hold them."""
    in_backward: bool = False


@dataclass(frozen=True, eq=False)
class _Saved:
    """A tensor that autograd saved: `tensor`, which stayed where it is, or a view of `storage`."""

    block: _BlockTensors
    tensor: torch.Tensor | None
    storage: _Storage | None = None
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0


class HostOffload:
    """Of all blocks of a rank. On the CPU the same copies take place at once, and save nothing."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._home = torch.device("meta" if device.type == "meta" else "cpu")  # meta has no values
        self._side = SideStream(device)
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self._leaving: list[_Storage] = []
        """What the last block moved; copies may still read the device's part."""
        self._last: _BlockTensors | None = None
        self.host_bytes = 0
        """Of all host buffers; they are used again from step to step."""

    @contextmanager
    def block(self, layer: int, outside: Iterable[torch.Tensor], *, moves: bool) -> Iterator[None]:
        """Around the forward pass of a block. `moves`: floating-point tensors that are saved inside go to the host,
        but those that share memory with `outside`; else they stay, and the block before begins to come back as soon
        as the first of them is used."""
        before = self._last if self._last is not None and self._last.layer == layer - 1 else None
        block = self._last = _BlockTensors(layer, before)
        known = {tensor.untyped_storage()._cdata for tensor in outside} if moves else None
        with saved_tensors_hooks(partial(self._pack, block, known), self._unpack):
            yield
        self._let_go()
        self._send(block)

    def _pack(self, block: _BlockTensors, known: set[int] | None, tensor: torch.Tensor) -> _Saved:
        """`known`: storages that stay; None: all."""
        source = tensor.untyped_storage()
        if known is None or source._cdata in known or not tensor.is_floating_point():
            return _Saved(block, tensor if tensor.is_leaf else tensor.detach())  # an output would hold its own node
        key = source._cdata, tensor.dtype
        if key not in block.storages:
            flat = tensor.detach().as_strided((source.nbytes() // tensor.itemsize,), (1,), 0)
            block.storages[key] = _Storage(flat)
        view = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        return _Saved(block, None, block.storages[key], *view)

    def _let_go(self) -> None:
        """The device's memory of the block before, once it is copied."""
        self._side.join()
        for storage in self._leaving:
            if storage.host is not None:  # else it is wanted again already
                storage.device = None
        self._leaving = []

    def _send(self, block: _BlockTensors) -> None:
        self._leaving = list(block.storages.values())
        with self._side.current_work():
            for storage in self._leaving:
                assert storage.device is not None, "it was saved a moment ago"
                storage.host = self._buffer(storage.device)
                storage.host.copy_(storage.device, non_blocking=True)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        free = self._free.get((like.numel(), like.dtype))
        if free:
            return free.pop()
        self.host_bytes += like.nbytes
        return torch.empty(like.shape, dtype=like.dtype, device=self._home, pin_memory=self._pinned)

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        if not saved.block.in_backward:
            self._begin_backward(saved.block)
        if saved.tensor is not None:
            return saved.tensor
        assert saved.storage is not None and saved.storage.device is not None, "it has come back"
        return saved.storage.device.as_strided(saved.size, saved.stride, saved.offset)

    def _begin_backward(self, block: _BlockTensors) -> None:
        block.in_backward = True
        self._bring_back(block)  # if it is not on its way already
        self._side.join()
        before, block.before = block.before, None
        if before is not None:
            self._bring_back(before)

    def _bring_back(self, block: _BlockTensors) -> None:
        """Begin to. The memory is of the computing stream, and holds until autograd lets the tensors go."""
        storages, block.storages = list(block.storages.values()), {}
        for storage in storages:
            assert storage.device is not None or storage.host is not None, "it is somewhere"
            if storage.device is None and storage.host is not None:
                storage.device = torch.empty(storage.host.shape, dtype=storage.host.dtype, device=self._side.device)
            else:
                self._give_back(storage)
        with self._side.current_work():
            for storage in storages:
                if storage.device is not None and storage.host is not None:
                    storage.device.copy_(storage.host, non_blocking=True)
                    self._give_back(storage)
        self._leaving = [storage for storage in self._leaving if storage.host is not None]

    def _give_back(self, storage: _Storage) -> None:
        """The host's part may be overwritten by the next copy of the same stream."""
        if storage.host is not None:
            self._free.setdefault((storage.host.numel(), storage.host.dtype), []).append(storage.host)
        storage.host = None
