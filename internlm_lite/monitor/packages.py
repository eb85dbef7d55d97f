"""Which optional packages the monitor section needs, checked before training."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

from internlm_lite.config.schema import MonitorConfig
from internlm_lite.errors import MissingPackageError

_OLDEST_WANDB = Version("0.31")
"""Older versions ask for a login on the terminal, and a click on "stop" in their page interrupts the run."""


def check_packages(monitor: MonitorConfig) -> None:
    """Raises MissingPackageError when the package of a requested sink is missing or too old."""
    if monitor.tensorboard and not is_installed("tensorboard"):
        raise MissingPackageError(
            "monitor.tensorboard=True needs tensorboard, which is not installed: pip install internlm_lite[tb]"
        )
    if monitor.mlflow is not None and not is_installed("mlflow"):
        raise MissingPackageError(
            "monitor.mlflow needs mlflow, which is not installed: pip install internlm_lite[mlflow]"
        )
    if monitor.wandb is None:
        return
    if not is_installed("wandb"):
        raise MissingPackageError("monitor.wandb needs wandb, which is not installed: pip install internlm_lite[wandb]")
    if (found := Version(version("wandb"))) < _OLDEST_WANDB:
        raise MissingPackageError(
            f"found wandb {found}, expected {_OLDEST_WANDB} or newer: pip install --upgrade internlm_lite[wandb]"
        )


def writes_tensorboard(monitor: MonitorConfig) -> bool:
    """Whether the run has a TensorBoard sink. monitor.tensorboard=None: if tensorboard is installed."""
    return is_installed("tensorboard") if monitor.tensorboard is None else monitor.tensorboard


def is_installed(package: str) -> bool:
    """Whether package `name` is installed. A plain folder of that name, such as wandb's output, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
