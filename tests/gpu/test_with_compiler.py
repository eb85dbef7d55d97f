"""model.compile on a GPU, last because the compiler takes half a minute."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.apps.bench.shapes import random_batch
from tests.gpu.pieces import config_of, losses_and_norms, trainer_of, waits_raise


@pytest.mark.parametrize(("dtype", "p"), [("bfloat16", 0.0), ("float32", 0.0), ("float32", 0.1)])
def test_compiled_steps_are_those_of_eager_ones(dtype: str, p: float, gpu: torch.device) -> None:
    """And wait for nothing either. bf16: inductor keeps intermediate results in fp32, which eager steps round."""
    torch._dynamo.reset()
    dropout = {"embedding_dropout": p, "residual_dropout": p}
    eager, config = config_of(dtype, **dropout), config_of(dtype, compile=True, **dropout)
    expected = losses_and_norms(trainer_of(eager, gpu), eager)
    trainer = trainer_of(config, gpu)
    found = losses_and_norms(trainer, config)
    limit = 5e-4 if dtype == "float32" else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=limit)
    batch = random_batch(config, 9, gpu)
    with waits_raise():
        trainer.step(batch, 4)
