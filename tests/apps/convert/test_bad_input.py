"""Folders that are not what they should be: one clear error, nothing run, nothing half-made left."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_lite.apps.convert.from_hf import read_hf
from internlm_lite.apps.convert.hf_folder import INDEX
from internlm_lite.apps.convert.to_hf import open_checkpoint, write_hf
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from tests.apps.convert.made import masters, save_llama, save_ours


class _Bomb:
    def __init__(self, recipe: Path) -> None:
        self.recipe = recipe

    def __reduce__(self):
        return os.mkdir, (str(self.recipe),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder in one file."""
    save_llama(tmp_path / "hf")
    shards = sorted((tmp_path / "hf").glob("model-*"))
    save_file({k: v for shard in shards for k, v in load_file(shard).items()}, tmp_path / "hf" / "model.safetensors")
    for file in [*shards, tmp_path / "hf" / INDEX]:
        file.unlink()
    return tmp_path / "hf"


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path, kind: type[InternLMError] = CheckpointError) -> str:
    """The message; nothing was committed."""
    out = folder.parent / "out"
    with pytest.raises(kind) as caught:
        read_hf(folder, str(out))
    assert committed(LocalStorage(out)) == []
    assert not list(out.glob("data/*")), "no data without a commit stays"
    return str(caught.value)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(folder, file):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(_Bomb(folder / "ran")))
    text = refusal(folder)
    assert f"found {file}, which is pickled" in text and "\n" not in text
    assert not (folder / "ran").exists()


def test_safetensors_are_read_beside_pickles(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(folder / "ran")))
    read_hf(folder, str(folder.parent / "out"))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors", 7])
def test_an_index_cannot_point_out_of_the_folder(folder, file):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    assert INDEX in refusal(folder)


def test_what_the_index_promises_must_be_there(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"gone": "model-00001-of-00001.safetensors"}}))
    assert "tensor gone is missing" in refusal(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"gone": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors: No such file" in refusal(folder)


def test_missing_and_unknown_tensors_are_named(folder):
    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
        weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)

    change_weights(folder, change)
    text = refusal(folder)
    assert "missing: model.layers.1.mlp.up_proj.weight" in text and "missing: model.norm.weight" in text
    assert "unknown: model.layers.0.self_attn.q_norm.weight [8]" in text


def test_biases_that_the_config_does_not_know_are_named(folder):
    change_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert "unknown: model.layers.0.self_attn.q_proj.bias" in refusal(folder)


def test_old_rotary_buffers_are_passed_over(folder):
    change_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    read_hf(folder, str(folder.parent / "out"))


def test_a_wrong_shape_is_named(folder):
    change_config(folder, vocab_size=100)
    assert "model.embed_tokens.weight: [96, 64], config.json says [100, 64]" in refusal(folder)


def test_integers_are_no_weights(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert "model.norm.weight: torch.int8, expected floating point" in refusal(folder)


def test_a_missing_head_says_what_the_config_says(folder):
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    assert "lm_head.weight is missing, but config.json says tie_word_embeddings=false" in refusal(folder)


def test_a_tied_head_saved_twice_must_be_the_same(folder):
    change_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(folder)
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    read_hf(folder, str(folder.parent / "out"))
    assert "output.weight" not in masters(folder.parent / "out")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_cut_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(folder)


def test_a_header_that_lies_about_its_length_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "a header of 1099511627784 bytes" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{" * 100_000])
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_a_folder_that_is_none(tmp_path):
    assert "expected a folder with config.json" in refusal(tmp_path / "nothing")


def test_a_save_folder_with_checkpoints_is_left_alone(folder, tmp_path):
    save_ours(tmp_path / "ours")
    before = committed(LocalStorage(tmp_path / "ours"))
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        read_hf(folder, str(tmp_path / "ours"))
    assert committed(LocalStorage(tmp_path / "ours")) == before


def test_a_damaged_checkpoint_is_named_and_leaves_nothing(tmp_path):
    save_ours(tmp_path / "ours")
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    path = tmp_path / "ours" / found.folder / "rank-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: tensor master/.*: damaged"):
        write_hf(found, config, tmp_path / "hf", family="llama", dtype="float32", tokenizer=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    save_ours(tmp_path / "ours")
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    with pytest.raises(CheckpointError, match="choose a folder that does not exist, or is empty"):
        write_hf(found, config, tmp_path / "hf", family="llama", dtype="float32", tokenizer=None)
    (tmp_path / "hf" / "mine").unlink()
    write_hf(found, config, tmp_path / "hf", family="llama", dtype="float32", tokenizer=None)
    assert (tmp_path / "hf" / "config.json").exists()


def test_the_folder_one_is_in_is_not_replaced(tmp_path, monkeypatch):
    save_ours(tmp_path / "ours")
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path("."), Path.cwd()):
        with pytest.raises(CheckpointError, match="this is the folder you are in; give the name of one to make"):
            write_hf(found, config, out, family="llama", dtype="float32", tokenizer=None)


def test_storage_that_fails_is_said_and_leaves_nothing(tmp_path):
    save_ours(tmp_path / "ours")
    found, config, _ = open_checkpoint(str(tmp_path / "ours"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        write_hf(found, config, tmp_path / "file" / "hf", family="llama", dtype="float32", tokenizer=None)
