"""Reads that wait for nothing, on a simulated GPU."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from internlm_lite.faults.waiting import waits_for_others
from internlm_lite.mesh import comm
from tests.gpu_queue import Gpu, gpu

__all__ = ["gpu"]


def test_a_late_read_has_the_values_of_its_place_in_the_queue(gpu: Gpu) -> None:
    numbers = gpu.tensor(0.0)
    gpu.launch("step 1", lambda: numbers.fill_(1.0))
    read = comm.read_later(numbers)
    gpu.launch("step 2", lambda: numbers.fill_(2.0))
    assert not read.ready() and gpu.ran == []
    assert read.value() == [1.0], "neither those before the step, nor memory that the copy has not reached"
    assert gpu.ran == ["step 1", "copy"], "nothing behind the copy was waited for"
    assert read.ready() and read.value() == [1.0]


def test_copies_that_are_under_way_do_not_share_memory(gpu: Gpu) -> None:
    numbers, reads = gpu.tensor(0.0), []
    for step in range(4):
        gpu.launch(f"step {step}", lambda step=step: numbers.fill_(step))  # type: ignore[misc]
        reads.append(comm.read_later(numbers))
    assert [read.value() for read in reversed(reads)] == [[3.0], [2.0], [1.0], [0.0]]


def test_on_the_cpu_it_is_ready_at_once_and_a_copy() -> None:
    numbers = torch.arange(3)
    read = comm.read_later(numbers)
    numbers.zero_()
    assert read.ready() and read.value() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(), (2, 0), (2, 3)])
def test_it_reads_as_read_does(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, requires_grad=True)
    assert comm.read_later(tensor).value() == comm.read(tensor)


def test_a_rank_that_waits_for_a_late_read_is_seen_to_wait() -> None:
    read, device_is_busy = comm.read_later(torch.zeros(1)), threading.Lock()
    read._arrived = SimpleNamespace(synchronize=device_is_busy.acquire)  # type: ignore[assignment]
    thread = threading.Thread(target=read.value, daemon=True)
    with device_is_busy:
        thread.start()
        while not (seen := waits_for_others(thread)) and thread.is_alive():
            time.sleep(0.001)
    thread.join(10)
    assert seen and not thread.is_alive()
