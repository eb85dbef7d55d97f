"""Conversion and tools/ckpt.py against a real S3 server."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.apps.convert.to_hf import MasterRows, open_checkpoint
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.cli import ckpt, convert
from internlm_lite.config.schema import S3Config
from tests.apps.convert.made import masters, save_ours, small_tokenizer

INSECURE = S3Config(insecure=True)


def run(tool, *arguments: object) -> int:
    return tool.main([*(str(argument) for argument in arguments), "--s3", "insecure=True"])


@pytest.fixture
def converted(tmp_path, s3_folder) -> str:
    """A checkpoint on S3 that came from a folder of safetensors, with its tokenizer."""
    tokenizer = small_tokenizer(tmp_path)
    save_ours(tmp_path / "ours", tokenizer=str(tokenizer.path), vocab_size=300)
    assert run(convert, "to-hf", tmp_path / "ours", tmp_path / "hf") == 0
    assert run(convert, "from-hf", tmp_path / "hf", s3_folder, "--verify") == 0
    return s3_folder


def test_conversion_there_and_back(converted, tmp_path, capsys):
    rows = MasterRows(open_checkpoint(converted, INSECURE)[0])
    expected = masters(tmp_path / "ours")
    assert all(torch.equal(rows.read(name, 0, shape[0]), expected[name]) for name, shape in rows.shapes.items())
    stored = open_storage(converted, INSECURE).read("tokenizer.model", 10**7)
    assert stored == (tmp_path / "small.model").read_bytes()
    capsys.readouterr()
    assert run(convert, "to-hf", converted, tmp_path / "again", "--verify") == 0
    assert "no tokenizer copied" in capsys.readouterr().out
    for file in ("config.json", "model.safetensors"):
        again = (tmp_path / "again" / file).read_bytes()
        assert (again == (tmp_path / "hf" / file).read_bytes()) == (file != "config.json")


def test_merge_from_there_and_here_to_there(converted, tmp_path, capsys):
    out = f"{converted}-merged"
    assert run(ckpt, "merge", out, converted, tmp_path / "ours", "--weights", "1,2") == 0
    assert run(ckpt, "verify", out) == 0 and "good, every byte" in capsys.readouterr().out
    found = open_checkpoint(out, INSECURE)[0]
    rows, expected = MasterRows(found), masters(tmp_path / "ours")
    assert all(torch.equal(rows.read(name, 0, shape[0]), expected[name]) for name, shape in rows.shapes.items())
    assert [one["folder"] for one in found.manifest.state["merged"]["checkpoints"]] == [
        open_storage(converted, INSECURE).name,
        f"local:{tmp_path}/ours",
    ]


def test_ls_verify_and_prune(converted, capsys):
    storage = open_storage(converted, INSECURE)
    (name,) = committed(storage)
    capsys.readouterr()
    assert run(ckpt, "ls", converted) == 0 and f"{name}" in capsys.readouterr().out
    assert run(ckpt, "verify", f"{converted}/data/{name}") == 0 and "good, every byte" in capsys.readouterr().out
    assert run(ckpt, "prune", converted, "--keep", "1") == 0 and "nothing to remove" in capsys.readouterr().out
    key = f"{name.folder}/rank-00000.safetensors"
    raw = bytearray(storage.read(key, 10**9))
    raw[-1] ^= 1
    storage.put(key, [bytes(raw)])
    assert run(ckpt, "verify", converted) == 2
    assert f"{storage.name}/{key}: tensor master/" in capsys.readouterr().out
    assert run(ckpt, "prune", converted, "--keep", "1") == 2 and committed(storage) == [name]
