"""Host memory to which a save is copied before a thread writes it, so that training waits at most for the copy.

One buffer for all tensors of a save, allocated and touched once, so that later copies cause no page faults. With a
folder (`ckpt.async_upload_tmp_folder`, such as /dev/shm) it is an unnamed file there, which disappears however the
process ends. For a GPU the buffer is page-locked in place, because torch's pinned memory has sizes of powers of two and
is never freed.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from internlm_lite.mesh.comm import GPU_ERRORS
from internlm_lite.units import human_bytes, round_up

logger = logging.getLogger("internlm_lite")
_ALIGNMENT_BYTES = 64


class Staging:
    """Holds host copies of the tensors of one save; the next `copy` overwrites them."""

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._locked = False
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None
        self._sources: list[torch.Tensor] = []
        """What the copy under way reads; its memory must not be freed before `_copied`."""

    def reserve(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the buffer large enough for `tensors`, ahead of the first `copy`. Logs a warning if that fails."""
        size = _size_of(tensors)
        if size <= self._buffer.numel():
            return
        self.close()  # never both buffers at a time
        try:
            self._buffer = self._allocate(size)
        except (RuntimeError, MemoryError) as error:  # what torch and CUDA raise
            logger.warning(
                "no %s of host memory to copy a checkpoint into (%s): training waits while it is written",
                human_bytes(size), str(error).partition("\n")[0],
            )  # fmt: skip
        else:
            self._lock()

    def close(self) -> None:
        """Release the buffer; its memory is freed when the copies in it are."""
        with suppress(*GPU_ERRORS):
            self.wait_copied()
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
            self._locked = False
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Host copies with the same shapes and dtypes; None if there is no memory.

        On CUDA the copying is enqueued on the current stream: call `wait_copied` before reading the copies, and
        `allow_changes` before changing `tensors`."""
        self.wait_copied()
        self.reserve(tensors)
        copies, offset = [], 0
        if _size_of(tensors) > self._buffer.numel():
            return None
        for tensor in tensors:
            slot = self._buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(slot.copy_(tensor.detach(), non_blocking=True))
            offset += round_up(tensor.nbytes, _ALIGNMENT_BYTES)
        if self._device.type == "cuda":
            self._sources, self._copied = list(tensors), torch.cuda.Event()
            self._copied.record()
        return copies

    def wait_copied(self) -> None:
        """Block until the last copy is complete. Any thread."""
        if (copied := self._copied) is not None:
            copied.synchronize()
            self._copied, self._sources = None, []

    def allow_changes(self) -> None:
        """Work enqueued on the current stream from now on may change what the last copy reads: it runs after it."""
        if (copied := self._copied) is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def _allocate(self, size: int) -> torch.Tensor:
        if self._folder is not None:
            try:
                return _mapped(self._folder, size)
            except OSError as error:
                logger.warning(
                    "ckpt.async_upload_tmp_folder %s cannot take %s for checkpoints (%s): ordinary memory is used",
                    self._folder, human_bytes(size), error.strerror,
                )  # fmt: skip
        return torch.empty(size, dtype=torch.uint8).zero_()

    def _lock(self) -> None:
        """Page-lock the buffer, because the GPU copies to pageable memory more slowly."""
        if self._device.type != "cuda":
            return
        answer = int(torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self._buffer.numel(), 0))
        self._locked = answer == 0
        if not self._locked:
            _forget_error(self._device)
            logger.warning(
                "CUDA refuses to page-lock %s of host memory for checkpoints (error %d): copying them takes longer",
                human_bytes(self._buffer.numel()), answer,
            )  # fmt: skip


def _forget_error(device: torch.device) -> None:
    """Clear CUDA's last error, which the next kernel launch would otherwise raise."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)


def _size_of(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of a buffer for `tensors`."""
    return sum(round_up(tensor.nbytes, _ALIGNMENT_BYTES) for tensor in tensors)


def _mapped(folder: Path, size: int) -> torch.Tensor:
    """[size] uint8 tensor in an unnamed file of `folder`. Raises OSError when it does not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # fails here on a full tmpfs, instead of SIGBUS later
        return torch.frombuffer(mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE), dtype=torch.uint8)
    finally:
        os.close(descriptor)
