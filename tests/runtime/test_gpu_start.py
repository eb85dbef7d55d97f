"""What must be set before the first process group of a run on GPUs, where no GPU is needed to see that it is."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from internlm_lite.cli.train import parse_arguments, train_or_show
from internlm_lite.config.load import LoadedConfig
from internlm_lite.runtime import start
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.train import job
from internlm_lite.train.failure_handler import FailureHandler
from tests.runtime.test_folder import CONFIG

GPU = torch.device("cuda", 3)
PLACE = DistEnv(3, 4, 3, 4, "host", "torch", "", "localhost", 1)
DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_GLOO_LAZY_INIT": "1",
    "NCCL_ALGO": "^NVLS,NVLSTree",
}


# Unless the variables are there before the first communicator, NCCL's own watchdog ends a rank by a signal, and NVLink
# switches add in any order.
@pytest.mark.parametrize(
    ("gpus", "deterministic", "given", "missing"),
    [
        (8, True, {}, set()),
        (8, False, {}, {"NCCL_ALGO"}),
        (8, True, {"NCCL_ALGO": "Ring", "TORCH_GLOO_LAZY_INIT": "0"}, set()),
        (0, True, {}, {"NCCL_ALGO", "TORCH_GLOO_LAZY_INIT"}),
    ],
)
def test_the_environment_is_set_when_the_job_starts(
    gpus: int, deterministic: bool, given: dict[str, str], missing: set[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(job, "run_job", lambda *_: seen.update(os.environ))
    config = tmp_path / "config.py"
    config.write_text(
        f"deterministic = {deterministic}\ndata = dict(seq_len=32, total_steps=1)\n"
        "model = dict(num_attention_heads=2, hidden_size=16, num_layers=1, vocab_size=256, dtype='torch.float32')\n"
    )
    seen: dict[str, str] = {}
    with patch.dict(os.environ, given):
        for name in DEFAULTS.keys() - given.keys():
            os.environ.pop(name, None)
        train_or_show(parse_arguments(["--config", str(config), "--launcher", "single"]), {})
    expected = {name: value for name, value in {**DEFAULTS, **given}.items() if name not in missing}
    assert {name: seen[name] for name in DEFAULTS if name in seen} == expected


class Connected(Exception):
    """Stands for a world that is connected."""


# torch excludes NVLS by itself only if it is told to be deterministic before NCCL starts; each rank takes its own GPU
# before there is a group, or all make a context on the first.
def test_device_and_determinism_come_before_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str, value: Any = None) -> Any:
        return lambda *_: calls.append(name) or value

    def connect(*_: Any) -> None:
        calls.append("start_world")
        raise Connected

    for name, value in (("check_packages", None), ("bind_device", GPU), ("apply_numerics", None)):
        monkeypatch.setattr(job, name, noted(name, value))
    monkeypatch.setattr(job, "_fingerprint", lambda *_: {})
    monkeypatch.setattr(job, "start_world", connect)
    options = job.Options(None, "auto", Path("RUN"), 60.0, "auto", (), profiling=False)
    with pytest.raises(Connected):
        job._run(LoadedConfig(CONFIG, (), {}, ()), PLACE, options, FailureHandler(PLACE))
    assert calls == ["check_packages", "bind_device", "apply_numerics", "start_world"]


# On a default group without a device, barrier() takes the GPU with the number of the rank, which may be another's.
@pytest.mark.parametrize(("device", "backend", "bound"), [(GPU, "nccl", GPU), (torch.device("cpu"), "gloo", None)])
def test_the_default_group_is_bound_to_its_gpu(device: Any, backend: str, bound: Any, monkeypatch: Any) -> None:
    made: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: made.append((name, options)))
    start.connect_ranks(dist.HashStore(), PLACE, device, timedelta(seconds=7))
    ((name, options),) = made
    assert (name, options["device_id"], options["timeout"]) == (backend, bound, timedelta(seconds=7))
