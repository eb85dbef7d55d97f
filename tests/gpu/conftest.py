"""Devices of the tests in this folder: bodies run on the CPU, and, marked `gpu`, on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")],
)
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; for deterministic steps


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(params=[GPU])
def gpu() -> torch.device:
    """A GPU, for what no CPU has."""
    return torch.device("cuda", 0)
