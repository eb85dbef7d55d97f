"""Correctness on a GPU: installed packages, tests marked gpu, every attention kernel, host-device syncs."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.bench.gpu.measurement import Check
from internlm_lite.config.schema import Config, ModelConfig
from internlm_lite.faults.signals import StopSignals
from internlm_lite.layers.flash import NEEDS, AttentionBackend, choose_backend, packed, unmet
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.runtime.device import device_name, peak_flops
from internlm_lite.train.build import build_run
from internlm_lite.train.loop import train

_PACKAGES = ("torch", "triton", "pydantic", "numpy", "rich", "sentencepiece", "liger_kernel", "flash_attn", "pytest")
_LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest allowed relative error of attention against fp64; twice that for its gradient."""


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(check: Check) -> None:
    """Versions and device. A device with unknown peak FLOP/s fails the section: MFU would be missing."""
    query = "--query-gpu=name,memory.total,driver_version,power.limit"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    gpu = "cpu" if check.smoke else subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    packages = {name: version for name in _PACKAGES if (version := installed(name))}
    check.tell(
        f"{gpu}, torch {torch.__version__}, Python {platform.python_version()}",
        packages=packages,
        gpu=gpu,
        cuda=torch.version.cuda,
        nccl=None if check.smoke else str(torch.cuda.nccl.version()),
        cpus=os.cpu_count(),
    )
    if check.smoke:
        return
    peak = peak_flops(check.device, "torch.bfloat16")
    if peak is None:
        check.wrong(f"no peak FLOP/s is known for {device_name(check.device)}: mfu would be missing")
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_layers": 1, "vocab_size": 128}
    model = ModelConfig.model_validate({**shape, "dtype": "torch.bfloat16"})
    check.note(f"{choose_backend(model, check.device)}, peak {peak}")


def gpu_tests(check: Check) -> None:
    """Run the tests marked gpu, the slowest last; those for which there is no time are left out."""
    folders = ["tests/gpu", "tests/layers", "tests/apps/doctor", "tests/faults/test_watchdog.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-rA"]
    command += ["--timeout", "60", "--session-timeout", "110"]
    done = subprocess.run([*command, *folders], cwd=check.repository, capture_output=True, text=True)
    text = done.stdout + done.stderr
    lines = text.strip().splitlines() or ["pytest said nothing"]
    check.tell(lines[-1], output=text[-4000:].replace(str(check.repository), "."))
    if done.returncode not in (0, 5):  # 5: no tests collected
        check.wrong(lines[-1])


def fp64_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, boundaries: Sequence[int]) -> torch.Tensor:
    """Causal softmax attention inside each document, in float64. q [T, H, D], k and v [T, Hkv, D]."""
    parts = []
    for start, stop in pairwise(boundaries):
        queries, keys, values = (x[start:stop].double() for x in (q, k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(q.shape[-1])
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), values))
    return torch.cat(parts)


def attention(check: Check) -> None:
    """Error of forward pass and gradient of every kernel against fp64, and whether it is deterministic."""
    shapes = [(64, 8, 2), (128, 8, 8), (128, 8, 1), (96, 4, 4), (256, 2, 2)]
    table: dict[str, list[Any]] = {}
    for head_dim, heads, kv_heads in shapes[: 2 if check.smoke else None]:
        for dtype in _LIMITS:
            case = _Case(check.device, dtype, head_dim, heads, kv_heads)
            for backend in kernels(check.device, dtype, head_dim):
                key = f"{backend.name} D{head_dim} H{heads}/{kv_heads} {dtype}"
                try:
                    table[key] = case.errors(backend)
                except RuntimeError as error:
                    check.wrong(f"{key}: {str(error)[:200]}")
                    continue
                forward, backward, _ = table[key]
                if not (forward < _LIMITS[dtype] and backward < 2 * _LIMITS[dtype]):
                    check.wrong(f"{key}: relative error {forward:.1e} forward, {backward:.1e} of the gradient")
            check.tell(table=table)
    worst = max(row[1] for row in table.values())
    unstable = sorted({key.split()[0] for key, row in table.items() if not row[2]})
    check.tell(f"{len(table)} cases, worst gradient error {worst:.1e}; other bits each time: {unstable}")


def kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[AttentionBackend]:
    """Those that such a model can take on `device`, right or wrong."""
    shape = {"num_attention_heads": 1, "hidden_size": head_dim, "num_layers": 1, "vocab_size": 128}
    model = ModelConfig.model_validate({**shape, "dtype": str(dtype)})
    return [*(backend for backend in NEEDS if not unmet(backend, model, device)), AttentionBackend.SDPA]


class _Case:
    """One row of documents, with the attention output and gradients in fp64."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int) -> None:
        long = (3584,) * (device.type == "cuda")  # for the kernels of long documents
        self.boundaries = (0, 1, 130, 131, 500, 1000, 1536, *long)
        tokens, self.queries = self.boundaries[-1], heads // kv_heads
        generator = torch.Generator().manual_seed(head_dim)
        qkv = torch.randn(tokens, kv_heads, self.queries + 2, head_dim, generator=generator)
        self.qkv = qkv.to(device, dtype)
        self.weight = torch.randn(tokens, heads, head_dim, generator=generator).to(device, dtype)
        self.cu_seqlens = torch.tensor(self.boundaries, dtype=torch.int32, device=device)
        leaf, q, k, v = self._inputs()
        self.expected = fp64_attention(q, k, v, self.boundaries)
        (self.expected_grad,) = torch.autograd.grad((self.expected * self.weight.double()).sum(), leaf)

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v with the strides that the model passes."""
        leaf = self.qkv.clone().requires_grad_()
        q, k, v = leaf.split([self.queries, 1, 1], dim=2)
        return leaf, q.flatten(1, 2).contiguous(), k.squeeze(2).contiguous(), v.squeeze(2)

    def errors(self, backend: AttentionBackend) -> list[Any]:
        """[relative error, relative error of the gradient, whether three more calls gave the same bits]."""
        longest = max(stop - start for start, stop in pairwise(self.boundaries))
        attend = packed(backend, self.cu_seqlens, self.boundaries, longest)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            leaf, q, k, v = self._inputs()
            out = attend(AttentionRule(), q, k, v)
            return out, torch.autograd.grad((out * self.weight).sum(), leaf)[0]

        out, grad = run()
        pairs = ((out, self.expected), (grad, self.expected_grad))
        relative = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
        return [*relative, all(torch.equal(grad, run()[1]) for _ in range(3))]


def host_waits(check: Check) -> None:
    """Source lines that sync host and device in the training loop, with a step line every step or every tenth."""
    counts = {}
    for every in (1, 10):
        places = _waits(check, every, steps=10)
        counts[f"log_every={every}"] = dict(places.most_common(30))
        for place, n in places.most_common(14):
            check.note(f"log_every={every}: {n:3d} in 10 steps  {place}")
    totals = "; ".join(f"{key}: {sum(places.values())} waits in 10 steps" for key, places in counts.items())
    check.tell(totals, places=counts)


def _waits(check: Check, log_every: int, steps: int) -> Counter[str]:
    config = Config.model_validate(
        {
            "data": {"seq_len": 256, "micro_bsz": 2, "micro_num": 2, "total_steps": steps},
            "adam": {"lr": 1e-3},
            "ckpt": {"enable_save_ckpt": False},
            "lr_scheduler": {"total_steps": steps, "eta_min": 1e-4},
            "monitor": {"log_every": log_every},
            "grad_scaler": {},
            "model": {
                **{"num_attention_heads": 4, "hidden_size": 256, "num_layers": 2, "vocab_size": 512, "multiple_of": 64},
                "no_bias": True,
                "compile": False,
                "dtype": "torch.float32" if check.smoke else "torch.bfloat16",
            },
        }
    )
    folder = check.scratch / f"every{log_every}"
    folder.mkdir()
    run = build_run(config, single_process_mesh(check.device), folder, "none")
    places: Counter[str] = Counter()

    def count(message: Warning | str, category: type[Warning], filename: str, line: int, *_: Any) -> None:
        stack = [frame for frame in traceback.extract_stack() if "internlm_lite" in frame.filename]
        named = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(stack[-3:])]
        places[" < ".join(named) or f"{Path(filename).name}:{line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count  # type: ignore[assignment]
        if not check.smoke:
            torch.cuda.set_sync_debug_mode("warn")
        train(run, StopSignals())
        if not check.smoke:
            torch.cuda.set_sync_debug_mode("default")
    run.checkpoints.close(wait=True)
    run.reporter.close()
    return places
