"""The options of internlm-lite generate; what it generates is looked at in tests/train/test_launch.py."""

from __future__ import annotations

import torch

from internlm_lite.cli import generate_text
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import StorageError
from internlm_lite.generate import load_model


def test_settings_of_s3_reach_the_storage(monkeypatch, capsys):
    asked = []

    def refuse(path, mesh, dtype, s3):
        asked.append((path, mesh.device, dtype, s3))
        raise StorageError("it does not speak TLS (for plain http set ckpt.s3.insecure=True)")

    monkeypatch.setattr(load_model, "load_model", refuse)
    where = "boto3:s3://lab.127.0.0.1:1/x"
    options = ["--device", "cpu", "--dtype", "bfloat16", "--s3", "insecure=True"]
    assert generate_text.main(["--checkpoint", where, "--prompt", "a", *options]) == 6
    assert asked == [(where, torch.device("cpu"), "torch.bfloat16", S3Config(insecure=True))]
    assert "(for plain http set --s3 insecure=True)" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generate_text.main(["--checkpoint", str(tmp_path), "--prompt", "a", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("MeshError: --device cuda: no GPU is visible on host ") and said.count("\n") == 1
