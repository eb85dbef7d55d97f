"""The run folder: names, the `latest` link, copies of config files, and no secrets."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml

from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError, StorageError
from internlm_lite.runtime.folder import (
    create_run_folder,
    environment,
    git_commit,
    mask_source,
    point_latest,
    write_config,
    write_environment,
)
from internlm_lite.runtime.place import Place

NOW = datetime(2023, 11, 10, 11, 45, 20, tzinfo=timezone.utc)
PLACE = Place(0, 2, 0, 2, "gpu01", "torch", "started by torchrun", "gpu01", 29500)
CONFIG = Config.model_validate(
    {
        "JOB_NAME": "20b_train",
        "ckpt": {"save_ckpt_folder": "boto3:s3://me:hunter2@bucket.example.com/x"},
        "data": {"seq_len": 8, "total_steps": 5},
        "lr_scheduler": {"total_steps": 5},
        "model": {"num_attention_heads": 2, "vocab_size": 64, "hidden_size": 8, "num_layers": 1},
    }
)


def test_layout_and_latest(tmp_path):
    first = create_run_folder(tmp_path, "20b_train", NOW)
    assert first == tmp_path / "20b_train" / "2023-11-10_11-45-20"
    assert sorted(path.name for path in first.iterdir()) == ["config", "logs"]
    assert os.readlink(tmp_path / "20b_train" / "latest") == first.name
    second = create_run_folder(tmp_path, "20b_train", NOW)
    assert second.name == "2023-11-10_11-45-20-2"
    assert (tmp_path / "20b_train" / "latest").resolve() == second.resolve()
    assert not [path for path in (tmp_path / "20b_train").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\0"])
def test_job_names_that_are_no_folder_names(tmp_path, name):
    with pytest.raises(ConfigError, match="JOB_NAME"):
        create_run_folder(tmp_path, name, NOW)


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--run-dir"):
        create_run_folder(tmp_path / "file", "job", NOW)


def test_a_latest_that_cannot_be_replaced_costs_a_warning(tmp_path, caplog):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "something").write_text("")
    point_latest(tmp_path, "run")
    assert "cannot point" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_config_copies_and_resolved_values(tmp_path):
    folder = create_run_folder(tmp_path / "RUN", "job", NOW)
    sources = []
    for part, text in (("a", "x = 1\n"), ("b", 'secret_key = "hunter2"  # mine\n')):
        (tmp_path / part).mkdir()
        sources.append(tmp_path / part / "base.py")
        sources[-1].write_text(text)
    write_config(folder, CONFIG, sources)
    assert (folder / "config" / "base.py").read_text() == "x = 1\n"
    assert (folder / "config" / "base-1.py").read_text() == 'secret_key = "***"  # mine\n'
    values = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    assert values["model"]["hidden_size"] == 8 and values["adam"]["lr"] == 1e-4
    assert values["ckpt"]["save_ckpt_folder"] == "boto3:s3://***@bucket.example.com/x"
    assert not [path for path in folder.rglob("*") if path.is_file() and "hunter2" in path.read_text()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('alert = dict(hook="https://hooks.slack.com/services/T0/B0/xyz", a=1)',
         'alert = dict(hook="https://hooks.slack.com/services/***", a=1)'),
        ("aws = {'secret_access_key': 'abc', 'region': 'x'}", "aws = {'secret_access_key': '***', 'region': 'x'}"),
        ('F = f"boto3:s3://b.{IP}/internlm"', 'F = f"boto3:s3://b.{IP}/internlm"'),
        ('"""\ndocs with "quotes" and it\'s fine\n"""\ntokenizer = "x.model"', None),
    ],
)  # fmt: skip
def test_mask_source(text, expected):
    assert mask_source(text) == (text if expected is None else expected)


def test_environment_has_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    argv = ["train.py", "--config", "c.py", "monitor.api_key=hunter2", "data.seq_len=8"]
    write_environment(tmp_path, PLACE, argv, "NVIDIA H200", NOW)
    text = (tmp_path / "env.json").read_text()
    found = json.loads(text)
    assert "hunter2" not in text
    assert found["command"] == ["train.py", "--config", "c.py", "monitor.api_key=***", "data.seq_len=8"]
    assert found["time"] == "2023-11-10T11:45:20+00:00" and found["host"] == "gpu01"
    assert found["packages"]["torch"] and found["why"] == "started by torchrun"
    assert found == environment(PLACE, argv, "NVIDIA H200", NOW)


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert git_commit(tmp_path) is None
    inside = git_commit(Path(__file__).parent)
    assert inside is None or len(inside["commit"]) == 40


def test_full_disk_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot write"):
        write_environment(tmp_path / "absent", PLACE, [], "cpu", NOW)
