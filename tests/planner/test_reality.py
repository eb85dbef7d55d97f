"""Predicted memory against what a 100M-parameter model takes on this machine."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from internlm_lite.mesh.mesh import Mesh
from internlm_lite.planner.plan import make_plan
from tests.planner.steps import Trainer, small
from tests.world import run_world

MODEL = {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "vocab_size": 16384, "multiple_of": 256}


def resident() -> int:
    """Bytes of memory of this process that are in RAM, once freed heap is given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def storages(trainer: Trainer) -> int:
    """Bytes of weights, gradients and optimizer state, each storage once."""
    optimizer = trainer.optimizer
    tensors: list[torch.Tensor] = [tensor for bucket in optimizer.buckets for tensor in (bucket.weights, bucket.grads)]
    tensors += optimizer._masters
    tensors += [state[name] for state in optimizer._adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _measure(mesh: Mesh, dtype: str) -> tuple[int, int]:
    """(bytes of storages, growth of resident memory), after two steps."""
    Trainer.build(small(model={"dtype": dtype}), mesh).step()  # what torch loads and keeps on first use is there now
    before = resident()
    trainer = Trainer.build(small(model={**MODEL, "dtype": dtype}), mesh)
    for index in range(2):
        trainer.step(index)
    return storages(trainer), resident() - before


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_predicted_memory_is_what_a_100m_model_takes(dtype: str) -> None:
    config = small(model={**MODEL, "dtype": dtype})
    (plan,) = make_plan(config, 1, None, "cpu").ranks
    assert 90e6 < plan.parameters < 130e6
    predicted = plan.bytes.weights + plan.bytes.gradients + plan.bytes.optimizer
    ((exact, grown),) = run_world(_measure, 1, (dtype,))
    assert predicted == exact
    assert abs(grown - predicted) < 0.05 * predicted, (grown, predicted)
