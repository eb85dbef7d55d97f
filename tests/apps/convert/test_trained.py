"""Trained here, exported: transformers computes the same loss, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from internlm_lite.apps.convert.to_hf import open_checkpoint, write_hf
from internlm_lite.generate.load_model import load_model
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.mesh.mesh import single_process_mesh
from tests.apps.convert.made import TOKENS
from tests.apps.convert.test_families import in_float64, softmax_in_float64
from tests.apps.convert.test_shapes import OWN
from tests.train.runs import run_training, tiny

__all__ = ["softmax_in_float64"]
STEPS = 20


@pytest.mark.parametrize("family", ["llama", *(family for family in OWN if family != "internlm3")])
def test_the_loss_of_a_trained_model_is_theirs(tmp_path: Path, family: str) -> None:
    shape: dict[str, Any] = {"num_kv_attention_heads": 4} if family in ("gpt2", "gpt_neox") else {}
    if family in ("gpt2", "gemma2"):  # these are tied as published
        shape |= {"tie_word_embeddings": True, "residual_dropout": 0.1}
    if family.startswith("gemma"):
        shape["hidden_size"] = 64
    config = tiny(
        None,
        ckpt={"save_ckpt_folder": str(tmp_path / "ours"), "checkpoint_every": STEPS, "enable_save_ckpt": True},
        data={"total_steps": STEPS, "micro_num": 1},
        lr_scheduler={"total_steps": STEPS},
        model={**OWN.get(family, {}), **shape},
    )
    losses = [step["loss"] for step in run_training(single_process_mesh(), config, tmp_path / "run")]
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0]
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    write_hf(found, config, tmp_path / "hf", family=family, dtype="float64", tokenizer=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float64, local_files_only=True
    )
    ours, _ = load_model(str(tmp_path / "ours"), single_process_mesh(), "torch.float64")
    in_float64(theirs, ours)
    stage, borders = ours.any_stage, (0, len(TOKENS))
    attend = packed(AttentionBackend.SDPA, torch.tensor(borders, dtype=torch.int32), borders, len(TOKENS))
    with torch.no_grad():
        expected = cross_entropy(theirs(TOKENS[None]).logits[0, :-1], TOKENS[1:])  # its own takes them in float32
        hidden = stage.hidden(TOKENS, torch.arange(len(TOKENS)), attend)
        labels = torch.cat((TOKENS[1:], torch.tensor([-100])))
        loss = stage.losses(hidden, labels, torch.ones(())).scaled_sum / (len(TOKENS) - 1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
