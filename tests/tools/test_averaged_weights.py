"""`--weights ema`: text, conversion and merging read the averaged weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internlm_lite.apps.convert.to_hf import open_checkpoint
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.cli import ckpt, convert, generate_text
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh
from tests.apps.convert.made import masters, save_ours, small_tokenizer


def run(tool, *arguments: object) -> int:
    return tool.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`averaged`: a checkpoint of a model, tied, with other averages; `plain`: one without."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = str(small_tokenizer(root).path)
    save_ours(root / "plain", tokenizer=tokenizer, vocab_size=300, init_std=0.3, tie_word_embeddings=True)
    pieces = []
    for name, tensor in masters(root / "plain").items():
        other = tensor.roll(1, 0).contiguous()
        box = tuple((0, n) for n in tensor.shape)
        pieces += [
            LocalShard(name, role, tuple(tensor.shape), box, None, t)
            for role, t in (("master", tensor), ("ema", other))
        ]
    found = open_checkpoint(str(root / "plain"))[0]
    manager = CheckpointManager(str(root / "averaged"), single_process_mesh(), config=found.manifest.config)
    manager.save(4, "final", pieces, {})
    assert run(ckpt, "merge", root / "ema", root / "averaged", "--weights", "ema") == 0
    return root


def text_of(capsys: pytest.CaptureFixture[str], where: Path, *options: str) -> str:
    capsys.readouterr()
    given = ("--checkpoint", where, "--prompt", "def f", "--greedy", "--max-new-tokens", "12", *options)
    assert run(generate_text, *given) == 0
    return capsys.readouterr().out


def test_text_is_that_of_the_averages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averages = text_of(capsys, folder / "averaged", "--weights", "ema")
    assert averages == text_of(capsys, folder / "ema") != text_of(capsys, folder / "averaged")
    assert text_of(capsys, folder / "averaged") == text_of(capsys, folder / "plain")


def test_conversion_is_that_of_the_averages(folder: Path, tmp_path: Path) -> None:
    for where, options in (("averaged", ("--weights", "ema")), ("ema", ()), ("plain", ())):
        assert run(convert, "to-hf", folder / where, tmp_path / where, "--verify", *options) == 0
    averages, merged, masters = (
        (tmp_path / where / "model.safetensors").read_bytes() for where in ("averaged", "ema", "plain")
    )
    assert averages == merged != masters


@pytest.mark.parametrize("tool", [generate_text, convert, ckpt], ids=["generate", "convert", "ckpt"])
def test_a_checkpoint_without_averages_is_refused(
    tool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, out = folder / "plain", tmp_path / "out"
    commands = {
        generate_text: ("--checkpoint", plain, "--prompt", "a"),
        convert: ("to-hf", plain, out),
        ckpt: ("merge", out, plain, plain),
    }
    capsys.readouterr()
    assert run(tool, *commands[tool], "--weights", "ema") == 2
    said = capsys.readouterr().err
    assert said.startswith("CheckpointError: checkpoint ") and said.count("\n") == 1
    assert "has no averaged weights (role ema), it has master: expected one of a run with ema=dict(...)" in said


def test_llama2c_is_that_of_the_averages(tmp_path: Path) -> None:
    save_ours(tmp_path / "plain", layer_norm_epsilon=1e-5, rope_base=10000, no_bias=True)
    tensors = masters(tmp_path / "plain")
    config = open_checkpoint(str(tmp_path / "plain"))[0].manifest.config
    boxes = {name: tuple((0, n) for n in tensor.shape) for name, tensor in tensors.items()}
    pieces = [
        LocalShard(name, role, tuple(t.shape), boxes[name], None, t if role == "ema" else torch.zeros_like(t))
        for name, t in tensors.items()
        for role in ("master", "ema")
    ]
    CheckpointManager(str(tmp_path / "both"), single_process_mesh(), config=config).save(4, "final", pieces, {})
    assert run(convert, "to-llama2c", tmp_path / "plain", tmp_path / "a") == 0
    assert run(convert, "to-llama2c", tmp_path / "both", tmp_path / "b", "--weights", "ema") == 0
    assert (tmp_path / "a" / "model.bin").read_bytes() == (tmp_path / "b" / "model.bin").read_bytes()
