"""Training steps on a GPU against the same steps in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm_lite.apps.bench.shapes import random_batch
from internlm_lite.layers.flash import packed
from internlm_lite.mesh.mesh import single_process_mesh
from tests.corpus import write_corpus
from tests.gpu.pieces import config_of, losses_and_norms, trainer_of
from tests.train.runs import STEPS, curve, run_training, tiny
from tests.train.test_resume import killed_after

CPU = torch.device("cpu")
LIMITS = {"float32": (5e-5, 1e-3), "tf32": (5e-3, 2e-2), "bfloat16": (2e-2, 5e-2), "float16": (5e-3, 2e-2)}
"""Largest relative errors of loss and gradient norm."""


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, float]]:
    config = config_of("float32")
    return losses_and_norms(trainer_of(config, CPU), config)


@pytest.fixture(autouse=True)
def numerics() -> Iterator[None]:
    """As before, whatever a test switches on."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


def worst(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest relative error of a loss, and of a norm."""
    errors = [[abs(a / b - 1) for a, b in zip(*pair, strict=True)] for pair in zip(found, expected, strict=True)]
    return max(error[0] for error in errors), max(error[1] for error in errors)


@pytest.mark.parametrize("dtype", LIMITS)
def test_every_dtype(dtype: str, device: torch.device, expected: list[tuple[float, float]]) -> None:
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    config = config_of(dtype)
    loss, norm = worst(losses_and_norms(trainer_of(config, device), config), expected)
    assert loss < LIMITS[dtype][0] and norm < LIMITS[dtype][1]


@pytest.mark.parametrize(
    "model",
    [
        {"num_kv_attention_heads": 1, "no_bias": False, "checkpoint": 1.0},
        {"apply_post_layer_norm": True, "tie_word_embeddings": True},
        {"use_fp32_norm": True},
    ],
    ids=["grouped heads, biases, recomputed", "post-norm, tied", "norms in fp32"],
)
def test_other_models(model: dict[str, Any], device: torch.device) -> None:
    dtype = "bfloat16" if "use_fp32_norm" in model else "float32"
    reference, config = config_of("float32", **model), config_of(dtype, **model)
    expected = losses_and_norms(trainer_of(reference, CPU), reference)
    loss, norm = worst(losses_and_norms(trainer_of(config, device), config), expected)
    assert loss < LIMITS[dtype][0] and norm < LIMITS[dtype][1]


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale(device: torch.device) -> None:
    config = config_of("float16", scale=2.0**40)
    trainer = trainer_of(config, device)
    before = [bucket.weights.clone() for bucket in trainer.optimizer.buckets]
    outcome = trainer.step(random_batch(config, 0, device), 0)
    trainer.optimizer.wait_weights()
    assert outcome.skips.skipped_steps.item() == outcome.skips.consecutive_overflows.item() == 1
    assert outcome.loss_scale.item() == 2.0**40 and trainer.optimizer.loss_scale.item() == 2.0**39
    assert all(torch.equal(a, b.weights) for a, b in zip(before, trainer.optimizer.buckets, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_documents_losses_do_not_depend_on_its_neighbour(dtype: str, device: torch.device) -> None:
    trainer = trainer_of(config_of(dtype), device)
    model, borders = trainer.stages[0], (0, 100, 101, 256)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)]).to(device)
    attend = packed(trainer.backend, torch.tensor(borders, dtype=torch.int32, device=device), borders, 155)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (256,), generator=generator).to(device)

    @torch.no_grad()
    def losses() -> torch.Tensor:
        hidden = model.hidden(tokens, positions, attend)
        return model.losses(hidden, tokens.roll(-1), torch.ones((), device=device)).token_loss

    before = losses()
    tokens[:98] = tokens[:98].flip(0)
    after = losses()
    torch.testing.assert_close(after[100:255], before[100:255], rtol=0, atol=1e-5)
    assert (after[:98] - before[:98]).abs().max() > 1e-2


def test_a_resumed_run_has_the_same_bits(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deterministic algorithms. The save is copied and written while the next steps change what is saved."""
    torch.use_deterministic_algorithms(True)
    mesh, corpus = single_process_mesh(device), write_corpus(tmp_path / "corpus")
    saves = {"enable_save_ckpt": True, "save_ckpt_folder": f"local:{tmp_path}/saves", "checkpoint_every": 4}

    def config(**ckpt: Any) -> Any:
        return tiny(corpus, ckpt=ckpt, model={"dtype": "torch.bfloat16", "hidden_size": 64})

    whole = run_training(mesh, config(), tmp_path / "whole")
    killed_after(6, mesh, config(**saves), tmp_path / "killed", monkeypatch)
    resumed = run_training(mesh, config(**saves), tmp_path / "resumed")
    assert [row["step"] for row in resumed] == list(range(4, STEPS))
    assert curve(resumed) == curve(whole)[4:]
