"""A whole training step on fake CUDA tensors: no device is mixed, and the host reads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from internlm_lite.apps.bench.fake_cuda import HostWaits, fake_batch, fake_cuda
from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.config.schema import EmaConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.train import trainer as trainer_module
from internlm_lite.train.trainer import Trainer

SHAPE = {"hidden": 64, "layers": 2, "heads": 2, "vocab": 256, "seq_len": 32, "micro_bsz": 2, "micro_num": 2}


@pytest.fixture
def device() -> Iterator[torch.device]:
    with fake_cuda() as device:
        yield device


def built(
    dtype: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, ema: EmaConfig | None = None, **model: Any
) -> tuple[Trainer, Any]:
    monkeypatch.setattr(trainer_module, "initialise", lambda *_: None)
    config = bench_config(**SHAPE, dtype=f"torch.{dtype}")
    config = config.model_copy(update={"model": config.model.model_copy(update=model), "ema": ema})
    trainer = Trainer(config, single_process_mesh(device))
    return trainer, config


@pytest.mark.parametrize(
    ("dtype", "model"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"fp8": True}),
        ("float16", {}),
        ("float32", {}),
        ("bfloat16", {"use_fp32_norm": True, "checkpoint": 1.0, "tie_word_embeddings": True}),
        ("bfloat16", {"embedding_dropout": 0.1, "residual_dropout": 0.2}),
        ("bfloat16", {"attention_dropout": 0.1, "checkpoint": "selective"}),
        ("bfloat16", {"checkpoint": "offload"}),
    ],
)
def test_a_step_mixes_no_devices_and_reads_nothing(
    dtype: str, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = random_batch(bench_config(**SHAPE, dtype="torch.float32"), 0, torch.device("cpu"))
    with fake_cuda() as device:
        trainer, _ = built(dtype, device, monkeypatch, **model)
        assert (trainer.backend is AttentionBackend.SDPA) == (dtype == "float32" or "attention_dropout" in model)
        batch = fake_batch(host, device)
        with HostWaits() as waits:
            outcomes = [trainer.step(batch, step) for step in range(2)]
            trainer.optimizer.wait_weights()
    assert not waits.found
    for outcome in outcomes:
        assert outcome.norm_model_dtype.device == device and outcome.skips.skipped_steps.device == device
    for bucket in trainer.optimizer.buckets:
        assert bucket.weights.device == bucket.grads.device == device


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_average_is_updated_and_used_without_a_wait(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the step, on a stream of its own: the next update, and what reads the average, wait on the device."""
    host = random_batch(bench_config(**SHAPE, dtype="torch.float32"), 0, torch.device("cpu"))
    with fake_cuda() as device:
        trainer, _ = built(dtype, device, monkeypatch, EmaConfig(every=2))
        batch, average = fake_batch(host, device), trainer.optimizer.average
        assert average is not None
        order: list[str] = []
        moving, waiting, updating = average._move, average.wait, trainer.optimizer._updates.update
        monkeypatch.setattr(average, "_move", lambda rate: (order.append("move"), moving(rate)))
        monkeypatch.setattr(average, "wait", lambda: (order.append("wait"), waiting()))
        monkeypatch.setattr(
            trainer.optimizer._updates, "update", lambda *given: (order.append("update"), updating(*given))
        )
        with HostWaits() as waits:
            for step in range(3):
                trainer.step(batch, step)
            with trainer.optimizer.averaged():
                trainer.optimizer.wait_weights()
    assert not waits.found
    assert order == ["wait", "update", "wait", "update", "move", "wait", "update", "wait"]
    assert {value.device for value in average.values} == {device}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda x: x + torch.zeros(3), "device"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_a_mistake_raises(mistake: Callable[[torch.Tensor], object], message: str, device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises(Exception, match=message):
        mistake(x)


@pytest.mark.parametrize(
    "copy", [lambda x: x.cpu(), lambda x: x.copy_(torch.ones(3)), lambda x: torch.tensor(1.0, device=x.device)]
)
def test_a_copy_is_a_wait(copy: Callable[[torch.Tensor], object], device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with HostWaits() as waits:
        x.mul_(2.0).add_(x.sum())
        assert not waits.found
        copy(x)
    assert waits.found
