"""Which device a process takes, how many threads, and the peaks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from internlm_lite.errors import MeshError
from internlm_lite.runtime.device import apply_numerics, bind_device, cpu_threads, device_name, peak_flops, peak_of
from internlm_lite.runtime.dist_env import DistEnv
from tests.runtime.test_folder import CONFIG

PLACE = DistEnv(3, 4, 3, 4, "HOST-10-140-60-69", "torch", "", "localhost", 1)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that `n` GPUs are visible; the GPU that was made current lies in the returned list."""
    current: list[torch.device] = []

    def pretend(n: int) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return pretend


def test_one_gpu_per_local_rank(gpus, caplog):
    current = gpus(8)
    with caplog.at_level("INFO", "internlm_lite"):
        assert bind_device(PLACE) == torch.device("cuda", 3)
    assert current == [torch.device("cuda", 3)]
    assert caplog.messages == ["process rank 3 is bound to host:HOST-10-140-60-69 device: 3"]


def test_slurm_task_with_one_visible_gpu(gpus):
    gpus(1)
    assert bind_device(dataclasses.replace(PLACE, launcher="slurm")) == torch.device("cuda", 0)
    with pytest.raises(MeshError, match="4 processes but 1 visible GPUs"):
        bind_device(PLACE)


def test_cpu(gpus, caplog):
    gpus(0)
    with caplog.at_level("INFO", "internlm_lite"):
        assert bind_device(PLACE) == torch.device("cpu")
    assert caplog.messages == ["process rank 3 is bound to host:HOST-10-140-60-69 device: cpu"]
    with pytest.raises(MeshError, match="--device cuda: no GPU is visible"):
        bind_device(PLACE, "cuda")
    gpus(8)
    assert bind_device(PLACE, "cpu") == torch.device("cpu")


def test_threads_per_process():
    assert cpu_threads(PLACE, 16) == 4
    assert cpu_threads(PLACE, 2) == 1
    assert cpu_threads(dataclasses.replace(PLACE, cpu_threads=6), 2) == 6


def test_determinism_is_asked_of_torch():
    threads = torch.get_num_threads()
    try:
        for wanted in (True, False):
            apply_numerics(CONFIG.model_copy(update={"deterministic": wanted}), torch.device("cpu"), PLACE)
            assert torch.are_deterministic_algorithms_enabled() is torch.backends.cudnn.deterministic is wanted
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.set_num_threads(threads)


def test_numerics_follow_the_config():
    before = torch.get_num_threads()
    try:
        for dtype, precision in (("torch.tf32", "high"), ("torch.float32", "highest")):
            model = CONFIG.model.model_copy(update={"dtype": dtype})
            config = CONFIG.model_copy(update={"model": model, "cudnn_deterministic": dtype == "torch.tf32"})
            apply_numerics(config, torch.device("cpu"), dataclasses.replace(PLACE, cpu_threads=1))
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.cudnn.deterministic == (dtype == "torch.tf32")
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("gpu", "dtype", "tera"),
    [
        ("NVIDIA H200", "torch.bfloat16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "torch.float16", 312),
        ("NVIDIA A100-SXM4-80GB", "torch.tf32", 156),
        ("NVIDIA H100 PCIe", "torch.bfloat16", 756),
        ("NVIDIA H100 80GB HBM3", "torch.float64", 67),
        ("NVIDIA H20", "torch.bfloat16", 148),
        ("NVIDIA GB200", "torch.bfloat16", 2500),
        ("NVIDIA L40S", "torch.bfloat16", 362),
        ("NVIDIA L4", "torch.bfloat16", 121),
        ("AMD Instinct MI300X", "torch.bfloat16", 1307.4),
    ],
)
def test_peaks(gpu, dtype, tera):
    assert peak_of(gpu, dtype) == pytest.approx(tera * 1e12)


def test_unknown_peaks(monkeypatch, caplog):
    assert peak_of("Some GPU", "torch.bfloat16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert peak_flops(torch.device("cuda"), "torch.bfloat16") is None
    assert "no peak speed is known for Some GPU, so no MFU is shown" in caplog.text
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    assert device_name(torch.device("cpu"))


def test_products_do_not_add_in_half_precision() -> None:
    """torch's default lets a product that is split along its sum add the parts in bf16 or fp16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    threads = torch.get_num_threads()
    try:
        apply_numerics(CONFIG, torch.device("cpu"), PLACE)
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before
        torch.set_num_threads(threads)
