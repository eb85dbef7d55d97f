"""Copies of a save on a simulated GPU: what waits for what, and what is kept until then."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

from internlm_lite.checkpoint.save.saver import SaveOptions, Saver
from internlm_lite.checkpoint.save.staging import Staging
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.runtime.device import use_device
from tests.gpu_queue import Gpu, gpu

__all__ = ["gpu"]
CUDA = torch.device("cuda", 1)


@pytest.fixture
def staging(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Staging:
    monkeypatch.setattr(Staging, "_lock", lambda self: None)
    return Staging(None, CUDA)


def test_the_copy_runs_beside_the_compute_stream_and_the_update_waits_for_it(gpu: Gpu, staging: Staging) -> None:
    master, beside = gpu.tensor(0.0, 0.0), torch.cuda.Stream()
    gpu.launch("step", lambda: master.fill_(1.0))
    mark = torch.cuda.Event()
    mark.record()
    beside.wait_event(mark)
    with torch.cuda.stream(beside):
        (copy,) = staging.copy([master]) or ()
    gpu.launch("forward")
    staging.allow_changes()
    gpu.launch("update", lambda: master.fill_(2.0))
    assert gpu.ran == [], "the host waited for nothing"
    gpu.main.synchronize()  # the update as early as the queue allows
    assert gpu.ran == ["step", "forward", "copy", "update"]
    assert copy.tolist() == [1.0, 1.0]


def test_an_update_that_does_not_wait_is_seen_in_the_copy(gpu: Gpu, staging: Staging) -> None:
    master, beside = gpu.tensor(1.0), torch.cuda.Stream()
    with torch.cuda.stream(beside):
        (copy,) = staging.copy([master]) or ()
    gpu.launch("update", lambda: master.fill_(2.0))
    gpu.main.synchronize()
    staging.wait_copied()
    assert copy.tolist() == [2.0], "so the test above can fail"


def test_the_writer_waits_for_the_copy_and_no_further(gpu: Gpu, staging: Staging) -> None:
    (copy,) = staging.copy([gpu.tensor(3.0)]) or ()
    gpu.launch("forward")
    assert copy.tolist() != [3.0], "not yet"
    writer = threading.Thread(target=staging.wait_copied)
    writer.start()
    writer.join()
    assert copy.tolist() == [3.0] and gpu.ran == ["copy"]


def test_pinned_memory_is_not_written_again_while_a_copy_is_in_flight(gpu: Gpu, staging: Staging) -> None:
    staging.copy([gpu.tensor(3.0)])
    assert gpu.ran == []
    (copy,) = staging.copy([gpu.tensor(4.0)]) or ()
    assert gpu.ran == ["copy"], "the first one, before the second was enqueued"
    staging.wait_copied()
    assert copy.tolist() == [4.0]


def test_memory_is_kept_until_the_copy_is_complete(gpu: Gpu, staging: Staging) -> None:
    source = gpu.tensor(3.0)
    gone = weakref.ref(source)
    (copy,) = staging.copy([source]) or ()
    del source

    assert staging._sources and staging._sources[0] is gone()
    staging.close()
    gc.collect()
    assert gone() is None and copy.tolist() == [3.0], "closing waits: memory under a copy must not be unlocked"


def test_a_lost_device_does_not_hide_why_the_run_ends(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Staging) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Staging, "wait_copied", lost)
    staging.close()
    assert staging._buffer.numel() == 0


def test_the_writer_thread_uses_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((threading.current_thread().name, device)))
    saver = Saver(single_process_mesh(CUDA), {}, (), SaveOptions())
    saver._start_thread()
    saver._thread.shutdown()
    assert used == [("checkpoint_0", CUDA)]
    use_device(torch.device("cpu"))
    assert len(used) == 1
