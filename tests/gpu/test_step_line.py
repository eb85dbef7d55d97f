"""Step lines and saves on a GPU; what of them runs on fake CUDA tensors is looked at everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.bench.fake_cuda import HostWaits, fake_batch, fake_cuda
from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.checkpoint.load.locate import find_step
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.save.staging import Staging
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.train import trainer as trainer_module
from internlm_lite.train.profiling import Stopwatch
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.saving import Saving
from internlm_lite.train.train_state import TrainState
from internlm_lite.train.trainer import Trainer
from tests.train.runs import run_training, tiny

SHAPE = {"hidden": 64, "layers": 2, "heads": 2, "vocab": 256, "seq_len": 32, "micro_bsz": 2, "micro_num": 2}
CUDA = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_step_with_its_line_makes_the_host_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "initialise", lambda *_: None)
    monkeypatch.setattr(comm.Pending, "ready", lambda self: False)
    monkeypatch.setattr("internlm_lite.train.reporter.peak_flops", lambda *_: None)
    monkeypatch.setattr("internlm_lite.train.reporter._peak_memory", lambda device: 0)
    config = bench_config(**SHAPE, dtype="torch.bfloat16")
    host = random_batch(bench_config(**SHAPE, dtype="torch.float32"), 0, torch.device("cpu"))
    with fake_cuda() as device:
        trainer = Trainer(config, single_process_mesh(device))
        reporter = Reporter(config, single_process_mesh(device), trainer)
        reporter.open_sinks(lambda done: Any, 0)  # type: ignore[arg-type, return-value]
        batch, state = fake_batch(host, device), TrainState()
        reporter.start(state)
        with HostWaits() as waits:
            for _ in range(2):
                outcome = trainer.step(batch, state.step)
                state = state.after(batch, 1)
                reporter.step_line(state, batch, outcome)
    assert not waits.found and len(reporter._lines) == 2


@pytest.mark.gpu
@on_gpu
def test_a_late_read_does_not_wait_for_a_busy_device() -> None:
    numbers = torch.zeros(3, device=CUDA)
    torch.cuda._sleep(10**9)
    numbers.fill_(1.0)
    read = comm.read_later(numbers)
    numbers.fill_(2.0)
    assert not read.ready(), "the device is still asleep"
    assert read.value() == [1.0, 1.0, 1.0] and read.ready()


@pytest.mark.gpu
@on_gpu
def test_a_stopwatch_measures_the_device_and_not_the_host() -> None:
    watch = Stopwatch(CUDA)
    watch.start()
    torch.cuda._sleep(10**9)
    watch.stop()
    seconds = watch.take()
    torch.cuda._sleep(10**9)
    torch.cuda.synchronize()
    assert 0.2 < seconds() < 2.0, "at 1 to 2 GHz"


@pytest.mark.gpu
@on_gpu
def test_no_copy_beside_the_compute_stream_sees_the_next_update() -> None:
    staging, beside = Staging(None, CUDA), torch.cuda.Stream()
    master = torch.zeros(10**7, device=CUDA)
    for step in range(200):
        master.fill_(step)
        mark = torch.cuda.Event()
        mark.record()
        torch.cuda._sleep(10**5)  # forward and backward pass
        beside.wait_event(mark)
        with torch.cuda.stream(beside):
            copies = staging.copy([master])
        staging.allow_changes()
        master.fill_(-1.0)
        staging.wait_copied()
        assert copies is not None and bool((copies[0] == step).all()), step
    staging.close()


@pytest.mark.gpu
@on_gpu
def test_steps_with_lines_under_torchs_own_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises for an operation that makes the host wait; events may be waited for."""
    step, line = Trainer.step, Reporter.step_line

    def watched(function: Any) -> Any:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error" if args[1] != 0 else "default")  # kernels are loaded in the first
            try:
                return function(self, *args, **named)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    monkeypatch.setattr(Trainer, "step", watched(step))
    monkeypatch.setattr(Reporter, "step_line", watched(line))
    config = tiny(None, model={"dtype": "torch.bfloat16"})
    assert len(run_training(single_process_mesh(CUDA), config, tmp_path / "run")) == 8


@pytest.mark.gpu
@on_gpu
def test_a_save_beside_the_next_step_has_the_bits_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, list[torch.Tensor]] = {}
    note = Saving.note

    def noting(self: Saving, state: TrainState, outcome: Any) -> None:
        kept[state.step] = [piece.tensor.clone() for piece in self._run.trainer.optimizer.pieces()]
        self._run.checkpoints._wait()  # every save has ended before the next is due
        note(self, state, outcome)
        assert self.can_wait() or state.step == 8

    monkeypatch.setattr(Saving, "note", noting)
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path}/saves", "checkpoint_every": 2}
    config = tiny(None, model={"dtype": "torch.bfloat16"}, ckpt=ckpt)
    mesh = single_process_mesh(CUDA)
    run_training(mesh, config, tmp_path / "run")
    trainer = Trainer(config, mesh)
    manager = CheckpointManager(None, mesh, saving=None)
    for step, expected in kept.items():
        where, name = find_step([f"local:{tmp_path}/saves"], step, None)
        pieces: list[LocalShard] = list(trainer.optimizer.pieces())
        manager.load_at(f"{where}/{name.commit}", pieces)
        assert all(torch.equal(piece.tensor, one) for piece, one in zip(pieces, expected, strict=True)), step
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [2, 4, 6, 8]
