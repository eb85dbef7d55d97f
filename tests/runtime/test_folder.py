"""The run folder: names, the `latest` link, copies of config files, and no secrets."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml

from internlm_lite.config.load import LoadedConfig
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError, StorageError
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.folder import (
    agents_of,
    code_digest,
    create_run_folder,
    environment,
    find_run_folder,
    git_commit,
    point_latest,
    write_start,
)

NOW = datetime(2023, 11, 10, 11, 45, 20, tzinfo=timezone.utc)
PLACE = DistEnv(0, 2, 0, 2, "gpu01", "torch", "started by torchrun", "gpu01", 29500)
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
def test_invalid_job_names(tmp_path, name):
    with pytest.raises(ConfigError, match="JOB_NAME"):
        create_run_folder(tmp_path, name, NOW)


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--run-dir"):
        create_run_folder(tmp_path / "file", "job", NOW)


def test_latest_cannot_be_replaced(tmp_path, caplog):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "something").write_text("")
    point_latest(tmp_path, "run")
    assert "cannot point" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_find_run_folder(tmp_path):
    folder = create_run_folder(tmp_path, "job", NOW)
    assert find_run_folder(tmp_path, "job", folder.name) == folder
    again = create_run_folder(tmp_path, "job", NOW)
    assert find_run_folder(tmp_path, "job", again.name) == again
    assert find_run_folder(tmp_path, "other", folder.name) is None
    for name in ("", "latest", "..", f"../job/{folder.name}", str(folder), f"{folder.name}/", "2023-11-10_11-45-21"):
        assert find_run_folder(tmp_path, "job", name) is None, name


def loaded_from(*files: Path, **changes: object) -> LoadedConfig:
    config = CONFIG.model_copy(update=changes)
    return LoadedConfig(config, files, {"seed": "a.py:3", "ckpt.save_ckpt_folder": "command line"}, ())


def test_config_copies_resolved_values_and_origins(tmp_path):
    folder = create_run_folder(tmp_path / "RUN", "job", NOW)
    sources = []
    for part, text in (("a", "x = 1\n"), ("b", 'secret_key = "hunter2"  # mine\n')):
        (tmp_path / part).mkdir()
        sources.append(tmp_path / part / "base.py")
        sources[-1].write_text(text)
    write_start(folder, loaded_from(*sources), {"time": "noon"})
    assert (folder / "config" / "base.py").read_text() == "x = 1\n"
    assert (folder / "config" / "base-1.py").read_text() == 'secret_key = "***"  # mine\n'
    values = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    assert values["model"]["hidden_size"] == 8 and values["adam"]["lr"] == 1e-4
    assert values["ckpt"]["save_ckpt_folder"] == "boto3:s3://***@bucket.example.com/x"
    assert json.loads((folder / "config.origins.json").read_text()) == [
        {"key": "seed", "value": 1024, "origin": "a.py:3"},
        {"key": "ckpt.save_ckpt_folder", "value": "boto3:s3://***@bucket.example.com/x", "origin": "command line"},
    ]
    assert not [path for path in folder.rglob("*") if path.is_file() and "hunter2" in path.read_text()]


def test_files_of_earlier_start_are_kept(tmp_path):
    folder = create_run_folder(tmp_path / "RUN", "job", NOW)
    source, base = tmp_path / "c.py", tmp_path / "base.py"
    base.write_text("a = 1")

    def start(text: str, time: str, *files: Path, **changes: object) -> set[str]:
        source.write_text(text)
        write_start(folder, loaded_from(source, *files, **changes), {"time": time})
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    newest = {"config.resolved.yaml", "config.origins.json", "env.json", "config/c.py"}
    assert start("n = 1", "noon", base) == newest | {"config/base.py"}
    assert start("n = 1", "one", base) == newest | {"config/base.py", "env.0.json"}
    kept = {"env.0.json", "env.1.json", "config.resolved.1.yaml", "config.origins.1.json"}
    kept |= {"config.1/c.py", "config.1/base.py"}
    assert start("n = 2", "two", seed=7) == newest | kept, "base.py is no part of it any more"
    assert start("n = 2", "three", seed=7) == newest | kept | {"env.2.json"}
    assert [json.loads((folder / f"env{n}.json").read_text())["time"] for n in (".0", ".1", ".2", "")] == [
        "noon", "one", "two", "three",
    ]  # fmt: skip
    assert yaml.safe_load((folder / "config.resolved.1.yaml").read_text())["seed"] == 1024
    assert yaml.safe_load((folder / "config.resolved.yaml").read_text())["seed"] == 7
    assert ((folder / "config.1" / "c.py").read_text(), (folder / "config" / "c.py").read_text()) == ("n = 1", "n = 2")


def test_environment_has_no_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    argv = ["train.py", "--config", "c.py", "monitor.api_key=hunter2", "data.seq_len=8"]
    found = environment(PLACE, argv, "NVIDIA H200", NOW)
    assert "hunter2" not in json.dumps(found)
    assert found["command"] == ["train.py", "--config", "c.py", "monitor.api_key=***", "data.seq_len=8"]
    assert found["time"] == "2023-11-10T11:45:20+00:00" and found["host"] == "gpu01"
    assert found["packages"]["torch"] and found["why"] == "started by torchrun"


def test_agents_round_trip(tmp_path):
    folder = create_run_folder(tmp_path / "RUN", "job", NOW)
    assert agents_of(folder) == set()
    write_start(folder, loaded_from(), environment(PLACE, ["train.py"], "cpu", NOW, ["/tmp/a", "/tmp/b"]))
    assert agents_of(folder) == {"/tmp/a", "/tmp/b"}
    for text in ("", "[]", "{}", '{"agents": 3}', "\udcff"):
        (folder / "env.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        assert agents_of(folder) == set(), text


def test_secrets_are_masked_in_all_files(tmp_path):
    hook = "https://example.com/T0/abcdef"
    config = CONFIG.model_copy(
        update={"monitor": CONFIG.monitor.model_validate({"alerts": {"webhook": hook, "format": "slack"}})}
    )
    source = tmp_path / "c.py"
    source.write_text(f'HOOK = "{hook}"\nmonitor = dict(alerts=dict(webhook=HOOK))\n')
    folder = create_run_folder(tmp_path / "RUN", "job", NOW)
    write_start(folder, LoadedConfig(config, (source,), {}, ()), {"command": ["train.py", f"HOOK={hook}"]})
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) == 4 and not [path for path in files if "abcdef" in path.read_text()]


def test_config_encoding(tmp_path):
    source = tmp_path / "c.py"
    source.write_bytes("# coding: latin-1\nJOB_NAME = 'caf\u00e9'\n".encode("latin-1"))
    folder = create_run_folder(tmp_path / "RUN", "job", NOW)
    write_start(folder, LoadedConfig(CONFIG, (source,), {}, ()), {})
    assert "JOB_NAME = 'caf\u00e9'" in (folder / "config" / "c.py").read_text(encoding="utf-8")


def test_code_digest(tmp_path):
    (tmp_path / "a.py").write_text("one = 1\n")
    one = code_digest(tmp_path)
    (tmp_path / "a.txt").write_text("of no account")
    (tmp_path / ".#a.py").symlink_to("somebody@host.123")
    assert code_digest(tmp_path) == one
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert code_digest(tmp_path) != one


def test_no_commit_outside_checkout(tmp_path):
    assert git_commit(tmp_path) is None
    inside = git_commit(Path(__file__).parent)
    assert inside is None or len(inside["commit"]) == 40


def test_full_disk_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot write"):
        write_start(tmp_path / "absent", loaded_from(), {})
