"""What the host does beside a GPU: it never waits in a step, knows the device, plans its memory, reads it last."""

from __future__ import annotations

import gc
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from internlm_lite.apps.bench.gpu.two_ranks import LAYOUTS, _world
from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.order import Position
from internlm_lite.faults.waiting import waits_for_others
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import build_mesh, sizes_of
from internlm_lite.runtime.device import bind_device, peak_flops
from internlm_lite.runtime.dist_env import read_dist_env, set_defaults
from internlm_lite.train.trainer import Trainer
from tests.corpus import write_corpus
from tests.gpu.pieces import config_of, losses_and_norms, trainer_of, waits_raise
from tests.train.runs import tiny

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize(("dtype", "p"), [*((dtype, 0.0) for dtype in DTYPES), ("bfloat16", 0.1)])
def test_the_host_waits_for_nothing_in_a_step(dtype: str, p: float, gpu: torch.device) -> None:
    config = config_of(dtype, embedding_dropout=p, residual_dropout=p, attention_dropout=p)
    trainer, batch = trainer_of(config, gpu), random_batch(config, 0, gpu)
    for step in range(2):
        trainer.step(batch, step)
    with waits_raise():
        trainer.step(batch, 2)


def test_a_wait_raises(gpu: torch.device) -> None:
    x = torch.ones(1, device=gpu)
    with waits_raise(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


def test_the_peak_speed_of_this_device_is_known(gpu: torch.device) -> None:
    assert (peak_flops(gpu, "torch.bfloat16") or 0) > 1e14


def test_the_first_device_is_taken(gpu: torch.device) -> None:
    assert bind_device(read_dist_env({}), "cuda") == gpu and torch.cuda.current_device() == 0


def test_batches_come_from_page_locked_memory(gpu: torch.device, tmp_path: Path) -> None:
    config = tiny(write_corpus(tmp_path / "corpus"))
    data = open_training_data(config.data, config.model.vocab_size, 0, 1, config.seed)
    batches = data.batches(Position(), pin=True)
    for _ in range(3):
        batch = next(batches)
        assert batch.tokens.is_pinned() and batch.labels.is_pinned()
        assert torch.equal(batch.to(gpu).tokens.cpu(), batch.tokens)
    batches.close()


def test_memory_is_what_is_planned(gpu: torch.device) -> None:
    """bf16 steps of 4,096 tokens: 0.1 GB of weights, most of the rest activations."""
    shape = {"hidden": 1024, "layers": 4, "heads": 8, "vocab": 16384, "seq_len": 1024, "micro_bsz": 4, "micro_num": 2}
    config = bench_config(**shape, dtype="torch.bfloat16", bucket_size=16 * 1024**2)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer, batch = trainer_of(config, gpu), random_batch(config, 0, gpu)
    for step in range(2):
        trainer.step(batch, step)
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    planned = make_plan(config, 1, None, "cuda").ranks[0].bytes.peak
    assert 0.8 < found / planned < 1.15, (found, planned)


def test_nccl_leaves_a_lost_peer_to_the_watchdog() -> None:
    """Its monitor ends a process even where its error handling is off; what the user sets is kept."""
    environ = {"TORCH_NCCL_ENABLE_MONITORING": "1"}
    set_defaults(environ)
    assert environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0" and environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    set_defaults(environ := {})
    assert environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"


def test_a_rank_that_reads_a_busy_device_waits_for_others(gpu: torch.device) -> None:
    """The kernel may be NCCL's, which waits for a peer."""
    number = torch.ones(1, device=gpu)
    torch.cuda.synchronize()

    def read() -> None:
        torch.cuda._sleep(4 * 10**9)  # about two seconds
        comm.read(number)

    thread = threading.Thread(target=read)
    thread.start()
    end, seen = time.monotonic() + 10, False
    while thread.is_alive() and not seen and time.monotonic() < end:
        seen = waits_for_others(thread)
        time.sleep(0.01)
    thread.join()
    assert seen


def test_a_world_of_one_rank_over_nccl(gpu: torch.device, tmp_path: Path) -> None:
    """Its groups have one rank each, so the numbers are those without NCCL."""
    config = config_of("float32")
    expected = losses_and_norms(trainer_of(config, gpu), config)
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=gpu)
    try:
        one = torch.ones(3, device=gpu)
        dist.all_reduce(one)
        assert one.tolist() == [1.0] * 3
        mesh = build_mesh(sizes_of(1, 1, 1, -1), 0, gpu, timedelta(seconds=60))
        assert losses_and_norms(Trainer(config, mesh), config) == [pytest.approx(pair, rel=1e-5) for pair in expected]
    finally:
        dist.destroy_process_group()


def test_two_ranks_over_nccl(gpu: torch.device, tmp_path: Path) -> None:
    """Both on this GPU; gradient norms of three steps as over gloo on the CPU."""
    names = ["dp2 zero", "tp2"]
    assert set(names) <= LAYOUTS.keys()
    expected = _world(tmp_path / "cpu", "gloo", "cpu", names, 60)
    found = _world(tmp_path / "gpu", "nccl", "cuda:0", names, 60)
    assert found.keys() == expected.keys() == set(names)
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
